//! The rules of `upg_format_v2.md` that more than one place checks, by their numbers there.
#![forbid(unsafe_code)]

use super::container::MOST_NAME_BYTES;
use crate::error::{Error, ErrorKind, Result};

/// A safetensors file: header, names, contiguous tensors.
pub const CONTAINER: u8 = 1;
/// Required metadata.
pub const METADATA: u8 = 2;
/// The version.
pub const VERSION: u8 = 3;
/// The checksum of the metadata and the tensor table.
pub const TABLE_CHECKSUM: u8 = 4;
/// The list of layers.
pub const LAYERS: u8 = 5;
/// Known encodings and their parameters.
pub const ENCODING: u8 = 6;
/// The arrays of a layer: present, dtype, shape.
pub const ARRAYS: u8 = 7;
/// Alignment of tensors.
pub const ALIGNMENT: u8 = 8;
/// Scales are at most 2^64 in magnitude.
pub const SCALES: u8 = 9;
/// Row pointers ascend from 0 to the number of codes.
pub const POINTERS: u8 = 10;
/// Columns of sparse entries are inside the matrix.
pub const COLUMNS: u8 = 11;
/// Prime indices are below 10,000.
pub const PRIME_INDEX: u8 = 12;
/// Bitmaps match their codes.
pub const BITMAP: u8 = 13;
/// Tensors that are not compressed.
pub const KEPT: u8 = 14;
/// Checksums of tensors.
pub const TENSOR_CHECKSUM: u8 = 15;

/// The metadata key of the checksum over the metadata and the tensor table.
pub const CHECKSUM: &str = "checksum";
/// Beginning of the names of the arrays of layers.
pub const LAYER_PREFIX: &str = "layer_";
/// Tensors of zeros that align the next one.
pub const PAD_PREFIX: &str = "upg_pad_";
/// The tensor with the text of `tokenizer.json`.
pub const TOKENIZER: &str = "tokenizer.json";

/// Largest `tokenizer.json` that is read or stored, in bytes: the largest published one, of Gemma,
/// has 35 MB.
pub const MAX_TOKENIZER_BYTES: usize = 64 << 20;

/// Rows of a matrix. With the limits below, a short hostile file cannot ask for much memory.
pub const MOST_ROWS: usize = 1 << 24;
/// Columns of a matrix: a scratch tile of 64 rows in f32 stays below 256 MiB.
pub const MOST_COLS: usize = 1 << 20;
/// Weights of one matrix.
pub const LARGEST_MATRIX: usize = 1 << 32;
/// Layers of a file.
pub const MOST_LAYERS: usize = 100_000;

/// Refuses a `tokenizer.json` of more than [`MAX_TOKENIZER_BYTES`] bytes (`TooLarge`).
pub fn tokenizer_bytes(bytes: usize) -> Result<()> {
    match bytes <= MAX_TOKENIZER_BYTES {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::TooLarge,
            format!("tokenizer.json has {bytes} bytes, at most {MAX_TOKENIZER_BYTES}"),
        )),
    }
}

/// Returns the error for a wrong shape or length (rule 7).
pub fn shape(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Shape, message).rule(ARRAYS)
}

/// Checks that `found` is the product of `expected`.
pub fn length(name: &str, found: usize, expected: &[usize]) -> Result<()> {
    let product = expected.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if product == Some(found) {
        return Ok(());
    }
    Err(shape(format!(
        "{name} has {found} elements, expected {expected:?}"
    )))
}

/// Checks the Hadamard size of a rotation of `cols` columns.
///
/// It is 1, for changes of signs only, or a power of two whose two passes reach every column.
pub fn hadamard(cols: usize, size: usize) -> Result<()> {
    let half = cols.div_ceil(2);
    let reaches_all = size.is_power_of_two() && (half..=cols).contains(&size);
    if cols > 0 && (size == 1 || reaches_all) {
        return Ok(());
    }
    let message =
        format!("Hadamard size {size}, expected 1 or a power of two from {half} to {cols}");
    Err(Error::new(ErrorKind::Invalid, message).rule(ENCODING))
}

/// Checks the name of a matrix or another tensor of the model.
///
/// It has no control characters, is not too long, and is no name that the format reserves. The
/// error names `rule`.
pub fn name(name: &str, rule: u8) -> Result<()> {
    if name.len() > MOST_NAME_BYTES {
        let message = format!("a name of {} bytes, at most {MOST_NAME_BYTES}", name.len());
        return Err(Error::new(ErrorKind::TooLarge, message)
            .rule(rule)
            .tensor(super::json::cut(name)));
    }
    let is_reserved = name.starts_with(LAYER_PREFIX)
        || name.starts_with(PAD_PREFIX)
        || [TOKENIZER, "__metadata__", ""].contains(&name);
    if !is_reserved && !name.chars().any(char::is_control) {
        return Ok(());
    }
    let message = "a name that this format keeps for itself, or with control characters";
    Err(Error::new(ErrorKind::Invalid, message)
        .rule(rule)
        .tensor(name))
}

/// Checks the pointers of `n` rows or strips (`what`): `n + 1`, ascending from 0 to `stored`.
pub fn pointers(pointers: &[u32], what: &str, n: usize, stored: usize) -> Result<()> {
    if n.checked_add(1) != Some(pointers.len()) {
        let found = pointers.len();
        return Err(shape(format!("{found} {what} pointers for {n} {what}s")));
    }
    let invalid = |message| Err(Error::new(ErrorKind::Invalid, message).rule(POINTERS));
    if pointers[0] != 0 {
        let found = pointers[0];
        return invalid(format!("the first {what} pointer is {found}, not 0"));
    }
    if let Some(i) = pointers.windows(2).position(|w| w[0] > w[1]) {
        return invalid(format!("{what} {i} ends before it starts"));
    }
    if pointers[n] as usize != stored {
        let found = pointers[n];
        return invalid(format!(
            "the last {what} pointer is {found}, the codes end at {stored}"
        ));
    }
    Ok(())
}

//! The functions of an encoder, and the properties that plans and estimates go by.
#![forbid(unsafe_code)]

use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use bytemuck::Pod;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::matrix::strips::{self, STRIP_ROWS};
use upg_kernel::{Array, Matrix, Result};

/// Encodes weights `[rows, cols]`, row by row, as a layer says, with a seed.
pub(crate) type Encode =
    fn(&[f32], &LayerInfo, u64, Option<&Curvature>, &dyn Progress) -> Result<Matrix>;

/// The encoder of one encoding.
pub(crate) struct Encoder {
    pub encoding: Encoding,
    /// Sets the parameters of a layer. The second argument is the number of columns in a group
    /// that the options ask for.
    pub describe: fn(&mut LayerInfo, Option<usize>),
    pub encode: Encode,
    /// Repeats a matrix of one strip down to so many rows; `None` if it has no strips to repeat.
    pub repeat: fn(&Matrix, usize) -> Result<Option<Matrix>>,
    /// Returns the bytes that codes take before they are in their arrays, for so many weights in
    /// all and parts at a time.
    pub scratch_bytes: fn(u64, u64) -> u64,
    /// Set if the encoder uses a curvature.
    pub is_calibrated: bool,
    /// Set if the option for the columns of a group applies.
    pub takes_group: bool,
    /// Set if zeros stay zeros and take less room, so that pruning pays.
    pub stores_zeros: bool,
    /// Encoding that stores zeros, with as many bits for the other weights; and these bits.
    pub sparse: Option<(Encoding, f64)>,
    /// Set if single rows take most of the time, not strips.
    pub by_row: bool,
    /// Default for embeddings beside blocks in this encoding.
    pub embedding: DefaultEmbedding,
}

/// Default encoding of embeddings and output head.
pub(crate) enum DefaultEmbedding {
    /// The encoding of the blocks.
    AsBlocks,
    Q8,
    /// `q8`, or `q4` if `q8` embeddings would exceed a fifth of the file.
    Q8OrQ4 {
        /// Bits of a weight in the blocks.
        block_bits: f64,
    },
}

/// Repeats the `values` of one strip, blocks of 64 rows with `width` values each, for `rows` rows.
///
/// Rows that the last strip has not are zeros.
pub(super) fn by_strip<T: Pod>(values: &[T], width: usize, rows: usize) -> Array<T> {
    let mut out = cycled(values, strips::count(rows) * values.len());
    let rows_of_last = (rows - 1) % STRIP_ROWS + 1;
    let last = out.len() - values.len();
    for block in out[last..].chunks_exact_mut(STRIP_ROWS * width) {
        block[rows_of_last * width..].fill(T::zeroed());
    }
    out.into()
}

/// Returns `len` values: `values` from the start, over and over.
pub(super) fn cycled<T: Pod>(values: &[T], len: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        out.extend_from_slice(&values[..values.len().min(len - out.len())]);
    }
    out
}

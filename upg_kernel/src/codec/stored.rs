//! The methods of every stored matrix, and the checks that encodings share.
#![forbid(unsafe_code)]

use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use crate::kernels::views::{Entries, Strip};
use crate::rotation::Rotation;

/// The largest magnitude of a scale.
///
/// A weight is below 2^24 times it, and inverting the rotation of a row of 2^20 weights adds at
/// most 20 bits: nothing overflows an f32.
const LARGEST_SCALE: f32 = (1u64 << 63) as f32 * 2.0;

/// Returns `scale * prime * value`, the one formula of the format.
///
/// The integer product is below 2^24, so it is exact in f32: there is one rounding.
pub(crate) fn weight(scale: f32, prime: u32, value: i8) -> f32 {
    scale * (prime as i32 * i32::from(value)) as f32
}

/// Checks that there is a scale for each row, and that no weight can overflow.
pub(crate) fn checked_scales(scales: &[f32], rows: usize) -> Result<()> {
    if scales.len() != rows {
        return Err(rules::shape(format!(
            "{} scales for {rows} rows",
            scales.len()
        )));
    }
    let bad = |s: &f32| s.is_nan() || s.abs() > LARGEST_SCALE;
    match scales.iter().position(bad) {
        None => Ok(()),
        Some(row) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "the scale of row {row} is {}, not a number of magnitude up to 2^64",
                scales[row]
            ),
        )
        .rule(rules::SCALES)),
    }
}

/// Checks the scales of a layer with `rows` rows (rule 9).
pub(super) fn check_scales(arrays: &LayerArrays<'_>, rows: usize) -> Result<()> {
    let scales = arrays.get::<f32>("scales")?;
    checked_scales(&scales, rows).map_err(|e| e.tensor(arrays.name("scales")))
}

/// Checks the pointers of `n` rows or strips (`what`) into the array `codes` (rule 10).
pub(super) fn check_pointers(
    arrays: &LayerArrays<'_>,
    what: &str,
    n: usize,
    codes: &str,
) -> Result<()> {
    let suffix = format!("{what}_pointers");
    let pointers = arrays.get::<u32>(&suffix)?;
    rules::pointers(&pointers, what, n, arrays.len(codes))
        .map_err(|e| e.tensor(arrays.name(&suffix)))
}

/// The methods of a matrix in any encoding; everything else is built on them, once.
pub(crate) trait StoredMatrix: Send + Sync {
    /// Rows and columns.
    fn size(&self) -> [usize; 2];
    /// Number of rows.
    fn rows(&self) -> usize {
        self.size()[0]
    }
    /// Number of columns.
    fn cols(&self) -> usize {
        self.size()[1]
    }
    /// Decodes rows from `first` on into `out` (`[n, cols]`), in the stored basis.
    ///
    /// This is the reference. The caller keeps `first + n <= rows` and `out.len() == n * cols`.
    fn decode_rows(&self, first: usize, out: &mut [f32]);
    /// Returns the bytes of an array by its suffix in a file; `None` if there is no such array.
    fn array(&self, suffix: &str) -> Option<&[u8]>;
    /// The scale of each row, `[rows]`; `None` for a matrix that is not compressed.
    fn scales(&self) -> Option<&Array<f32>>;
    /// The scales, to exchange them for others that are checked.
    fn scales_mut(&mut self) -> Option<&mut Array<f32>>;
    /// The rotation from the input to the stored basis.
    fn rotation(&self) -> Option<&Rotation> {
        None
    }
    /// Strip `index` in place, for kernels on packed weights; `None` if there are no strips.
    fn strip(&self, _index: usize) -> Option<Strip<'_>> {
        None
    }
    /// Stored entries of a row, for kernels that skip zeros; `None` if all weights are stored.
    fn entries(&self, _row: usize) -> Option<Entries<'_>> {
        None
    }
}

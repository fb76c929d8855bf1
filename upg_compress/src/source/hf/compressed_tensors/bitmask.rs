//! `sparse-bitmask` and `sparse-24-bitmask`:
//! a bit per weight, and values for the nonzero ones.
#![forbid(unsafe_code)]

use super::config::SparseFormat;
use super::parts::{WeightTensors, check_shape};
use crate::source::hf::stored::{Bytes, Stored};
use crate::source::model::FloatType;
use rayon::prelude::*;
use safetensors::Dtype;
use upg_kernel::{Error, ErrorKind, Result};

/// Sparse weight `[rows, cols]`, stored as four tensors.
///
/// With two of four in each row there are three, without `row_offsets`.
///
/// - `shape` I64 `[2]` or `[2, 1]`;
/// - `bitmask` U8 `[rows, ceil(cols / 8)]`, least significant bit first: 1 means that there is a
///   value;
/// - `compressed`: the values, row by row, `[n]`, or `[rows, cols / 2]` with two of four;
/// - `row_offsets` I64 `[rows]`: the start of the values of each row.
///
/// A vector `[n]` is a row. Bits and offsets of a row are checked when it is read.
#[derive(Debug, Clone)]
pub(in crate::source::hf) struct Bitmask {
    shape: Vec<usize>,
    pub(in crate::source::hf) float: FloatType,
    bitmask: Stored,
    values: Stored,
    rows: RowStarts,
}

/// Starts of the values of each row.
#[derive(Debug, Clone)]
enum RowStarts {
    Offsets(Stored),
    TwoOfFour,
}

/// Bytes of a [`Bitmask`], for reading rows.
pub(in crate::source::hf) struct BitmaskRows<'a> {
    rows: usize,
    cols: usize,
    value_bytes: usize,
    bitmask: &'a [u8],
    values: &'a [u8],
    /// Row offsets; `None` with two of four.
    offsets: Option<&'a [u8]>,
}

impl Bitmask {
    /// Creates a weight from its tensors.
    ///
    /// Errors: `Missing`, `Shape` and `Unsupported` for tensors that are missing
    /// or not as described.
    pub(super) fn new(
        parts: &WeightTensors,
        sparse: SparseFormat,
        bytes: Bytes<'_, '_>,
    ) -> Result<Self> {
        let bitmask = parts.of_type(".bitmask", &[Dtype::U8])?;
        let shape = parts.weight_shape(".shape", bytes)?;
        let (values, float) = parts.floats(".compressed")?;
        let (rows, cols) = as_rows(&shape);
        let of_rows = |each: usize| match shape.len() {
            1 => vec![each],
            _ => vec![rows, each],
        };
        check_shape(".bitmask", bitmask, &of_rows(cols.div_ceil(8)))?;
        let starts = match sparse {
            SparseFormat::TwoOfFour => {
                check_shape(".compressed", values, &of_rows(cols / 2))?;
                if !cols.is_multiple_of(4) {
                    let message = format!("{cols} columns are no whole number of fours");
                    return Err(Error::new(ErrorKind::Shape, message));
                }
                RowStarts::TwoOfFour
            }
            SparseFormat::Any => {
                let offsets = parts.of_type(".row_offsets", &[Dtype::I64])?;
                let expected = match shape.len() {
                    1 => vec![],
                    _ => vec![rows],
                };
                check_shape(".row_offsets", offsets, &expected)?;
                RowStarts::Offsets(offsets.clone())
            }
        };
        Ok(Self {
            float,
            bitmask: bitmask.clone(),
            values: values.clone(),
            rows: starts,
            shape,
        })
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    /// Returns the whole weight in its own type.
    ///
    /// Errors: those of [`BitmaskRows::read`].
    pub(in crate::source::hf) fn dense(&self, bytes: Bytes<'_, '_>) -> Result<Vec<u8>> {
        let rows = self.rows(bytes)?;
        let row_bytes = rows.cols * rows.value_bytes;
        let mut out = vec![0; rows.rows * row_bytes];
        let each = out.par_chunks_exact_mut(row_bytes).enumerate();
        each.try_for_each(|(row, out)| rows.read(row, out))?;
        Ok(out)
    }

    /// Returns its rows; a vector is one row.
    pub(in crate::source::hf) fn rows<'a>(&self, bytes: Bytes<'_, 'a>) -> Result<BitmaskRows<'a>> {
        let (rows, cols) = as_rows(&self.shape);
        Ok(BitmaskRows {
            rows,
            cols,
            value_bytes: self.float.size(),
            bitmask: bytes(&self.bitmask)?,
            values: bytes(&self.values)?,
            offsets: match &self.rows {
                RowStarts::Offsets(offsets) => Some(bytes(offsets)?),
                RowStarts::TwoOfFour => None,
            },
        })
    }
}

/// Returns rows and columns; a vector is one row.
fn as_rows(shape: &[usize]) -> (usize, usize) {
    match shape {
        [cols] => (1, *cols),
        _ => (shape[0], shape[1]),
    }
}

impl BitmaskRows<'_> {
    /// Writes row `row` to `out`, which must be zero before.
    ///
    /// Errors (`Invalid`): bits past the last column; inconsistent bits and offsets; with two of
    /// four another number of bits.
    pub(in crate::source::hf) fn read(&self, row: usize, out: &mut [u8]) -> Result<()> {
        let mask_bytes = self.cols.div_ceil(8);
        let mask = self.bitmask.get(row * mask_bytes..(row + 1) * mask_bytes);
        // Copied: bits of a mapped file could change between counting and reading.
        let mask = mask.unwrap_or_default().to_vec();
        let used = self.cols % 8;
        if used != 0 && mask.last().is_some_and(|last| last >> used != 0) {
            let message = format!("row {row} has bits past column {}", self.cols);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let mut values = self.values_of(row, &mask)?;
        for (byte, out) in mask.iter().zip(out.chunks_mut(8 * self.value_bytes)) {
            let mut bits = *byte;
            while bits != 0 {
                let at = bits.trailing_zeros() as usize * self.value_bytes;
                let (value, rest) = values.split_at(self.value_bytes);
                out[at..at + self.value_bytes].copy_from_slice(value);
                (values, bits) = (rest, bits & (bits - 1));
            }
        }
        Ok(())
    }

    /// Returns the values of a row with this mask: as many as it has bits.
    fn values_of(&self, row: usize, mask: &[u8]) -> Result<&[u8]> {
        let kept = mask.iter().map(|b| b.count_ones() as usize).sum::<usize>();
        let invalid = |message: String| Error::new(ErrorKind::Invalid, message);
        let stored = self.values.len() / self.value_bytes;
        let (start, end) = match self.offsets {
            None => {
                let two = |four: u8| four.count_ones() == 2;
                let fours = mask.iter().flat_map(|&byte| [byte & 15, byte >> 4]);
                if !fours.take(self.cols / 4).all(two) {
                    let message = format!("row {row} has other than two of four weights");
                    return Err(invalid(message));
                }
                (row * kept, (row + 1) * kept)
            }
            Some(offsets) => {
                let offset = |row: usize| match offsets.as_chunks().0.get(row) {
                    Some(&offset) => usize::try_from(i64::from_le_bytes(offset)).ok(),
                    None => Some(stored),
                };
                let found = match (row, offset(row), offset(row + 1)) {
                    (0, Some(start), _) if start != 0 => None,
                    (_, Some(start), Some(end)) => Some((start, end)),
                    _ => None,
                };
                found.ok_or_else(|| {
                    invalid(format!(
                        "the offsets of row {row} are not positions of values"
                    ))
                })?
            }
        };
        if end.checked_sub(start) != Some(kept) || end > stored {
            return Err(invalid(format!(
                "row {row} has {kept} bits, its values are {start} to {end} of {stored}"
            )));
        }
        Ok(&self.values[start * self.value_bytes..end * self.value_bytes])
    }
}

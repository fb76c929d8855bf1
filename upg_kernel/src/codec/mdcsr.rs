//! `mdcsr`: rows of entries with column deltas, values, and a prime for each.
#![forbid(unsafe_code)]

use super::layer::{ArraySpec, Codec, LayerInfo};
use super::stored::{self, StoredMatrix, checked_scales, weight};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use crate::kernels::views::Entries;
use crate::prime_lut::{PRIME_COUNT, PRIME_LUT};
use bytemuck::cast_slice;
use rayon::prelude::*;
use safetensors::Dtype;

pub(super) const MDCSR: Codec<MdCSRMatrix> = Codec {
    check: |layer| {
        layer.has_no("group", layer.group)?;
        layer.has_no("hadamard", layer.hadamard)
    },
    arrays: |layer| {
        let most = layer.weights();
        Ok(vec![
            ArraySpec::counted("values", Dtype::I8, most),
            ArraySpec::counted("delta_indices", Dtype::U8, most),
            ArraySpec::fixed("row_pointers", Dtype::U32, &[layer.rows + 1]),
            ArraySpec::counted("prime_indices", Dtype::U16, most),
            ArraySpec::scales(layer),
        ])
    },
    check_opened,
    matrix: |layer, arrays| {
        let arrays = MdCSRArrays {
            values: arrays.get("values")?,
            delta_indices: arrays.get("delta_indices")?,
            row_pointers: arrays.get("row_pointers")?,
            prime_indices: arrays.get("prime_indices")?,
            scales: arrays.get("scales")?,
        };
        MdCSRMatrix::new(layer.rows, layer.cols, arrays)
    },
};

fn check_opened(layer: &LayerInfo, arrays: &LayerArrays<'_>) -> Result<()> {
    let nnz = arrays.len("values");
    for suffix in ["delta_indices", "prime_indices"] {
        let found = arrays.len(suffix);
        if found != nnz {
            let message = format!("{found} elements for {nnz} values");
            return Err(rules::shape(message).tensor(arrays.name(suffix)));
        }
    }
    stored::check_scales(arrays, layer.rows)?;
    stored::check_pointers(arrays, "row", layer.rows, "values")
}

/// A sparse matrix `[rows, cols]` whose every entry has been checked to lie inside it.
#[derive(Debug, Clone)]
pub struct MdCSRMatrix {
    rows: usize,
    cols: usize,
    arrays: MdCSRArrays,
}

/// The arrays of a [`MdCSRMatrix`], as a file stores them.
#[derive(Debug, Clone)]
pub struct MdCSRArrays {
    /// `[nnz]`; 0 marks padding that bridges a gap of more than 255 columns.
    pub values: Array<i8>,
    /// `[nnz]`; the first of a row counts from column 0, the others from the entry before.
    pub delta_indices: Array<u8>,
    /// `[rows + 1]`; row `r` has the entries `row_pointers[r]..row_pointers[r + 1]`.
    pub row_pointers: Array<u32>,
    /// `[nnz]`, each below 10,000.
    pub prime_indices: Array<u16>,
    /// `[rows]`, finite.
    pub scales: Array<f32>,
}

impl MdCSRMatrix {
    /// Makes a matrix of these arrays. Reads all of them and checks every entry once.
    ///
    /// Errors: `Shape` if the lengths do not fit each other, `Invalid` if row pointers, columns,
    /// prime indices or scales break rules 9 to 12 of the format.
    pub fn new(rows: usize, cols: usize, arrays: MdCSRArrays) -> Result<Self> {
        let nnz = arrays.values.len();
        for (name, len) in [
            ("delta_indices", arrays.delta_indices.len()),
            ("prime_indices", arrays.prime_indices.len()),
        ] {
            rules::length(name, len, &[nnz])?;
        }
        checked_scales(&arrays.scales, rows)?;
        rules::pointers(&arrays.row_pointers, "row", rows, nnz)?;
        let primes = &arrays.prime_indices;
        if let Some(i) = primes.iter().position(|&p| usize::from(p) >= PRIME_COUNT) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "prime index {} of entry {i} is not below {PRIME_COUNT}",
                    primes[i]
                ),
            )
            .rule(rules::PRIME_INDEX));
        }
        let matrix = Self { rows, cols, arrays };
        (0..rows).try_for_each(|row| matrix.check_columns(row))?;
        Ok(matrix)
    }

    fn check_columns(&self, row: usize) -> Result<()> {
        let invalid = |message| Err(Error::new(ErrorKind::Invalid, message).rule(rules::COLUMNS));
        let mut column = 0;
        for (i, &delta) in self.arrays.delta_indices[self.range(row)]
            .iter()
            .enumerate()
        {
            column += usize::from(delta);
            if i > 0 && delta == 0 {
                return invalid(format!("entry {i} of row {row} repeats column {column}"));
            }
            if column >= self.cols {
                return invalid(format!(
                    "entry {i} of row {row} is in column {column} of {}",
                    self.cols
                ));
            }
        }
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of stored entries, padding included.
    pub fn nnz(&self) -> usize {
        self.arrays.values.len()
    }

    /// The arrays, as a file stores them.
    pub fn arrays(&self) -> &MdCSRArrays {
        &self.arrays
    }

    /// Decodes the whole matrix `[rows, cols]` to f32.
    pub fn to_dense(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        if self.cols > 0 {
            self.decode_rows(0, &mut out);
        }
        out
    }

    /// Returns `W x [rows]` for `x [cols]`, accumulated in f32 over the stored entries.
    ///
    /// Errors (`Argument`): `x` has another length.
    pub fn spmv(&self, x: &[f32]) -> Result<Vec<f32>> {
        if x.len() != self.cols {
            return Err(Error::new(
                ErrorKind::Argument,
                format!("a vector of {} for {} columns", x.len(), self.cols),
            ));
        }
        let dot = |row| self.row(row).map(|(column, w)| w * x[column]).sum();
        Ok((0..self.rows).into_par_iter().map(dot).collect())
    }

    fn range(&self, row: usize) -> std::ops::Range<usize> {
        self.arrays.row_pointers[row] as usize..self.arrays.row_pointers[row + 1] as usize
    }

    /// Returns the entries of a row as `(column, weight)`.
    fn row(&self, row: usize) -> impl Iterator<Item = (usize, f32)> {
        let range = self.range(row);
        let scale = self.arrays.scales[row];
        let mut column = 0;
        self.arrays.delta_indices[range.clone()]
            .iter()
            .zip(&self.arrays.values[range.clone()])
            .zip(&self.arrays.prime_indices[range])
            .map(move |((&delta, &value), &prime)| {
                column += usize::from(delta);
                (column, weight(scale, PRIME_LUT[usize::from(prime)], value))
            })
    }
}

impl StoredMatrix for MdCSRMatrix {
    fn entries(&self, row: usize) -> Option<Entries<'_>> {
        let range = self.range(row);
        Some(Entries {
            scale: self.arrays.scales[row],
            values: &self.arrays.values[range.clone()],
            deltas: &self.arrays.delta_indices[range.clone()],
            primes: &self.arrays.prime_indices[range],
        })
    }

    fn size(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn array(&self, suffix: &str) -> Option<&[u8]> {
        let arrays = &self.arrays;
        Some(match suffix {
            "values" => cast_slice(&arrays.values),
            "delta_indices" => &arrays.delta_indices,
            "row_pointers" => cast_slice(&arrays.row_pointers),
            "prime_indices" => cast_slice(&arrays.prime_indices),
            "scales" => cast_slice(&arrays.scales),
            _ => return None,
        })
    }

    fn scales(&self) -> Option<&Array<f32>> {
        Some(&self.arrays.scales)
    }

    fn scales_mut(&mut self) -> Option<&mut Array<f32>> {
        Some(&mut self.arrays.scales)
    }

    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
            out.fill(0.0);
            self.row(first + i).for_each(|(column, w)| out[column] = w);
        }
    }
}

//! MdCSR: memory-efficient delta-compressed sparse rows, the encoding `mdcsr`, and its encoder.
//!
//! A row is a run of entries `(delta, value, prime)`. The column of an entry is the sum of the
//! deltas so far, its weight `scales[row] * PRIME_LUT[prime_index] * value`. A free prime for
//! every entry makes the encoding nearly lossless at 32 bits an entry.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::prime_lut::{LARGEST_PRIME, PRIME_COUNT, PRIME_LUT};
use rayon::prelude::*;
use std::sync::LazyLock;

pub use crate::codec::mdcsr::{MdCSRArrays, MdCSRMatrix};

/// The largest `prime * value`, reached by the largest weight of a row.
const LARGEST_PRODUCT: f64 = LARGEST_PRIME as f64 * i8::MAX as f64;

/// The largest column delta that one entry can hold.
const LARGEST_DELTA: usize = u8::MAX as usize;

impl MdCSRMatrix {
    /// Encodes a dense matrix `[rows, cols]`; zeros are left out and stay exactly zero.
    ///
    /// Cost: about 0.3 microseconds a weight and thread (127 candidates each). Errors: `Shape` if
    /// `weights` is not `rows * cols` long, `Invalid` for a weight that is not finite, `TooLarge`
    /// from 2^32 entries on.
    pub fn from_dense(weights: &[f32], rows: usize, cols: usize) -> Result<Self> {
        if rows.checked_mul(cols) != Some(weights.len()) {
            return Err(rules::shape(format!(
                "{} weights for a matrix [{rows}, {cols}]",
                weights.len()
            )));
        }
        let rows_of_entries = (0..rows).into_par_iter().map(|row| {
            let weights = &weights[row * cols..(row + 1) * cols];
            let entries = weights.iter().enumerate().filter(|(_, w)| **w != 0.0);
            EncodedRow::new(row, entries.map(|(column, &w)| (column, w)))
        });
        Self::collect(rows, cols, rows_of_entries.collect::<Result<_>>()?)
    }

    /// Encodes a matrix in compressed sparse rows: row `r` has the columns
    /// `indices[indptr[r]..indptr[r + 1]]`, ascending, with the weights `data` beside them.
    ///
    /// Errors as for [`MdCSRMatrix::from_dense`], and `Invalid` for pointers or columns that are
    /// not ascending and inside the matrix.
    pub fn from_csr(
        rows: usize,
        cols: usize,
        indptr: &[usize],
        indices: &[usize],
        data: &[f32],
    ) -> Result<Self> {
        let ascending = indptr.windows(2).all(|w| w[0] <= w[1]);
        if indptr.len() != rows + 1
            || !ascending
            || indptr[0] != 0
            || indptr[rows] != indices.len()
            || indices.len() != data.len()
        {
            return Err(rules::shape(format!(
                "{} row pointers, {} columns and {} weights are not {rows} sparse rows",
                indptr.len(),
                indices.len(),
                data.len()
            )));
        }
        let rows_of_entries = (0..rows).into_par_iter().map(|row| {
            let range = indptr[row]..indptr[row + 1];
            let columns = &indices[range.clone()];
            if columns.windows(2).any(|w| w[0] >= w[1])
                || columns.last().is_some_and(|&c| c >= cols)
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("the columns of row {row} are not ascending and below {cols}"),
                ));
            }
            EncodedRow::new(
                row,
                columns.iter().copied().zip(data[range].iter().copied()),
            )
        });
        Self::collect(rows, cols, rows_of_entries.collect::<Result<_>>()?)
    }

    fn collect(rows: usize, cols: usize, encoded: Vec<EncodedRow>) -> Result<Self> {
        let nnz: usize = encoded.iter().map(|row| row.entries.values.len()).sum();
        if u32::try_from(nnz).is_err() {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("{nnz} entries are more than a sparse matrix can point to"),
            ));
        }
        let mut row_pointers = Vec::with_capacity(rows + 1);
        row_pointers.push(0u32);
        let mut end = 0;
        for row in &encoded {
            end += row.entries.values.len() as u32;
            row_pointers.push(end);
        }
        let arrays = MdCSRArrays {
            values: encoded
                .iter()
                .flat_map(|r| r.entries.values.iter().copied())
                .collect::<Vec<_>>()
                .into(),
            delta_indices: encoded
                .iter()
                .flat_map(|r| r.entries.deltas.iter().copied())
                .collect::<Vec<_>>()
                .into(),
            row_pointers: row_pointers.into(),
            prime_indices: encoded
                .iter()
                .flat_map(|r| r.entries.primes.iter().copied())
                .collect::<Vec<_>>()
                .into(),
            scales: encoded.iter().map(|r| r.scale).collect::<Vec<_>>().into(),
        };
        Self::new(rows, cols, arrays)
    }
}

/// One encoded row.
struct EncodedRow {
    scale: f32,
    entries: StoredEntries,
}

impl EncodedRow {
    fn new(row: usize, entries: impl Iterator<Item = (usize, f32)> + Clone) -> Result<Self> {
        let mut largest = 0.0f32;
        for (column, w) in entries.clone() {
            if !w.is_finite() {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("the weight in row {row}, column {column} is {w}"),
                ));
            }
            largest = largest.max(w.abs());
        }
        let scale = ((f64::from(largest) / LARGEST_PRODUCT) as f32).max(f32::MIN_POSITIVE);
        let mut encoded = Self {
            scale,
            entries: StoredEntries::default(),
        };
        let mut last = 0;
        for (column, w) in entries {
            let (value, prime) = nearest_product(f64::from(w) / f64::from(scale));
            if value != 0 {
                encoded.entries.push(column - last, value, prime);
                last = column;
            }
        }
        Ok(encoded)
    }
}

/// Entries as they are stored.
#[derive(Default)]
pub(crate) struct StoredEntries {
    pub values: Vec<i8>,
    pub deltas: Vec<u8>,
    pub primes: Vec<u16>,
}

impl StoredEntries {
    /// Appends an entry `gap` columns after the last one of its row, padded if necessary.
    pub fn push(&mut self, mut gap: usize, value: i8, prime: u16) {
        while gap > LARGEST_DELTA {
            self.push_stored(0, LARGEST_DELTA as u8, 0);
            gap -= LARGEST_DELTA;
        }
        self.push_stored(value, gap as u8, prime);
    }

    fn push_stored(&mut self, value: i8, delta: u8, prime: u16) {
        self.values.push(value);
        self.deltas.push(delta);
        self.primes.push(prime);
    }
}

/// Returns the `(value, prime index)` whose product is nearest to `target`; `(0, 0)` for zero.
///
/// Ties go to the smaller value, so the result depends on `target` only.
fn nearest_product(target: f64) -> (i8, u16) {
    let magnitude = target.abs();
    let mut best = (magnitude, 0i8, 0u16);
    for value in 1..=i8::MAX {
        let quotient = (magnitude / f64::from(value)).round() as usize;
        let prime = NEAREST_PRIME[quotient.min(LARGEST_PRIME as usize)];
        let product = f64::from(PRIME_LUT[usize::from(prime)]) * f64::from(value);
        let error = (product - magnitude).abs();
        if error < best.0 {
            best = (error, value, prime);
        }
    }
    let (_, value, prime) = best;
    (if target < 0.0 { -value } else { value }, prime)
}

/// Index of the nearest prime to every number up to the largest prime of the table.
static NEAREST_PRIME: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let mut index = 0;
    (0..=LARGEST_PRIME)
        .map(|n| {
            let next_is_nearer = |i: usize| PRIME_LUT[i + 1].abs_diff(n) < PRIME_LUT[i].abs_diff(n);
            while index + 1 < PRIME_COUNT && next_is_nearer(index) {
                index += 1;
            }
            index as u16
        })
        .collect()
});

//! Row-by-row builder of a `mdcsr` matrix.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::sparse::{MdCSRArrays, MdCSRMatrix, StoredEntries};

/// Builder of a matrix from entries that already have values and primes, row by row.
pub(super) struct RowBuilder {
    cols: usize,
    entries: StoredEntries,
    row_pointers: Vec<u32>,
    scales: Vec<f32>,
    /// Column of the last entry of this row.
    last: usize,
}

impl RowBuilder {
    /// Creates a matrix without rows.
    pub(super) fn new(cols: usize) -> Self {
        Self {
            cols,
            entries: StoredEntries::default(),
            row_pointers: vec![0],
            scales: Vec::new(),
            last: 0,
        }
    }

    /// Adds an entry to the row, in a later column than the previous ones.
    ///
    /// An entry of value 0 is left out: the weight is 0.
    pub(super) fn push(&mut self, column: usize, value: i8, prime: u16) {
        if value != 0 {
            self.entries.push(column - self.last, value, prime);
            self.last = column;
        }
    }

    /// Ends the row. Errors (`TooLarge`): there are too many entries.
    pub(super) fn end_row(&mut self, scale: f32) -> Result<()> {
        let stored = u32::try_from(self.entries.values.len());
        let stored = stored.map_err(|_| {
            let message = "more than 2^32 - 1 entries, with those that bridge gaps";
            Error::new(ErrorKind::TooLarge, message)
        })?;
        self.row_pointers.push(stored);
        self.scales.push(scale);
        self.last = 0;
        Ok(())
    }

    /// Returns the number of entries so far, including those that bridge gaps.
    pub(super) fn entries(&self) -> usize {
        self.entries.values.len()
    }

    /// Returns the matrix. Errors: those of [`MdCSRMatrix::new`].
    pub(super) fn finish(self) -> Result<MdCSRMatrix> {
        let arrays = MdCSRArrays {
            values: self.entries.values.into(),
            delta_indices: self.entries.deltas.into(),
            row_pointers: self.row_pointers.into(),
            prime_indices: self.entries.primes.into(),
            scales: self.scales.into(),
        };
        MdCSRMatrix::new(arrays.scales.len(), self.cols, arrays)
    }
}

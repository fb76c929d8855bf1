//! Weight matrices in every encoding behind the same few methods.
//!
//! A `Matrix` was validated when it was made: nothing it holds can make a method read out of bounds,
//! so the methods check only what the caller passes.
#![forbid(unsafe_code)]

pub(crate) mod decode;

pub use crate::codec::bitmap::{BITMAP_GROUP, BitmapArrays, BitmapMatrix, WORD};
pub use crate::codec::dense::{DenseMatrix, DenseValues};
pub use crate::codec::grouped::GroupedMatrix;
pub use crate::codec::levels::Levels;
pub use crate::codec::trellis::{TrellisMatrix, TrellisParts};
pub use crate::codec::{strips, trellis};

use crate::array::Array;
use crate::codec::stored::{StoredMatrix, checked_scales};
use crate::codec::strips::STRIP_ROWS;
use crate::cpu::Cpu;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::Kernels;
use crate::sparse::MdCSRMatrix;
use decode::{Decode, Rows};
use rayon::prelude::*;

/// A weight matrix `[rows, cols]` in one of the encodings; multiplies from the right: `W x`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Matrix {
    /// Not compressed: BF16, F16 or F32 values.
    Dense(DenseMatrix),
    /// `mdcsr`.
    MdCsr(MdCSRMatrix),
    /// `q8` and `q4`.
    Grouped(GroupedMatrix),
    /// `s8` and `s4`.
    Bitmap(BitmapMatrix),
    /// Trellis codes of 2, 3 or 4 bits (`t2`, `t3`, `t4`), rotated input.
    Trellis(TrellisMatrix),
}

impl Matrix {
    /// What all encodings have in common.
    pub(crate) fn stored(&self) -> &dyn StoredMatrix {
        match self {
            Self::Dense(m) => m,
            Self::MdCsr(m) => m,
            Self::Grouped(m) => m,
            Self::Bitmap(m) => m,
            Self::Trellis(m) => m,
        }
    }

    fn stored_mut(&mut self) -> &mut dyn StoredMatrix {
        match self {
            Self::Dense(m) => m,
            Self::MdCsr(m) => m,
            Self::Grouped(m) => m,
            Self::Bitmap(m) => m,
            Self::Trellis(m) => m,
        }
    }

    /// What the rows are multiplied by, `[rows]`; `None` for a matrix that is not compressed.
    pub fn scales(&self) -> Option<&Array<f32>> {
        self.stored().scales()
    }

    /// The same codes, in the same memory, with other [`Matrix::scales`].
    ///
    /// Errors: `Argument` for a matrix without any; `Shape` and `Invalid` for scales that no file may have (rule 9).
    pub fn with_scales(&self, scales: Vec<f32>) -> Result<Self> {
        checked_scales(&scales, self.rows())?;
        let mut matrix = self.clone();
        let Some(of_matrix) = matrix.stored_mut().scales_mut() else {
            let message = "scales for a matrix that is not compressed";
            return Err(Error::new(ErrorKind::Argument, message));
        };
        *of_matrix = scales.into();
        Ok(matrix)
    }

    /// Number of rows (outputs).
    pub fn rows(&self) -> usize {
        self.stored().rows()
    }

    /// Number of columns (inputs).
    pub fn cols(&self) -> usize {
        self.stored().cols()
    }

    /// Decodes `n` whole rows from `first` on into `out` (`[n, cols]`, f32, original basis).
    ///
    /// Every element of `out` is overwritten. Errors: `Argument` if `out` is not a whole number of rows, or
    /// they reach past the last row; those of [`Cpu::shared`].
    pub fn rows_into(&self, first: usize, out: &mut [f32]) -> Result<()> {
        self.rows_into_with(Cpu::shared()?.kernels(), first, out)
    }

    /// [`Matrix::rows_into`] with chosen kernels: the same bits whatever they are.
    pub fn rows_into_with(&self, kernels: Kernels, first: usize, out: &mut [f32]) -> Result<()> {
        let (rows, cols) = (self.rows(), self.cols());
        let n = out.len() / cols.max(1);
        if n * cols != out.len() || first.checked_add(n).is_none_or(|end| end > rows) {
            return Err(Error::new(
                ErrorKind::Argument,
                format!(
                    "{} values from row {first} on are not whole rows of [{rows}, {cols}]",
                    out.len()
                ),
            ));
        }
        if out.is_empty() {
            return Ok(());
        }
        self.decode(kernels, first, false, out, &mut Vec::new());
        Ok(())
    }

    /// Row `rows[i]` into row `i` of `out` (`[n, cols]`, f32, original basis), of any rows in any order, in parallel.
    ///
    /// Every element of `out` is overwritten. Errors: `Argument` if `out` has another length, or a row is past the last
    /// one; those of [`Cpu::shared`].
    pub fn gather(&self, rows: &[u32], out: &mut [f32]) -> Result<()> {
        self.gather_on(Cpu::shared()?, rows, out)
    }

    /// [`Matrix::gather`] on a chosen device.
    pub fn gather_on(&self, cpu: &Cpu, rows: &[u32], out: &mut [f32]) -> Result<()> {
        let cols = self.cols();
        let past = rows.iter().find(|&&row| row as usize >= self.rows());
        if past.is_some() || rows.len().checked_mul(cols) != Some(out.len()) {
            return Err(Error::new(
                ErrorKind::Argument,
                format!(
                    "{} values for {} rows of [{}, {cols}]{}",
                    out.len(),
                    rows.len(),
                    self.rows(),
                    past.map_or(String::new(), |row| format!(", one of them number {row}"))
                ),
            ));
        }
        if out.is_empty() {
            return Ok(());
        }
        cpu.team().chunks(out, cols, |i, out| {
            self.decode(cpu.kernels(), rows[i] as usize, false, out, &mut Vec::new());
        });
        Ok(())
    }

    /// Whole rows from `first` on, of which there are some, inside of the matrix; by kernels where there are some for
    /// them, which write past the caches if `streamed`. `scratch` takes rows that are not f32, without one.
    pub(crate) fn decode<T: Decode>(
        &self,
        kernels: Kernels,
        first: usize,
        streamed: bool,
        out: &mut [T],
        scratch: &mut Vec<f32>,
    ) {
        let stored = self.stored();
        let rows = Rows {
            stored,
            rotation: stored.rotation(),
            kernels,
            first,
            streamed,
            scratch,
        };
        T::decode(rows, out);
    }

    /// The whole matrix `[rows, cols]` in f32, original basis. Allocates 4 bytes per weight.
    pub fn to_dense(&self) -> Vec<f32> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut out = vec![0.0; rows * cols];
        if cols > 0 {
            out.par_chunks_mut(STRIP_ROWS * cols)
                .enumerate()
                .for_each(|(strip, out)| {
                    self.rows_into(strip * STRIP_ROWS, out)
                        .expect("whole rows inside the matrix");
                });
        }
        out
    }
}

#[cfg(test)]
mod tests;

//! Weight matrices in any encoding, behind the same few methods.
//!
//! A `Matrix` was validated when it was made: its content cannot make a method read out of bounds.
//! Methods check their arguments only.
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
    /// Uncompressed: BF16, F16 or F32 values.
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
    /// The methods that all encodings have.
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

    /// The scale of each row, `[rows]`; `None` for a matrix that is not compressed.
    pub fn scales(&self) -> Option<&Array<f32>> {
        self.stored().scales()
    }

    /// Returns a matrix with other [`Matrix::scales`]; it shares the codes in memory.
    ///
    /// Errors: `Argument` for a matrix that is not compressed; `Shape` and `Invalid` for scales
    /// that break rule 9.
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

    /// Decodes `n` rows from `first` on into `out` (`[n, cols]`, f32, original basis).
    ///
    /// Every element of `out` is overwritten. Errors: `Argument` if `out` is not a whole number of
    /// rows, or they reach past the last row; those of [`Cpu::shared`].
    pub fn rows_into(&self, first: usize, out: &mut [f32]) -> Result<()> {
        self.rows_into_with(Cpu::shared()?.kernels(), first, out)
    }

    /// Like [`Matrix::rows_into`], with chosen kernels. All kernels give the same bits.
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

    /// Decodes row `rows[i]` into row `i` of `out` (`[n, cols]`, f32, original basis).
    ///
    /// Rows may repeat, in any order; they are decoded in parallel. Every element of `out` is
    /// overwritten. Errors: `Argument` if `out` has another length, or a row is past the last one;
    /// those of [`Cpu::shared`].
    pub fn gather(&self, rows: &[u32], out: &mut [f32]) -> Result<()> {
        self.gather_on(Cpu::shared()?, rows, out)
    }

    /// Like [`Matrix::gather`], on a chosen device.
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

    /// Decodes rows from `first` on into `out`, with kernels where the encoding has them.
    ///
    /// `out` is at least one whole row, and no row is past the last one. Kernels write past the
    /// caches if `streamed`. `scratch` is for rows that are not f32 and have no kernel.
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

    /// Decodes the whole matrix `[rows, cols]` to f32, original basis.
    ///
    /// Allocates 4 bytes a weight. Uses the best kernels of the machine, whatever `UPG_KERNEL` says:
    /// all give the same bits.
    pub fn to_dense(&self) -> Vec<f32> {
        let (rows, cols, kernels) = (self.rows(), self.cols(), Kernels::best());
        let mut out = vec![0.0; rows * cols];
        if cols > 0 {
            out.par_chunks_mut(STRIP_ROWS * cols)
                .enumerate()
                .for_each(|(strip, out)| {
                    self.rows_into_with(kernels, strip * STRIP_ROWS, out)
                        .expect("whole rows inside the matrix");
                });
        }
        out
    }
}

#[cfg(test)]
mod tests;

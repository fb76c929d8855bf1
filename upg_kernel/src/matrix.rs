//! Weight matrices in every encoding behind the same few methods.
//!
//! A `Matrix` was validated when it was made: nothing it holds can make a method read out of bounds,
//! so the methods check only what the caller passes.
#![forbid(unsafe_code)]

pub(crate) mod decode;

pub use crate::codec::bitmap::{BITMAP_GROUP, BitmapArrays, BitmapMatrix, WORD};
pub use crate::codec::dense::{DenseMatrix, DenseValues};
pub use crate::codec::grouped::GroupedMatrix;
pub use crate::codec::trellis::{TrellisMatrix, TrellisParts};
pub use crate::codec::{strips, trellis};

use crate::array::Array;
use crate::codec::stored::{StoredMatrix, checked_scales};
use crate::codec::strips::STRIP_ROWS;
use crate::cpu::Cpu;
use crate::cpu::product::{Scratch, multiply};
use crate::device::Write;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::Kernels;
use crate::sparse::MdCSRMatrix;
use decode::{Decode, Rows};
use rayon::prelude::*;

/// The levels of a packed matrix: int8 values, or 4-bit codes into a table of them.
#[derive(Debug, Clone)]
pub enum Levels {
    /// One int8 level a weight.
    Bytes(Array<i8>),
    /// Two weights a byte.
    Nibbles {
        /// Packed codes.
        codes: Array<u8>,
        /// The 16 levels.
        codebook: Array<i8>,
    },
}

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

    /// What the rows are multiplied by, `[rows]`; `None` for a matrix that is not compressed.
    pub fn scales(&self) -> Option<&Array<f32>> {
        match self {
            Self::Dense(_) => None,
            Self::MdCsr(m) => Some(&m.arrays().scales),
            Self::Grouped(m) => Some(m.scales()),
            Self::Bitmap(m) => Some(&m.arrays().scales),
            Self::Trellis(m) => Some(&m.parts().scales),
        }
    }

    /// The same codes, in the same memory, with other [`Matrix::scales`].
    ///
    /// Errors: `Argument` for a matrix without any; `Shape` and `Invalid` for scales that no file may have (rule 9).
    pub fn with_scales(&self, scales: Vec<f32>) -> Result<Self> {
        checked_scales(&scales, self.rows())?;
        let mut matrix = self.clone();
        let of_matrix = match &mut matrix {
            Self::Dense(_) => {
                let message = "scales for a matrix that is not compressed";
                return Err(Error::new(ErrorKind::Argument, message));
            }
            Self::MdCsr(m) => m.scales_mut(),
            Self::Grouped(m) => m.scales_mut(),
            Self::Bitmap(m) => m.scales_mut(),
            Self::Trellis(m) => m.scales_mut(),
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

    /// `W x` for one vector `x [cols]`; returns `[rows]`, accumulated in f32.
    ///
    /// Errors (`Argument`): `x` has another length.
    pub fn spmv(&self, x: &[f32]) -> Result<Vec<f32>> {
        self.spmm(x, 1)
    }

    /// `W X` for `n` vectors, `x [n, cols]` row by row; returns `[n, rows]`, accumulated in f32.
    ///
    /// Errors (`Argument`): `x` has another length.
    pub fn spmm(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let len = n.checked_mul(self.rows()).ok_or_else(|| {
            Error::new(
                ErrorKind::TooLarge,
                format!("{n} outputs of {} rows", self.rows()),
            )
        })?;
        let mut out = vec![0.0; len];
        self.spmm_into(x, n, &mut out)?;
        Ok(out)
    }

    /// [`Matrix::spmm`] into the caller's `out [n, rows]`; every element is overwritten.
    ///
    /// With few vectors, and kernels for it ([`Kernels`]), packed weights are multiplied as they
    /// are with activations rounded to 14 bits, and `mdcsr` entry by entry in f32; else rows are decoded 64 at a
    /// time, once for all `n` vectors. `docs/numerics.md` says what each way adds to the error. In parallel; the result does not
    /// depend on the number of threads. Scratch: 3 bytes per column and vector or 256 bytes per column and
    /// thread, and 4 more per column and vector where the input is rotated.
    ///
    /// Errors: `Argument` if `x` or `out` has another length; those of [`Cpu::shared`].
    pub fn spmm_into(&self, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        self.spmm_on(Cpu::shared()?, x, n, out)
    }

    /// [`Matrix::spmm_into`] on a chosen device; `docs/numerics.md` says how far the results of kernels differ.
    pub fn spmm_on(&self, cpu: &Cpu, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        let scratch = &mut Scratch::default();
        multiply(cpu, [Some(self)], x, n, Write::Set, scratch, out)
    }
}

#[cfg(test)]
mod tests;

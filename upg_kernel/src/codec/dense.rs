//! Uncompressed weights: BF16, F16 or F32 values as a model file stores them.
#![forbid(unsafe_code)]

use super::stored::StoredMatrix;
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use half::{bf16, f16};

/// The values of a [`DenseMatrix`], row by row.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum DenseValues {
    /// 2 bytes, 8 bits of precision.
    Bf16(Array<bf16>),
    /// 2 bytes, 11 bits of precision.
    F16(Array<f16>),
    /// 4 bytes.
    F32(Array<f32>),
}

impl DenseValues {
    /// Widens every value to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::Bf16(v) => v.iter().map(|v| v.to_f32()).collect(),
            Self::F16(v) => v.iter().map(|v| v.to_f32()).collect(),
            Self::F32(v) => v.to_vec(),
        }
    }
}

/// A dense matrix `[rows, cols]`.
#[derive(Debug, Clone)]
pub struct DenseMatrix {
    rows: usize,
    cols: usize,
    values: DenseValues,
}

impl DenseMatrix {
    /// Makes a matrix of these values, row by row. Errors (`Shape`): not `rows * cols` values.
    pub fn new(rows: usize, cols: usize, values: DenseValues) -> Result<Self> {
        let len = match &values {
            DenseValues::Bf16(v) => v.len(),
            DenseValues::F16(v) => v.len(),
            DenseValues::F32(v) => v.len(),
        };
        if rows.checked_mul(cols) != Some(len) {
            return Err(Error::new(
                ErrorKind::Shape,
                format!("{len} values for a matrix [{rows}, {cols}]"),
            ));
        }
        Ok(Self { rows, cols, values })
    }

    /// The stored values.
    pub fn values(&self) -> &DenseValues {
        &self.values
    }
}

impl StoredMatrix for DenseMatrix {
    fn size(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn array(&self, _suffix: &str) -> Option<&[u8]> {
        None
    }

    fn scales(&self) -> Option<&Array<f32>> {
        None
    }

    fn scales_mut(&mut self) -> Option<&mut Array<f32>> {
        None
    }

    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        let range = first * self.cols..first * self.cols + out.len();
        match &self.values {
            DenseValues::Bf16(v) => widen(&v[range], out, bf16::to_f32),
            DenseValues::F16(v) => widen(&v[range], out, f16::to_f32),
            DenseValues::F32(v) => out.copy_from_slice(&v[range]),
        }
    }
}

fn widen<T: Copy>(values: &[T], out: &mut [f32], to_f32: impl Fn(T) -> f32) {
    for (out, &v) in out.iter_mut().zip(values) {
        *out = to_f32(v);
    }
}

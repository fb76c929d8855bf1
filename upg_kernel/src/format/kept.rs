//! The tensors of a file that are not compressed.
#![forbid(unsafe_code)]

use super::UpgFile;
use super::container::Entry;
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::{DenseMatrix, DenseValues};
use safetensors::Dtype;

impl UpgFile {
    /// An uncompressed matrix, in place. Errors: `Missing`; `Shape` if it has not two dimensions.
    pub fn kept_matrix(&self, name: &str) -> Result<DenseMatrix> {
        let entry = self.kept_entry(name)?;
        let &[rows, cols] = entry.shape else {
            return Err(dimensions(name, &entry, 2));
        };
        DenseMatrix::new(rows, cols, self.kept_values(name, &entry)?).map_err(|e| e.tensor(name))
    }

    /// An uncompressed vector, widened to f32. Errors: `Missing`; `Shape` if it has not one
    /// dimension.
    pub fn kept_vector(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.kept_entry(name)?;
        if entry.shape.len() != 1 {
            return Err(dimensions(name, &entry, 1));
        }
        Ok(self.kept_values(name, &entry)?.to_f32())
    }

    fn kept_entry(&self, name: &str) -> Result<Entry<'_>> {
        self.tensors().entry(name).ok_or_else(|| {
            Error::new(ErrorKind::Missing, "not in the file")
                .tensor(name)
                .at(self.path())
        })
    }

    fn kept_values(&self, name: &str, entry: &Entry<'_>) -> Result<DenseValues> {
        match entry.dtype {
            Dtype::BF16 => Ok(DenseValues::Bf16(self.tensors().array(name)?)),
            Dtype::F16 => Ok(DenseValues::F16(self.tensors().array(name)?)),
            Dtype::F32 => Ok(DenseValues::F32(self.tensors().array(name)?)),
            other => Err(Error::new(
                ErrorKind::Shape,
                format!("{other}, expected BF16, F16 or F32"),
            )
            .tensor(name)),
        }
    }
}

fn dimensions(name: &str, entry: &Entry<'_>, expected: usize) -> Error {
    let message = format!(
        "has the shape {:?}, expected {expected} dimensions",
        entry.shape
    );
    Error::new(ErrorKind::Shape, message).tensor(name)
}

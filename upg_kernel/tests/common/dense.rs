//! Tiny models without a UPG file.

use super::tiny::{collect, model_file};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use upg_kernel::inference::ModelConfig;
use upg_kernel::inference::weights::{WeightSource, shape_mismatch};
use upg_kernel::matrix::{DenseMatrix, DenseValues, Matrix};
use upg_kernel::{Error, ErrorKind, Result};

/// Tolerance for f32 arithmetic in another order; measured: 4e-6 at logits up to 5.
pub(crate) const LOGIT_TOLERANCE: f32 = 3e-5;

/// Weights of a small BF16 safetensors file, uncompressed.
pub(crate) struct DenseSource(Vec<u8>);

impl DenseSource {
    pub(crate) fn open(path: &Path) -> Self {
        Self(std::fs::read(path).expect("a readable test file"))
    }

    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<bf16>> {
        let file = SafeTensors::deserialize(&self.0).expect("a safetensors file");
        let tensor = file
            .tensor(name)
            .map_err(|e| Error::new(ErrorKind::Missing, e.to_string()).tensor(name))?;
        assert_eq!(tensor.dtype(), Dtype::BF16);
        if tensor.shape() != shape {
            return Err(shape_mismatch(name, tensor.shape(), shape));
        }
        Ok(collect(tensor.data()))
    }
}

impl WeightSource for DenseSource {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let values = self.values(name, &[rows, cols])?;
        let values = DenseValues::Bf16(values.into());
        Ok(Matrix::Dense(DenseMatrix::new(rows, cols, values)?))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let values = self.values(name, &[len])?;
        Ok(values.into_iter().map(bf16::to_f32).collect())
    }

    fn contains(&self, name: &str) -> bool {
        let file = SafeTensors::deserialize(&self.0).expect("a safetensors file");
        file.tensor(name).is_ok()
    }
}

/// Reads the config of a tiny model.
pub(crate) fn config(name: &str) -> ModelConfig {
    let text = std::fs::read_to_string(model_file(name, "config.json")).expect("a config");
    ModelConfig::from_json(&text, None).expect("a good config")
}

/// Opens the weights in a folder of a tiny model.
pub(crate) fn source(name: &str) -> DenseSource {
    DenseSource::open(&model_file(name, "model.safetensors"))
}

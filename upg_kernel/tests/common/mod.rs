//! Tiny models without a UPG file.

pub(crate) mod tiny;

use half::bf16;
use safetensors::{Dtype, SafeTensors};
use std::path::Path;
use std::sync::Arc;
use tiny::{MODELS, collect, model_file};
use upg_kernel::inference::weights::{WeightSource, shape_mismatch};
use upg_kernel::inference::{CacheType, Model, ModelConfig, Session, SessionOptions};
use upg_kernel::matrix::{DenseMatrix, DenseValues, Matrix};
use upg_kernel::{Error, ErrorKind, Result};

/// Tolerance for the same arithmetic in other pieces.
///
/// Products with one and with many vectors add up in another order. Measured: 3e-6.
pub(crate) const CUT_TOLERANCE: f32 = 2e-5;

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

pub(crate) fn config(name: &str) -> ModelConfig {
    let text = std::fs::read_to_string(model_file(name, "config.json")).expect("a config");
    ModelConfig::from_json(&text, None).expect("a good config")
}

pub(crate) fn source(name: &str) -> DenseSource {
    DenseSource::open(&model_file(name, "model.safetensors"))
}

pub(crate) fn model(name: &str) -> Arc<Model> {
    let (_, weights) = MODELS.iter().find(|m| m.0 == name).expect("a known model");
    Arc::new(Model::load(config(name), &source(weights)).expect("a good model"))
}

pub(crate) fn session(model: &Arc<Model>) -> Session {
    Session::new(Arc::clone(model), &options()).expect("a session")
}

/// Returns options with unrounded keys and values, as the reference has them.
pub(crate) fn options() -> SessionOptions {
    SessionOptions {
        cache_type: CacheType::F32,
        ..SessionOptions::default()
    }
}

//! Check that the compressed file of a source will run.
#![forbid(unsafe_code)]

use super::{Source, TensorInfo};
use std::collections::HashMap;
use upg_kernel::inference::weights::{HEAD, shape_mismatch};
use upg_kernel::inference::{WeightSource, check_weights};
use upg_kernel::sparse::{MdCSRArrays, MdCSRMatrix};
use upg_kernel::{Error, ErrorKind, Matrix, Result};

/// Checks the texts of a source and, if there is a config, that every required tensor exists.
///
/// A finished file is opened and run with these. A model without a config is only weights. Cost:
/// builds the tokenizer; 12 bytes per row of the largest matrix. Errors: those of
/// [`ModelFiles::check`](crate::source::ModelFiles::check) and of
/// [`Model::load`](upg_kernel::inference::Model::load).
pub fn check_runnable(source: &dyn Source) -> Result<()> {
    let files = source.files();
    files.check()?;
    if files.config_json.is_none() {
        return Ok(());
    }
    let tensors = source.tensors().iter();
    let shapes = Shapes(
        tensors
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect(),
    );
    check_weights(&files.config()?, &shapes).map_err(|e| {
        match e.tensor_name() {
            Some(HEAD) if e.kind() == ErrorKind::Missing => return e,
            _ => {}
        }
        e.hint("the weights are not those of this config: pass all of them, with the config that belongs to them")
    })
}

/// Shapes of the tensors of a source.
struct Shapes<'a>(HashMap<&'a str, &'a TensorInfo>);

impl Shapes<'_> {
    fn check(&self, name: &str, expected: &[usize]) -> Result<()> {
        let tensor = self.0.get(name).ok_or_else(|| {
            let message = match name {
                HEAD => "the config does not tie the output head to the embeddings, and it is missing",
                _ => "the config requires this tensor, which is missing",
            };
            let error = Error::new(ErrorKind::Missing, message).tensor(name);
            match name {
                HEAD => error.hint("download all weight files; or set tie_word_embeddings to true in config.json if the model has no head of its own"),
                _ => error,
            }
        })?;
        match tensor.shape == expected {
            true => Ok(()),
            false => Err(shape_mismatch(name, &tensor.shape, expected)),
        }
    }
}

impl WeightSource for Shapes<'_> {
    /// Returns a matrix of zeros in place of one that has the right shape.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        self.check(name, &[rows, cols])?;
        let zeros = MdCSRArrays {
            values: Vec::new().into(),
            delta_indices: Vec::new().into(),
            row_pointers: vec![0; rows + 1].into(),
            prime_indices: Vec::new().into(),
            scales: vec![0.0; rows].into(),
        };
        Ok(Matrix::MdCsr(MdCSRMatrix::new(rows, cols, zeros)?))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.check(name, &[len])?;
        Ok(vec![0.0; len])
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

//! Stub of [`MetalSpMV`] for systems without Metal: it can be named, but not created.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use candle_core::Tensor;
use std::convert::Infallible;

/// Products of compressed matrices with vectors on an Apple GPU,
/// which this system does not have.
///
/// There is no value of this type here. On macOS and iOS it also has `load`, `vector` and `pass`,
/// for many products at once.
pub struct MetalSpMV(Infallible);

impl MetalSpMV {
    /// Always returns an error on this system.
    ///
    /// Errors (`Unsupported`): always.
    pub fn new() -> Result<Self> {
        let message = format!(
            "there is no Metal on {}, only on macOS and iOS",
            std::env::consts::OS
        );
        Err(Error::new(ErrorKind::Unsupported, message).hint("multiply on the CPU: `Matrix::spmv`"))
    }

    /// Computes `W x`; can never be called, because no value exists.
    pub fn execute(&self, _matrix: &Matrix, _vector: &Tensor) -> Result<Tensor> {
        match self.0 {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_metal_spmv_says_that_there_is_no_metal() {
        let e = MetalSpMV::new().err().expect("no Metal here");
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert!(e.to_string().contains("no Metal on linux") || !cfg!(target_os = "linux"));
    }
}

//! [`MetalSpMV`] on a system without Metal: it can be named and asked for, and says that there is none.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use candle_core::Tensor;
use std::convert::Infallible;

/// Products of compressed matrices with vectors on an Apple GPU, which this system does not have: there is no value of
/// this type here. On macOS and iOS it also has `load`, `vector` and `pass`, for many products at once.
pub struct MetalSpMV(Infallible);

impl MetalSpMV {
    /// Errors (`Unsupported`): always, on this system.
    pub fn new() -> Result<Self> {
        let message = format!(
            "there is no Metal on {}, only on macOS and iOS",
            std::env::consts::OS
        );
        Err(Error::new(ErrorKind::Unsupported, message).hint("multiply on the CPU: `Matrix::spmv`"))
    }

    /// `W x`; never called, for want of a value to call it on.
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

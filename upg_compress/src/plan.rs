//! Decides how each tensor of a model is stored.
#![forbid(unsafe_code)]

pub(crate) mod budget;
pub(crate) mod sparsity;
pub(crate) mod tensors;

pub use budget::{Budget, counted};
pub use sparsity::{Sparse, Zeros};
pub use tensors::{Choice, CompressOptions, Override};

//! Plan: the encoding of each tensor of a model.
#![forbid(unsafe_code)]

pub(crate) mod budget;
pub(crate) mod options;
pub(crate) mod recipe;
pub(crate) mod sizes;
pub(crate) mod sparsity;
pub(crate) mod tensors;

pub use budget::count_encodings;
pub use options::{Budget, Choice, CompressOptions, Override};
pub use sparsity::Sparse;

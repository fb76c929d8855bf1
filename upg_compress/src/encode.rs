//! Encoders: from the weights of a matrix to codes and scales.
//!
//! [`round_q8`] and its siblings make `q8 q4 s8 s4`, [`trellis`] `t2 t3 t4`. The encoder of
//! `mdcsr` is [`upg_kernel::sparse::MdCSRMatrix::from_dense`].

mod bitmap;
pub(crate) mod encoder;
mod grouped;
pub(crate) mod matrix;
mod mdcsr;
pub(crate) mod panel;
pub(crate) mod prune;
pub(crate) mod rotation;
pub(crate) mod rounding;
pub mod trellis;

pub use bitmap::{round_s4, round_s8};
pub use grouped::{round_q4, round_q8};
pub use matrix::{encode_matrix, relative_error};
pub use prune::prune;
pub use rotation::{hadamard_size, rotation};

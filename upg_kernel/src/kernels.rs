//! The arithmetic kernels: plain loops, and a blocked matrix product for many vectors at once.

pub mod gemm;
pub mod scalar;

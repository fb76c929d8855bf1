//! Matrix-vector products on Apple GPUs: the kernels of `kernels/spmv.metal`, and their
//! callers.
//!
//! - [`source`] is the text of the kernels, [`KERNELS`] their names.
//! - [`Plan`] lists the kernel calls that multiply a matrix, with buffers, arguments and threads.
//!   It is independent of a device, so that the tests can run it on any system, on a CPU.
//! - With the feature `metal`, `MetalSpMV` runs plans on the GPU, and so does [`crate::UpgLinear`]
//!   on candle's Metal device.
//!
//! `docs/gpu.md` says what was checked, and how; **no Apple GPU has run this yet**.

#[cfg(all(feature = "metal", not(target_vendor = "apple")))]
#[path = "metal_kernels/absent.rs"]
mod spmv;

mod args;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod candle;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod gpu;
#[cfg(any(test, all(feature = "metal", target_vendor = "apple")))]
mod hazards;
mod plan;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
mod spmv;
#[cfg(test)]
mod tests;

pub use args::{RotateArgs, SparseArgs, StripArgs};
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub(crate) use candle::OnMetal;
pub use plan::{Dispatch, Element, Operand, Plan, SparseKernel, Weights};
#[cfg(feature = "metal")]
pub use spmv::MetalSpMV;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
pub use spmv::{MetalFloat, MetalMatrix, MetalPass, MetalVector};

/// Names of all kernels of [`source`].
///
/// Matrix kernels also exist with `_batch`, for four vectors at once.
/// Each name ends with the input type.
pub const KERNELS: [&str; 39] = [
    "mdcsr_row_f32",
    "mdcsr_row_f16",
    "mdcsr_row_shared_f32",
    "mdcsr_row_shared_f16",
    "mdcsr_row_batch_f32",
    "mdcsr_row_batch_f16",
    "mdcsr_simd_f32",
    "mdcsr_simd_f16",
    "q8_f32",
    "q8_f16",
    "q8_batch_f32",
    "q8_batch_f16",
    "q4_f32",
    "q4_f16",
    "q4_batch_f32",
    "q4_batch_f16",
    "s8_f32",
    "s8_f16",
    "s8_batch_f32",
    "s8_batch_f16",
    "s4_f32",
    "s4_f16",
    "s4_batch_f32",
    "s4_batch_f16",
    "t2_f32",
    "t2_f16",
    "t2_batch_f32",
    "t2_batch_f16",
    "t3_f32",
    "t3_f16",
    "t3_batch_f32",
    "t3_batch_f16",
    "t4_f32",
    "t4_f16",
    "t4_batch_f32",
    "t4_batch_f16",
    "rotate_block_f32",
    "rotate_block_f16",
    "rotate_across",
];

/// Returns the kernels in the Metal Shading Language as one text, with the includes of
/// `spmv.metal` expanded.
pub fn source() -> String {
    const INCLUDE: &str = "#include \"spmv_args.h\"\n";
    // Allowed only in an included file.
    let args = include_str!("../kernels/spmv_args.h").replace("#pragma once\n", "");
    include_str!("../kernels/spmv.metal").replace(INCLUDE, &args)
}

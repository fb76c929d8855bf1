//! UPG: compressed language models, read in place from one memory-mapped `.safetensors` file.
//!
//! The file format is specified in `upg_format_v2.md`. Files are written by the `upg_compress`
//! crate or the `upg` command.
//!
//! # Generate text
//!
//! ```no_run
//! # fn main() -> upg_kernel::Result<()> {
//! let model = upg_kernel::UPGModel::from_file("models/smollm2.safetensors")?;
//! println!("{}", model.generate("The capital of France is", 20)?);
//! # Ok(())
//! # }
//! ```
//!
//! [`UPGModel::generate`] is greedy and stateless. [`UPGModel::scheduler`] serves everything else:
//! sampling, streaming, conversations, and many requests at once. [`UPGModel::generate_batch`]
//! continues several prompts.
//!
//! # Decompress or multiply single matrices
//!
//! ```no_run
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_kernel::UPGDecompressor;
//!
//! let file = UPGDecompressor::from_safetensors("models/smollm2.safetensors")?;
//! let tensor = file.decompress_layer("model.layers.0.mlp.down_proj.weight")?; // BF16 [rows, cols]
//! let (info, matrix) = file.layer(0)?;
//! let y = matrix.spmv(&vec![1.0; info.cols])?; // W x, without rebuilding W
//! # assert_eq!((tensor.dims().len(), y.len()), (2, info.rows));
//! # Ok(())
//! # }
//! ```
//!
//! Matrices need no file:
//!
//! ```
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_kernel::sparse::MdCSRMatrix;
//!
//! let w = [0.5, 0.0, 0.0, -2.0, 0.0, 1.0];
//! let matrix = MdCSRMatrix::from_dense(&w, 2, 3)?;
//! assert_eq!(matrix.nnz(), 3);
//! let y = matrix.spmv(&[1.0, 1.0, 1.0])?;
//! assert!((y[0] - 0.5).abs() < 1e-4 && (y[1] + 1.0).abs() < 1e-4);
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! - [`UPGModel`]: a whole model. [`inference`] has its parts: config, tokenizer, chat template,
//!   decoder, KV cache, sampling and [`mod@inference::evaluate`].
//! - [`UPGDecompressor`]: layers as candle tensors, or decoded into the caller's buffer.
//! - [`UpgLinear`]: a candle layer with compressed weights.
//! - [`mod@format`]: opening, validating and writing files. `v1`: version 1 files.
//! - [`matrix`], [`sparse`], [`rotation`], [`prime_lut`]: the encodings. All decode by one formula,
//!   `scale * prime * value`.
//! - [`kernels`]: CPU kernels. [`metal_kernels`]: products on Apple GPUs.
//! - [`support`]: files and memory, for the sister crates.
//!
//! # Features
//!
//! Without any feature the crate opens, validates and writes files, decodes and multiplies
//! matrices, and runs the decoder on token ids ([`inference::Model`], [`inference::Session`],
//! [`inference::Sampler`]).
//!
//! | feature | adds |
//! |---|---|
//! | `candle` (default) | layers as tensors, [`UpgLinear`], logits of [`UPGModel`] as a tensor |
//! | `text` (default) | tokenizer, chat template, [`UPGModel`] |
//! | `metal` | products on Apple GPUs; enables `candle`; elsewhere it builds and reports no Metal |
//! | `v1` | version 1 files, Python pickles |
//!
//! # Guarantees
//!
//! **Safety.** A file is untrusted. It is validated when it is opened and when a layer is first
//! used (the format document lists the checks). After that nothing in it can cause an out-of-bounds
//! read. This holds as long as nobody changes a mapped file in place ([`MappedFile`] describes what
//! happens then). With [`OpenOptions::in_memory`] a file is read and verified instead of mapped.
//!
//! **Damage.** Only [`format::UpgFile::verify`] detects damaged weights.
//!
//! **Errors.** Every error is an [`Error`]: one line with the file, the tensor and the broken rule.
//!
//! **Precision.** Arithmetic is on the CPU, in f32 or equally precise (`docs/numerics.md`). Results
//! do not depend on the number of threads.
//!
//! **Threads.** Matrix products and the forward pass run on a process-wide pool, sized like rayon's
//! global pool when the first product is computed. Everything else uses rayon. The pool serves one
//! caller at a time. Forward passes take turns of some milliseconds if the pool has more than two
//! threads. Any other product that comes while the pool is busy is computed by its caller alone.

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(target_endian = "big")]
compile_error!("UPG maps little-endian files in place: big-endian targets are not supported");

#[cfg(not(target_pointer_width = "64"))]
compile_error!("UPG maps files of many gigabytes: only 64-bit targets are supported");

// Test helpers refer to the crate by its public name.
#[cfg(test)]
extern crate self as upg_kernel;

mod array;
mod atomic_file;
mod codec;
mod cpu;
mod device;
mod error;
mod files;
pub mod format;
pub mod inference;
pub mod kernels;
mod mapped;
pub mod matrix;
mod memory;
pub mod metal_kernels;
pub mod prime_lut;
pub mod rotation;
pub mod sparse;
pub mod support;
#[cfg(test)]
mod test_data;
mod text;
pub mod trellis_code;
mod upg_decompress;
#[cfg(feature = "candle")]
mod upg_linear;
#[cfg(feature = "v1")]
pub mod v1;

pub use array::Array;
pub use cpu::Cpu;
pub use error::{Error, ErrorKind, Result};
#[cfg(feature = "text")]
pub use inference::UPGModel;
pub use mapped::{MappedFile, OpenOptions};
pub use matrix::Matrix;
pub use upg_decompress::{LayerId, UPGDecompressor, WeightFloat, reconstruct_weight};
#[cfg(feature = "candle")]
pub use upg_linear::UpgLinear;

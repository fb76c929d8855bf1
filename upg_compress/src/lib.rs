//! Writer of UPG files: reads a model, encodes its weights and writes them to one file.
//!
//! ```no_run
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_compress::{Choice, CompressOptions, compress, open};
//! use upg_kernel::format::Encoding;
//!
//! // A Hugging Face directory or a GGUF file.
//! let source = open("SmolLM2-135M-Instruct/")?;
//! let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
//! options.overrides = vec!["*.down_proj.weight=t4".parse()?];
//! let report = compress(source.as_ref(), "smollm2-t3.safetensors", &options, &())?;
//! println!("{:.2} bits per weight", report.bits_per_weight());
//! # Ok(())
//! # }
//! ```
//!
//! The encoders also work on plain slices:
//!
//! ```
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_compress::encode::round_q8;
//! use upg_kernel::Matrix;
//!
//! let (rows, cols, group) = (2, 100, 64);
//! let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.37).sin()).collect();
//! let matrix = Matrix::Grouped(round_q8(&weights, rows, cols, group, None)?);
//! let decoded = matrix.to_dense();
//! assert!(weights.iter().zip(&decoded).all(|(a, b)| (a - b).abs() < 0.01));
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! Each module uses only the ones above it:
//!
//! - [`source`]: models as Hugging Face directories, GGUF files, version 1 files or random weights,
//!   behind one trait.
//! - [`sensitivity`]: the effect of errors in each matrix on the predictions of the model, measured
//!   on a text ([`Calibration`]).
//! - [`encode`]: the encoders, from floats to codes.
//! - `plan`: the encoding of each tensor. [`CompressOptions`] choose it, also under a [`Budget`].
//! - `job`: the work itself. [`compress()`] writes one file, tensor by tensor, and can resume a
//!   stopped run; [`Preflight`] estimates size, memory and time; [`CompressReport`] has the
//!   results. [`compress_random`] quickly writes files of random models.
//!
//! [`tune()`] improves the scales of a finished file; [`export()`] converts it back to a Hugging
//! Face directory.
//!
//! # Reproducibility
//!
//! The bytes of a file depend on the source and the options, not on the number of threads or the
//! instruction set. With a calibration text they depend on the machine too: the inputs of the
//! matrices are sums in f32, whose order depends on instruction set and caches.

pub mod encode;
mod export;
mod job;
mod plan;
mod progress;
pub mod sensitivity;
pub mod source;
mod tune;

pub use export::export;
pub use job::{
    CalibrationReport, CompressReport, MemoryEstimate, Preflight, TensorGroup, TensorReport, Zeros,
};
pub use job::{compress, compress_checked, compress_random, partial_files};
pub use plan::{Budget, Choice, CompressOptions, Override, Sparse, count_encodings};
pub use progress::Progress;
pub use sensitivity::Calibration;
pub use source::{Source, open, open_with};
pub use tune::{TuneOptions, TuneReport, tune};

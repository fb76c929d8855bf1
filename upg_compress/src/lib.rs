//! Makes UPG files: reads models, rounds their weights and writes them as one file.
//!
//! ```no_run
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_compress::compress::compress;
//! use upg_compress::plan::{Choice, CompressOptions};
//! use upg_compress::source;
//! use upg_kernel::format::Encoding;
//!
//! // A Hugging Face directory or a GGUF file.
//! let source = source::open("SmolLM2-135M-Instruct/")?;
//! let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
//! options.overrides = vec!["*.down_proj.weight=t4".parse()?];
//! let report = compress(source.as_ref(), "smollm2-t3.safetensors", &options, &())?;
//! println!("{:.2} bits per weight", report.bits_per_weight());
//! # Ok(())
//! # }
//! ```
//!
//! The encoders work on plain slices as well:
//!
//! ```
//! # fn main() -> upg_kernel::Result<()> {
//! use upg_compress::rounding::round_q8;
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
//! # What is where
//!
//! - [`source`]: models as Hugging Face directories, GGUF files or random weights, behind one trait;
//!   [`gguf_tokenizer`] rebuilds `tokenizer.json` from a GGUF file.
//! - [`plan`]: which tensor gets which encoding; [`budget`]: under a budget; [`zeros`]: where there are many zeros.
//! - [`rounding`] (`q8 q4 s8 s4`) and [`trellis`] (`t2 t3 t4`): the encoders. That of `mdcsr` is
//!   [`upg_kernel::sparse::MdCSRMatrix::from_dense`].
//! - [`mod@compress`]: all of it, tensor by tensor, into one file. [`export`] goes back to a Hugging
//!   Face directory.
//! - [`preflight`]: what it will take; [`resume`]: going on after a stop; [`report`]: what it gave.
//! - [`mod@compress_random`]: files of random models in little time, to measure with.
//!
//! - [`pruning`]: weights that can go.
//! - [`calibration`], [`curvature`] and [`hessian`]: what errors of each matrix change the predictions of the model by, for
//!   rounding that keeps these.
//! - [`original`]: a source, run as it is.
//!
//! Without a calibration text only the weights are looked at. The bytes of a file depend on the source and
//! the options, never on the number of threads or the instruction set; with a calibration text on the machine
//! too: the inputs of the matrices are sums in f32, whose order follows instruction set and caches.

mod batches;
pub mod budget;
pub mod calibration;
pub mod compress;
pub mod compress_random;
pub mod curvature;
pub mod export;
pub mod gguf_tokenizer;
pub mod hessian;
mod journal;
pub mod original;
pub mod plan;
pub mod preflight;
pub mod progress;
pub mod pruning;
pub mod report;
pub mod resume;
pub mod rounding;
pub mod source;
pub mod trellis;
pub mod tuning;
pub mod zeros;

//! Makes UPG files: reads models, rounds their weights and writes them as one file.
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
//! The encoders work on plain slices as well:
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
//! # What is where
//!
//! - [`source`]: models as Hugging Face directories, GGUF files, files of version 1 or random weights, behind one trait.
//! - [`CompressOptions`]: how each tensor is stored, also under a [`Budget`] or where there are many zeros.
//! - [`sensitivity`]: how much errors of each matrix change the predictions of the model, from a run over a text.
//! - [`encode`]: the encoders.
//! - [`compress()`]: all of it, tensor by tensor, into one file. [`Preflight`] estimates its size, memory and time; a run
//!   that was stopped resumes.
//! - [`tune()`] improves the scales of a finished file; [`export()`] goes back to a Hugging Face directory;
//!   [`compress_random`] makes files of random models in little time, to measure with.
//!
//! Without a calibration text only the weights are looked at. The bytes of a file depend on the source and
//! the options, never on the number of threads or the instruction set; with a calibration text on the machine
//! too: the inputs of the matrices are sums in f32, whose order follows instruction set and caches.

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

//! Tests of the format and the decoder through the public interface.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod backward;
#[cfg(feature = "candle")]
mod bad_files;
mod batch;
mod common;
#[cfg(feature = "candle")]
#[path = "../draft/mod.rs"]
mod draft;
mod format_spec;
mod logit_file;
mod tiny_models;
#[cfg(all(feature = "candle", feature = "text", feature = "v1"))]
mod v1;

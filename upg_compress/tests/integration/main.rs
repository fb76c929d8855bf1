//! Tests from the source of a model to its text.
//!
//! Some need `UPG_TEST_GGUF`, the path of SmolLM2-135M-Instruct as GGUF; `./test.sh` downloads it
//! and sets the variable.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod calibration;
mod common;
mod decompress_accuracy;
mod directories;
mod gguf_tokenizer;
mod regressions;
mod resume;
mod rounding;
mod scheduler;
mod smollm2;
mod sparse;
mod tiny_models;
mod tuning;

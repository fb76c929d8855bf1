//! The real `upg` command: its output, files and exit codes, on terminals and under signals.
//!
//! Some tests need `UPG_TEST_GGUF`, the path of SmolLM2-135M-Instruct as GGUF; `./test.sh`
//! downloads it and sets the variable.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod bench;
mod commands;
mod common;
#[path = "../../../upg_hub/tests/common/mirror.rs"]
mod mirror;
#[cfg(unix)]
mod model_files;
mod models;
mod resume;
#[cfg(unix)]
mod terminal;

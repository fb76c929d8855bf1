//! Commands of `upg`, one module each.
#![forbid(unsafe_code)]

pub mod bench;
pub mod chat;
pub mod completions;
pub mod compress;
pub mod convert;
pub mod decompress;
pub mod eval;
mod generation;
pub mod inspect;
mod inspect_v1;
mod kinds;
pub mod list;
pub mod man;
mod model_file;
pub mod originals;
pub mod pull;
pub mod report;
pub mod rm;
pub mod run;
pub mod show;
pub mod tune;
pub mod verify;

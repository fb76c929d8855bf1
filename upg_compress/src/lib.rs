//! Makes UPG files: reads models, rounds their weights and writes them as one file.

pub mod compress;
pub mod export;
pub mod gguf_tokenizer;
pub mod plan;
pub mod rounding;
pub mod source;
pub mod trellis;

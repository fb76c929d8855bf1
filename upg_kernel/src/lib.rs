//! UPG: compressed language models, read in place from one memory-mapped `.safetensors` file.

#[cfg(target_endian = "big")]
compile_error!("UPG maps little-endian files in place: big-endian targets are not supported");

mod array;
mod error;
pub mod format;
pub mod inference;
pub mod kernels;
mod mapped;
pub mod matrix;
pub mod prime_lut;
pub mod rotation;
pub mod sparse;
mod upg_decompress;

pub use array::Array;
pub use error::{Error, ErrorKind, Result};
pub use inference::UPGModel;
pub use mapped::MappedFile;
pub use matrix::Matrix;
pub use upg_decompress::{LayerId, UPGDecompressor, WeightFloat, reconstruct_weight};

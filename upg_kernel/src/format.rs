//! The UPG file, version 2: `upg_format_v2.md` in code.
#![forbid(unsafe_code)]

mod checksum;
mod checksums;
pub mod container;
mod header;
mod index;
pub mod json;
mod kept;
pub(crate) mod rules;
mod sizes;
pub(crate) mod tensors;
mod writer;

pub use crate::codec::encoding::Encoding;
pub use crate::codec::layer::LayerInfo;
pub use checksum::data as checksum_of;
pub use header::UpgFile;
#[cfg(feature = "v1")]
pub(crate) use header::begins_as_pickle;
pub use rules::{MAX_TOKENIZER_BYTES, TOKENIZER, tokenizer_bytes as check_tokenizer_bytes};
pub use writer::{
    ALIGNMENT as TENSOR_ALIGNMENT, FileWriter, WrittenArray, check_kept_name, header_bytes,
    header_capacity, insert_figures, reserve_figures,
};

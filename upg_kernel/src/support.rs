//! Files, memory and displayed text, for the sister crates `upg_compress` and `upg_cli`.
//!
//! This module has no stability guarantee: any version may change it.
#![forbid(unsafe_code)]

pub use crate::atomic_file::{
    AtomicFile, is_at, open_regular_file, refuse_to_overwrite, sync_folder_of,
};
pub use crate::files::{MAX_PARTS, PartName, folder_of, open_regular, read_at_most};
pub use crate::mapped::{MAPPED_PATH_BYTES, mapped_path_at};
pub use crate::memory::{peak_memory, sum_words};
pub use crate::text::{Shown, steers};

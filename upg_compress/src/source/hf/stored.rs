//! Tensors of a directory as listed in the headers of its weight files.
#![forbid(unsafe_code)]

use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use upg_kernel::Result;

/// Tensor as listed in a shard's header.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// Stored tensors by name.
pub(super) type Tensors = BTreeMap<String, Stored>;

/// Accessor of the bytes of a stored tensor in its shard.
pub(super) type Bytes<'f, 'a> = &'f dyn Fn(&Stored) -> Result<&'a [u8]>;

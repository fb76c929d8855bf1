//! The tensors of a directory as the headers of its weight files list them.
#![forbid(unsafe_code)]

use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use upg_kernel::Result;

/// A tensor as a shard's header lists it.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// Stored tensors by name.
pub(super) type Tensors = BTreeMap<String, Stored>;

/// The bytes of a stored tensor, in its shard.
pub(super) type Bytes<'f, 'a> = &'f dyn Fn(&Stored) -> Result<&'a [u8]>;

//! Weights in the formats of the Python package `compressed-tensors`: sparse with a bitmask,
//! or packed integers.
//!
//! `config.json` names the format. `sparse-bitmask` and `sparse-24-bitmask` (up to version 0.12 of
//! the package) and `pack-quantized` are supported; all others are refused by name. One weight
//! consists of several tensors, which [`bitmask`] and [`packed`] describe.
#![forbid(unsafe_code)]

mod bitmask;
mod config;
mod packed;
mod parts;

pub(super) use bitmask::Bitmask;
pub(super) use config::{Compression, without_compression};
pub(super) use packed::Packed;

use super::stored::{Bytes, Stored, Tensors};
use crate::source::model::FloatType;
use config::SparseFormat;
use parts::{HINT, WeightTensors};
use upg_kernel::{Error, ErrorKind, Result};

/// Storage of a tensor. All bytes are inside their shards and match the shape,
/// as checked at open.
#[derive(Debug, Clone)]
pub(super) enum Storage {
    Plain(FloatType, Stored),
    Bitmask(Box<Bitmask>),
    Packed(Box<Packed>),
}

/// Weight that was assembled from its tensors.
pub(super) struct Gathered {
    pub name: String,
    pub shape: Vec<usize>,
    pub storage: Storage,
}

/// Suffixes of the tensors of a sparse weight, after its name or that of its module.
const SPARSE: [&str; 4] = [".bitmask", ".compressed", ".shape", ".row_offsets"];

/// Suffixes of the tensors of a packed weight, after the name of its module.
const PACKED: [&str; 5] = [
    ".weight_packed",
    ".weight_shape",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
];

/// Suffixes of other tensors of a quantized model, all of which change the computation.
const OTHERS: [&str; 9] = [
    ".weight_global_scale",
    ".input_scale",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".k_scale",
    ".v_scale",
    ".q_scale",
];

impl Compression {
    /// Removes the tensors of compressed weights from `stored` and assembles the weights.
    ///
    /// The remaining tensors are plain. Reads only the small tensors: shapes, and the group of each
    /// column. Errors: `Missing` for a weight that lacks one of its tensors; `Shape` and `Invalid`
    /// for inconsistent tensors; `Unsupported` for tensors that the config does not announce.
    pub(super) fn gather(
        &self,
        stored: &mut Tensors,
        bytes: Bytes<'_, '_>,
    ) -> Result<Vec<Gathered>> {
        let mut gathered = Vec::new();
        if let Some(sparse) = self.sparse {
            for stem in stems(stored, SPARSE[0]) {
                let suffixes = match sparse {
                    SparseFormat::Any => &SPARSE[..],
                    SparseFormat::TwoOfFour => &SPARSE[..3],
                };
                let parts = WeightTensors::take(stored, &stem, suffixes);
                // Versions up to 0.5 compress every parameter under its full name, later ones
                // weights under that of their module.
                let name = match stem.ends_with(".weight") || stem.ends_with(".bias") {
                    true => stem,
                    false => format!("{stem}.weight"),
                };
                let found = Bitmask::new(&parts, sparse, bytes).map_err(|e| e.tensor(&name))?;
                let (shape, storage) = (found.shape(), Storage::Bitmask(Box::new(found)));
                gathered.push(Gathered {
                    name,
                    shape,
                    storage,
                });
            }
        }
        if !self.schemes.is_empty() {
            for stem in stems(stored, PACKED[0]) {
                let parts = WeightTensors::take(stored, &stem, &PACKED);
                let name = format!("{stem}.weight");
                let found =
                    Packed::new(&parts, &self.schemes, bytes).map_err(|e| e.tensor(&name))?;
                let (shape, storage) = (found.shape(), Storage::Packed(Box::new(found)));
                gathered.push(Gathered {
                    name,
                    shape,
                    storage,
                });
            }
        }
        for name in stored.keys() {
            let ends = |suffix: &&&str| name.ends_with(**suffix);
            if SPARSE
                .iter()
                .chain(&PACKED)
                .chain(&OTHERS)
                .any(|s| ends(&s))
            {
                let message = "belongs to no weight that could be assembled";
                return Err(Error::new(ErrorKind::Unsupported, message)
                    .tensor(name)
                    .hint(HINT));
            }
        }
        if let Some(twice) = gathered.iter().find(|g| stored.contains_key(&g.name)) {
            let message = "is stored twice, compressed and plainly";
            return Err(Error::new(ErrorKind::Invalid, message).tensor(&twice.name));
        }
        let mut names: Vec<&str> = gathered.iter().map(|g| g.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            let message = "is stored twice, under its own name and that of its module";
            return Err(Error::new(ErrorKind::Invalid, message).tensor(twice[0]));
        }
        Ok(gathered)
    }
}

/// Returns the names before `suffix`.
fn stems(stored: &Tensors, suffix: &str) -> Vec<String> {
    let stems = stored.keys().filter_map(|name| name.strip_suffix(suffix));
    stems.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests;

//! Weights as the Python package `compressed-tensors` stores them: sparse with a bit for each weight, or as packed integers.
//!
//! `config.json` says which. Its formats `sparse-bitmask` and `sparse-24-bitmask` (up to version 0.12 of the package) and
//! `pack-quantized` are read; all others are refused by their name. One weight is several tensors:
//! [`bitmask`] and [`packed`] say which.
#![forbid(unsafe_code)]

mod bitmask;
mod config;
mod packed;

pub(super) use bitmask::Bitmask;
pub(super) use config::{Compression, without_compression};
pub(super) use packed::Packed;

use super::{FloatType, Place, Stored, Tensors};
use config::Sparse;
use safetensors::Dtype;
use upg_kernel::{Error, ErrorKind, Result};

/// The bytes of a stored tensor, in its shard.
pub(super) type Bytes<'f, 'a> = &'f dyn Fn(&Stored) -> Result<&'a [u8]>;

/// A weight that was put together from its tensors.
pub(super) struct Gathered {
    pub name: String,
    pub shape: Vec<usize>,
    pub place: Place,
}

/// What the tensors of a sparse weight are called, after its name or that of its module.
const SPARSE: [&str; 4] = [".bitmask", ".compressed", ".shape", ".row_offsets"];

/// What the tensors of a packed weight are called, after the name of its module.
const PACKED: [&str; 5] = [
    ".weight_packed",
    ".weight_shape",
    ".weight_scale",
    ".weight_zero_point",
    ".weight_g_idx",
];

/// What else a quantized model may have, all of which changes what is computed.
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
    /// Takes the tensors of compressed weights out of `stored` and puts the weights together. What is left is stored
    /// plainly.
    ///
    /// Reads the small ones among them only: shapes, and which column belongs to which group.
    /// Errors: `Missing` for a weight that lacks one of its tensors; `Shape` and `Invalid` for those that do not agree;
    /// `Unsupported` for what the config does not announce.
    pub(super) fn gather(
        &self,
        stored: &mut Tensors,
        bytes: Bytes<'_, '_>,
    ) -> Result<Vec<Gathered>> {
        let mut gathered = Vec::new();
        if let Some(sparse) = self.sparse {
            for stem in stems(stored, SPARSE[0]) {
                let suffixes = match sparse {
                    Sparse::Any => &SPARSE[..],
                    Sparse::TwoOfFour => &SPARSE[..3],
                };
                let parts = Parts::take(stored, &stem, suffixes);
                // Versions up to 0.5 compress every parameter under its full name, later ones weights under that of
                // their module.
                let name = match stem.ends_with(".weight") || stem.ends_with(".bias") {
                    true => stem,
                    false => format!("{stem}.weight"),
                };
                let found = Bitmask::new(&parts, sparse, bytes).map_err(|e| e.tensor(&name))?;
                let (shape, place) = (found.shape(), Place::Bitmask(Box::new(found)));
                gathered.push(Gathered { name, shape, place });
            }
        }
        if !self.schemes.is_empty() {
            for stem in stems(stored, PACKED[0]) {
                let parts = Parts::take(stored, &stem, &PACKED);
                let name = format!("{stem}.weight");
                let found =
                    Packed::new(&parts, &self.schemes, bytes).map_err(|e| e.tensor(&name))?;
                let (shape, place) = (found.shape(), Place::Packed(Box::new(found)));
                gathered.push(Gathered { name, shape, place });
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
                let message = "belongs to no weight that could be put together";
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

/// What to do about weights that cannot be read.
const HINT: &str = "pass the original model with BF16, F16 or F32 weights";

/// The names that stand before `suffix`.
fn stems(stored: &Tensors, suffix: &str) -> Vec<String> {
    let stems = stored.keys().filter_map(|name| name.strip_suffix(suffix));
    stems.map(str::to_owned).collect()
}

/// The tensors of one weight by their suffix.
struct Parts {
    found: Vec<(&'static str, Stored)>,
}

impl Parts {
    /// Takes all of them out of `stored` that are there.
    fn take(stored: &mut Tensors, stem: &str, suffixes: &[&'static str]) -> Self {
        let take = |suffix: &&'static str| {
            let stored = stored.remove(&format!("{stem}{suffix}"))?;
            Some((*suffix, stored))
        };
        Self {
            found: suffixes.iter().filter_map(take).collect(),
        }
    }

    fn get(&self, suffix: &str) -> Option<&Stored> {
        let found = self.found.iter().find(|(name, _)| *name == suffix);
        found.map(|(_, stored)| stored)
    }

    fn need(&self, suffix: &'static str) -> Result<&Stored> {
        self.get(suffix).ok_or_else(|| {
            let message = format!("has no '{suffix}' beside '{}'", self.found[0].0);
            Error::new(ErrorKind::Missing, message).hint("download the model again")
        })
    }

    /// The tensor `suffix`, of one of these types.
    fn of_type(&self, suffix: &'static str, dtypes: &[Dtype]) -> Result<&Stored> {
        let stored = self.need(suffix)?;
        match dtypes.contains(&stored.dtype) {
            true => Ok(stored),
            false => Err(Error::new(
                ErrorKind::Unsupported,
                format!("'{suffix}' is {}, expected {dtypes:?}", stored.dtype),
            )
            .hint(HINT)),
        }
    }

    /// The tensor `suffix` of floating-point numbers, with their type.
    fn floats(&self, suffix: &'static str) -> Result<(&Stored, FloatType)> {
        let stored = self.of_type(suffix, &[Dtype::BF16, Dtype::F16, Dtype::F32])?;
        let float = match stored.dtype {
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            _ => FloatType::F32,
        };
        Ok((stored, float))
    }

    /// The shape that the weight has, from the tensor `suffix`.
    fn weight_shape(&self, suffix: &'static str, bytes: Bytes<'_, '_>) -> Result<Vec<usize>> {
        let stored = self.of_type(suffix, &[Dtype::I64, Dtype::I32])?;
        let sizes = stored.shape.iter().product::<usize>();
        if sizes > 2 {
            let message = format!("'{suffix}' has {sizes} values, expected one or two sizes");
            return Err(Error::new(ErrorKind::Shape, message));
        }
        let values = integers(stored, bytes)?;
        let shape: Option<Vec<usize>> = values.iter().map(|&n| n.try_into().ok()).collect();
        let fits = |shape: &Vec<usize>| {
            let weights = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
            matches!(shape.len(), 1 | 2) && weights.is_some_and(|n| n > 0)
        };
        shape.filter(fits).ok_or_else(|| {
            let message = format!("'{suffix}' says {values:?}, expected one or two sizes");
            Error::new(ErrorKind::Shape, message)
        })
    }
}

/// The values of a tensor of I32 or I64.
fn integers(stored: &Stored, bytes: Bytes<'_, '_>) -> Result<Vec<i64>> {
    let bytes = bytes(stored)?;
    Ok(match stored.dtype {
        Dtype::I32 => {
            let values = bytes.as_chunks().0.iter();
            values.map(|v| i32::from_le_bytes(*v).into()).collect()
        }
        _ => {
            let values = bytes.as_chunks().0.iter();
            values.map(|v| i64::from_le_bytes(*v)).collect()
        }
    })
}

/// Errors (`Shape`): the tensor `suffix` has another shape than the others ask for.
fn check_shape(suffix: &str, stored: &Stored, expected: &[usize]) -> Result<()> {
    match stored.shape == expected {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Shape,
            format!("'{suffix}' is {:?}, expected {expected:?}", stored.shape),
        )),
    }
}

#[cfg(test)]
mod tests;

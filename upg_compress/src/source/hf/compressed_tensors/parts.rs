//! Stored tensors of one compressed weight.
#![forbid(unsafe_code)]

use crate::source::hf::stored::{Bytes, Stored, Tensors};
use crate::source::model::FloatType;
use safetensors::Dtype;
use upg_kernel::{Error, ErrorKind, Result};

/// Hint for weights that cannot be read.
pub(super) const HINT: &str = "pass the original model with BF16, F16 or F32 weights";

/// Tensors of one weight by their suffix.
pub(super) struct WeightTensors {
    found: Vec<(&'static str, Stored)>,
}

impl WeightTensors {
    /// Removes those that exist from `stored`.
    pub(super) fn take(stored: &mut Tensors, stem: &str, suffixes: &[&'static str]) -> Self {
        let take = |suffix: &&'static str| {
            let stored = stored.remove(&format!("{stem}{suffix}"))?;
            Some((*suffix, stored))
        };
        Self {
            found: suffixes.iter().filter_map(take).collect(),
        }
    }

    pub(super) fn get(&self, suffix: &str) -> Option<&Stored> {
        let found = self.found.iter().find(|(name, _)| *name == suffix);
        found.map(|(_, stored)| stored)
    }

    pub(super) fn need(&self, suffix: &'static str) -> Result<&Stored> {
        self.get(suffix).ok_or_else(|| {
            let message = format!("has no '{suffix}' beside '{}'", self.found[0].0);
            Error::new(ErrorKind::Missing, message).hint("download the model again")
        })
    }

    /// Returns the tensor `suffix`, of one of these types.
    pub(super) fn of_type(&self, suffix: &'static str, dtypes: &[Dtype]) -> Result<&Stored> {
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

    /// Returns the floating-point tensor `suffix`, with its type.
    pub(super) fn floats(&self, suffix: &'static str) -> Result<(&Stored, FloatType)> {
        let stored = self.of_type(suffix, &[Dtype::BF16, Dtype::F16, Dtype::F32])?;
        let float = match stored.dtype {
            Dtype::BF16 => FloatType::Bf16,
            Dtype::F16 => FloatType::F16,
            _ => FloatType::F32,
        };
        Ok((stored, float))
    }

    /// Returns the shape of the weight, from the tensor `suffix`.
    pub(super) fn weight_shape(
        &self,
        suffix: &'static str,
        bytes: Bytes<'_, '_>,
    ) -> Result<Vec<usize>> {
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

/// Returns the values of a tensor of I32 or I64.
pub(super) fn integers(stored: &Stored, bytes: Bytes<'_, '_>) -> Result<Vec<i64>> {
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

/// Checks a shape. Errors (`Shape`): the tensor `suffix` has another one
/// than the others require.
pub(super) fn check_shape(suffix: &str, stored: &Stored, expected: &[usize]) -> Result<()> {
    match stored.shape == expected {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Shape,
            format!("'{suffix}' is {:?}, expected {expected:?}", stored.shape),
        )),
    }
}

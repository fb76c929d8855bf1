//! The levels of `q8 q4 s8 s4`: one array, or codes into a codebook.
#![forbid(unsafe_code)]

use super::layer::ArraySpec;
use crate::array::Array;
use crate::error::Result;
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use bytemuck::cast_slice;
use safetensors::Dtype;

/// The levels of a packed matrix: int8 values, or 4-bit codes into a table of them.
#[derive(Debug, Clone)]
pub enum Levels {
    /// An int8 level for each weight.
    Bytes(Array<i8>),
    /// 4-bit codes, two in a byte.
    Nibbles {
        /// Packed codes.
        codes: Array<u8>,
        /// The 16 levels.
        codebook: Array<i8>,
    },
}

impl Levels {
    /// The array with the codebook.
    pub(super) fn codebook_spec() -> ArraySpec {
        ArraySpec::fixed("codebook", Dtype::I8, &[16])
    }

    /// Reads the arrays of a layer: with `nibbles` codes and codebook, else int8 levels.
    pub(super) fn read(arrays: &LayerArrays<'_>, nibbles: bool) -> Result<Self> {
        Ok(match nibbles {
            false => Self::Bytes(arrays.get("values")?),
            true => Self::Nibbles {
                codes: arrays.get("codes")?,
                codebook: arrays.get("codebook")?,
            },
        })
    }

    /// Returns the bytes of one of these arrays.
    pub(super) fn array(&self, suffix: &str) -> Option<&[u8]> {
        match (self, suffix) {
            (Self::Bytes(values), "values") => Some(cast_slice(values)),
            (Self::Nibbles { codes, .. }, "codes") => Some(codes),
            (Self::Nibbles { codebook, .. }, "codebook") => Some(cast_slice(codebook)),
            _ => None,
        }
    }

    /// Returns the bytes of levels or codes. Errors (`Shape`): a codebook without 16 levels.
    pub(super) fn checked_len(&self) -> Result<usize> {
        match self {
            Self::Bytes(values) => Ok(values.len()),
            Self::Nibbles { codes, codebook } => {
                rules::length("codebook", codebook.len(), &[16])?;
                Ok(codes.len())
            }
        }
    }
}

//! The description of a layer, its arrays, and the functions of a codec.
#![forbid(unsafe_code)]

use super::encoding::Encoding;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// One compressed matrix: its name in the source model, and its encoding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerInfo {
    /// Hugging Face name of the source tensor.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Name of the encoding; [`LayerInfo::encoding`] gives the value.
    #[serde(rename = "encoding")]
    pub(super) encoding_name: String,
    /// `q8`, `q4`, `s8`, `s4`: columns that share a prime index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<usize>,
    /// `t2`, `t3`, `t4`: columns of a Hadamard transform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hadamard: Option<usize>,
    /// Relative Frobenius error against the source, if it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

impl LayerInfo {
    /// Describes a layer, without parameters or error.
    pub fn new(name: impl Into<String>, rows: usize, cols: usize, encoding: Encoding) -> Self {
        Self {
            name: name.into(),
            rows,
            cols,
            encoding_name: encoding.name().to_owned(),
            group: None,
            hadamard: None,
            error: None,
        }
    }

    /// The name of the encoding.
    pub fn encoding_name(&self) -> &str {
        &self.encoding_name
    }

    /// The encoding; a layer of an open file always has a known one.
    pub fn encoding(&self) -> Result<Encoding> {
        self.encoding_name.parse()
    }

    /// Refuses a `value` of the parameter `key`, which the encoding lacks (`Invalid`, rule 6).
    pub(super) fn has_no(&self, key: &str, value: Option<usize>) -> Result<()> {
        match value {
            None => Ok(()),
            Some(_) => Err(self.wrong_parameter(&format!("has no '{key}'"))),
        }
    }

    /// Returns the error for a wrong parameter (rule 6).
    pub(super) fn wrong_parameter(&self, what: &str) -> Error {
        let message = format!("{} {what}", self.encoding_name);
        Error::new(ErrorKind::Invalid, message).rule(rules::ENCODING)
    }

    /// Number of weights, for a matrix within the limits.
    pub(super) fn weights(&self) -> usize {
        self.rows.saturating_mul(self.cols)
    }
}

/// One array of a layer: `layer_{i}_{suffix}`.
pub(crate) struct ArraySpec {
    pub suffix: &'static str,
    pub dtype: Dtype,
    shape: Vec<usize>,
    /// True if the length depends on the content; `shape` is an upper bound then.
    is_counted: bool,
}

impl ArraySpec {
    /// An array whose shape follows from the description of the layer.
    pub(super) fn fixed(suffix: &'static str, dtype: Dtype, shape: &[usize]) -> Self {
        Self {
            suffix,
            dtype,
            shape: shape.to_vec(),
            is_counted: false,
        }
    }

    /// A vector whose length depends on the content: `most` if every weight is stored.
    pub(super) fn counted(suffix: &'static str, dtype: Dtype, most: usize) -> Self {
        Self {
            is_counted: true,
            ..Self::fixed(suffix, dtype, &[most])
        }
    }

    /// `scales`, which every encoding has.
    pub(super) fn scales(layer: &LayerInfo) -> Self {
        Self::fixed("scales", Dtype::F32, &[layer.rows])
    }

    /// Returns whether an array can have this shape.
    pub fn allows(&self, shape: &[usize]) -> bool {
        self.shape == shape || self.is_counted && shape.len() == 1
    }

    /// Returns the shape of an array of `len` elements.
    pub fn shape(&self, len: usize) -> Vec<usize> {
        match self.is_counted {
            true => vec![len],
            false => self.shape.clone(),
        }
    }

    /// Bytes of the array; an upper bound where they depend on the content.
    pub fn most_bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|&n| n as u64).product();
        elements * self.dtype.bitsize() as u64 / 8
    }

    /// The shape as error messages show it.
    pub fn expected(&self) -> String {
        match self.is_counted {
            true => "[any]".into(),
            false => format!("{:?}", self.shape),
        }
    }
}

/// One encoding; `M` is its type of matrix.
pub(crate) struct Codec<M> {
    /// Checks the parameters of a layer (rule 6).
    pub check: fn(&LayerInfo) -> Result<()>,
    /// Returns the arrays of a layer, in the order in which they are written (rule 7).
    pub arrays: fn(&LayerInfo) -> Result<Vec<ArraySpec>>,
    /// Checks scales and pointers when a file is opened (rules 9 and 10).
    ///
    /// Presence, dtypes and shapes of all arrays were checked before.
    pub check_opened: fn(&LayerInfo, &LayerArrays<'_>) -> Result<()>,
    /// Makes the matrix of a layer and checks everything that kernels rely on (rules 11 to 13).
    pub matrix: fn(&LayerInfo, &LayerArrays<'_>) -> Result<M>,
}

//! What the list of layers says of a matrix, and what an encoding makes of it.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// One compressed matrix: what it is called in the source model, and how it is stored.
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
    /// `q8`, `q4`, `s8`, `s4`: how many columns share a prime index.
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
    /// Errors (`Invalid`, rule 6): there is a `value` of parameter `key`, which the encoding has not.
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
    shape: ArrayShape,
}

enum ArrayShape {
    Fixed(Vec<usize>),
    /// A vector, whose length depends on the content.
    UpTo(usize),
}

impl ArraySpec {
    /// An array of a shape that the description of the layer gives.
    pub(super) fn fixed(suffix: &'static str, dtype: Dtype, shape: &[usize]) -> Self {
        let shape = ArrayShape::Fixed(shape.to_vec());
        Self {
            suffix,
            dtype,
            shape,
        }
    }

    /// A vector of a value for each stored weight, `most` if every weight is stored.
    pub(super) fn counted(suffix: &'static str, dtype: Dtype, most: usize) -> Self {
        let shape = ArrayShape::UpTo(most);
        Self {
            suffix,
            dtype,
            shape,
        }
    }

    /// `scales`, which every encoding has.
    pub(super) fn scales(layer: &LayerInfo) -> Self {
        Self::fixed("scales", Dtype::F32, &[layer.rows])
    }

    /// Returns whether an array can have this shape.
    pub fn allows(&self, shape: &[usize]) -> bool {
        match &self.shape {
            ArrayShape::Fixed(fixed) => fixed == shape,
            ArrayShape::UpTo(_) => shape.len() == 1,
        }
    }

    /// Returns the shape of an array of `len` elements.
    pub fn shape(&self, len: usize) -> Vec<usize> {
        match &self.shape {
            ArrayShape::Fixed(fixed) => fixed.clone(),
            ArrayShape::UpTo(_) => vec![len],
        }
    }

    /// Bytes of the array; an upper bound where they depend on the content.
    pub fn most_bytes(&self) -> u64 {
        let elements: u64 = match &self.shape {
            ArrayShape::Fixed(fixed) => fixed.iter().map(|&n| n as u64).product(),
            ArrayShape::UpTo(most) => *most as u64,
        };
        elements * self.dtype.bitsize() as u64 / 8
    }

    /// The shape in messages.
    pub fn expected(&self) -> String {
        match &self.shape {
            ArrayShape::Fixed(fixed) => format!("{fixed:?}"),
            ArrayShape::UpTo(_) => "[any]".into(),
        }
    }
}

/// Knowledge of one encoding, beside its row in the table of [`super`].
pub(crate) trait Codec {
    /// The matrices that it stores.
    type Matrix;

    /// The first minor version of the format that has it.
    fn minor(&self) -> u16;

    /// Checks the parameters of a layer (rule 6).
    fn check(&self, layer: &LayerInfo) -> Result<()>;

    /// Returns the arrays of a layer, in the order in which they are written (rule 7).
    fn arrays(&self, layer: &LayerInfo) -> Result<Vec<ArraySpec>>;

    /// Checks what opening a file reads: scales and pointers (rules 9 and 10).
    ///
    /// All arrays are there, and have the right dtypes and shapes.
    fn check_opened(&self, layer: &LayerInfo, arrays: &LayerArrays<'_>) -> Result<()>;

    /// Makes the matrix of a layer, and checks all that its kernels rely on.
    fn matrix(&self, layer: &LayerInfo, arrays: &LayerArrays<'_>) -> Result<Self::Matrix>;
}

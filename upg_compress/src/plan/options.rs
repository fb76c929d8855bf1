//! What a caller chooses: encodings, a budget, and how they are found.
#![forbid(unsafe_code)]

use super::sparsity::Sparse;
use crate::sensitivity::calibration::Calibration;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::inference::Input;
use upg_kernel::{Error, ErrorKind, Result};

/// Seed of the random signs of the rotation, if none is asked for.
const DEFAULT_SEED: u64 = 0;

/// Blocks of fewer bits are like `t3`, of more like `t4`, where a choice depends on it.
const LIKE_T4: f64 = 3.6;

/// An encoding, or none: the matrix stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Choice {
    /// Stored as the source has it (dequantized to F32 if that is a quantized GGUF type).
    Keep,
    /// Compressed.
    Encode(Encoding),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.write_str("keep"),
            Self::Encode(encoding) => encoding.fmt(f),
        }
    }
}

impl FromStr for Choice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "keep" => Ok(Self::Keep),
            _ => text.parse().map(Self::Encode).map_err(|_| {
                let known = Encoding::ALL.map(Encoding::name).join(" ");
                Error::new(ErrorKind::Argument, format!("unknown encoding '{text}'"))
                    .hint(format!("choose keep or one of {known}"))
            }),
        }
    }
}

/// `PATTERN=ENCODING`: matrices whose name matches (`*`, `?`, `[..]`) get this encoding.
#[derive(Debug, Clone)]
pub struct Override {
    pub(crate) pattern: glob::Pattern,
    pub(crate) choice: Choice,
}

impl Override {
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.pattern.matches(name)
    }
}

impl fmt::Display for Override {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.pattern, self.choice)
    }
}

impl FromStr for Override {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |message: String| {
            Error::new(ErrorKind::Argument, message)
                .hint("write PATTERN=ENCODING, for example '*.down_proj.weight=t4'")
        };
        let (pattern, choice) = text
            .rsplit_once('=')
            .ok_or_else(|| bad(format!("'{text}' has no '='")))?;
        let pattern =
            glob::Pattern::new(pattern).map_err(|e| bad(format!("pattern '{pattern}': {e}")))?;
        Ok(Self {
            pattern,
            choice: choice.parse()?,
        })
    }
}

/// How to compress a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CompressOptions {
    /// For the matrices of the transformer blocks.
    pub encoding: Choice,
    /// How many bits there are: the matrices of the blocks then get `t2`, `t3`, `t4` or `q8`, each as much as it needs, and
    /// `encoding` only stands for them until that is known. Needs a calibration.
    pub budget: Option<Budget>,
    /// Encodings by the names of matrices, before `encoding`: what comes of a budget.
    pub choices: BTreeMap<String, Encoding>,
    /// For the embeddings and the output head. `None`: `keep` and `mdcsr` as the blocks; `q4` where
    /// the blocks are `t2` or `t3` and a `q8` embedding would be over a fifth of the file; else `q8`.
    pub embedding: Option<Choice>,
    /// Columns that share a prime index in `q8` and `q4`, 32 or 64. `None`: 64 in `q8`, 32 in `q4`.
    pub group: Option<usize>,
    /// For single matrices; the last one that matches counts.
    pub overrides: Vec<Override>,
    /// Of the random signs of the rotation.
    pub seed: u64,
    /// What the model is run over: matrices of the layers are then rounded so that their outputs on it are kept, but for
    /// `mdcsr`. `None`: only the weights are looked at.
    pub calibration: Option<Calibration>,
    /// Whether matrices that would be `q8` or `q4` are stored by their zeros where they have many.
    pub sparse: Sparse,
    /// The share of weights to prune of the matrices in the layers that would be `q8`, `q4`, `s8` or `s4`, which are stored
    /// as `s8` or `s4` then. Needs a calibration.
    pub prune: Option<f64>,
    /// Also measure, where there is a calibration, how far the outputs of each matrix are off, and what that changes:
    /// [`TensorReport::output_error`](crate::job::report::TensorReport::output_error), [`TensorReport::divergence`](crate::job::report::TensorReport::divergence).
    /// Does not change the file.
    pub output_errors: bool,
    /// Leave what is done if the run ends early, and go on from what an earlier one has left. Does not change the file.
    pub resume: bool,
}

impl CompressOptions {
    /// Everything at its default but the encoding.
    pub fn new(encoding: Choice) -> Self {
        Self {
            encoding,
            budget: None,
            choices: BTreeMap::new(),
            embedding: None,
            group: None,
            overrides: Vec::new(),
            seed: DEFAULT_SEED,
            calibration: None,
            sparse: Sparse::Auto,
            prune: None,
            output_errors: false,
            resume: false,
        }
    }

    /// Whether the encoder of a matrix will look at the inputs that it has.
    pub(crate) fn calibrates(&self, layer: &LayerInfo) -> bool {
        self.calibration.is_some() && is_calibrated(layer)
    }

    /// Whether a pattern says what becomes of the matrix `name`.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.overrides.iter().any(|o| o.matches(name))
    }
}

/// How many bits there are.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// For each weight in the matrices of the transformer blocks, with scales and all else that is stored of them.
    Blocks(f64),
    /// Bytes of the whole file.
    File(u64),
}

impl Budget {
    /// The encoding that the blocks will be like.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Blocks(bits) if bits >= LIKE_T4 => Encoding::T4,
            _ => Encoding::T3,
        }
    }

    pub(crate) fn to_json(self) -> Value {
        match self {
            Self::Blocks(bits) => json!({"bits_per_weight_blocks": bits}),
            Self::File(bytes) => json!({"file_bytes": bytes}),
        }
    }
}

/// Whether the encoder of a matrix looks at the inputs that the matrix has.
pub(crate) fn is_calibrated(layer: &LayerInfo) -> bool {
    let looks = !matches!(layer.encoding(), Err(_) | Ok(Encoding::MdCsr));
    looks && Input::of(&layer.name).is_some()
}

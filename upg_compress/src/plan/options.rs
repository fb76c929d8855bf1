//! Options of a compression: encodings, overrides, a budget.
#![forbid(unsafe_code)]

use super::sparsity::Sparse;
use crate::encode::matrix::encoder_of;
use crate::sensitivity::calibration::Calibration;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::inference::LayerInput;
use upg_kernel::{Error, ErrorKind, Result};

/// Default seed of the random signs of the rotation.
const DEFAULT_SEED: u64 = 0;

/// Threshold in bits per weight: blocks below are like `t3`, above like `t4`, where a choice
/// depends on it.
const LIKE_T4: f64 = 3.6;

/// Encoding, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Choice {
    /// Uncompressed, as the source stores it; quantized GGUF types are dequantized to F32.
    Keep,
    /// Compressed with an encoding.
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
        match text.to_ascii_lowercase().as_str() {
            "keep" => Ok(Self::Keep),
            lower => lower.parse().map(Self::Encode).map_err(|_| {
                let known = Encoding::ALL.map(Encoding::name).join(" ");
                let nearest = nearest(lower).map(|n| format!("nearest to {text} is {n}; "));
                Error::new(ErrorKind::Argument, format!("unknown encoding '{text}'")).hint(format!(
                    "{}choose keep or one of {known}",
                    nearest.unwrap_or_default()
                ))
            }),
        }
    }
}

/// Returns the encoding, or the budget, that is nearest to a type of another program.
///
/// Knows those of GGUF (`q4_k_m`, `iq3_xs`, `tq2_0`), and spellings such as `int8`, `4bit`, `fp16`.
fn nearest(lower: &str) -> Option<&'static str> {
    if ["f16", "bf16", "fp16", "f32", "fp32"].contains(&lower) {
        return Some("keep");
    }
    let number = ["iq", "tq", "q", "int", "fp", "w"]
        .iter()
        .find_map(|start| {
            let rest = lower.strip_prefix(start)?;
            Some(rest.split_once('_').map_or(rest, |(bits, _)| bits))
        });
    let number = number.or_else(|| lower.strip_suffix("bit").map(|n| n.trim_end_matches('-')));
    match number? {
        "8" => Some("q8"),
        "6" => Some("a budget: --bpw 6.5"),
        "5" => Some("a budget: --bpw 5.5"),
        "4" => Some("q4, or t4 with a calibration"),
        "3" => Some("t3"),
        "2" | "1" => Some("t2"),
        _ => None,
    }
}

/// Override `PATTERN=ENCODING`: matrices whose name matches (`*`, `?`,
/// `[..]`) get this encoding.
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

/// Options of [`compress`](crate::compress()).
///
/// [`CompressOptions::new`] creates them; every field may be set afterwards.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CompressOptions {
    /// Encoding of the matrices in the transformer blocks.
    pub encoding: Choice,
    /// Bit budget, which needs a calibration. `None`: every matrix of the blocks gets `encoding`.
    ///
    /// With a budget each matrix gets `t2`, `t3`, `t4` or `q8`, and the most sensitive ones get the
    /// most bits; until then `encoding` is a placeholder.
    pub budget: Option<Budget>,
    /// Per-matrix encodings chosen by the bit budget, keyed by tensor name.
    ///
    /// They take precedence over `encoding`.
    pub choices: BTreeMap<String, Encoding>,
    /// Encoding of the embeddings and the output head; `None` for the default.
    ///
    /// The default is that of the blocks for `keep` and `mdcsr`; `q4` where the blocks are `t2` or
    /// `t3` and a `q8` embedding would exceed a fifth of the file; else `q8`.
    pub embedding: Option<Choice>,
    /// Columns that share a prime index in `q8` and `q4`: 32 or 64.
    ///
    /// `None`: 64 in `q8`, 32 in `q4`.
    pub group: Option<usize>,
    /// Encodings of single matrices by patterns; the last match wins.
    pub overrides: Vec<Override>,
    /// Seed of the random signs of the rotation.
    pub seed: u64,
    /// Calibration text. `None`: only the weights are considered.
    ///
    /// With a calibration the matrices of the layers, except those in `mdcsr`, are rounded to
    /// preserve their effect on the predictions.
    pub calibration: Option<Calibration>,
    /// Storage of `q8` and `q4` matrices with many zeros.
    pub sparse: Sparse,
    /// Share of the weights to prune, above 0 and below 1. Needs a calibration.
    ///
    /// Applies to the matrices of the layers that would be `q8`, `q4`, `s8` or `s4`; they are
    /// stored as `s8` or `s4`.
    pub prune: Option<f64>,
    /// Flag to measure the output error and the divergence of each calibrated matrix.
    ///
    /// The figures are [`TensorReport::output_error`](crate::TensorReport::output_error) and
    /// [`TensorReport::divergence`](crate::TensorReport::divergence). Does not change the file.
    pub output_errors: bool,
    /// Flag for a resumable run: an early end leaves the finished tensors, from which the same
    /// run resumes.
    ///
    /// Does not change the file.
    pub resume: bool,
}

impl CompressOptions {
    /// Creates options with this encoding of the blocks, everything else at its default.
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

    /// Returns whether the encoder of a matrix will use the inputs of the calibration.
    pub(crate) fn calibrates(&self, layer: &LayerInfo) -> bool {
        self.calibration.is_some() && is_calibrated(layer)
    }

    /// Returns whether a pattern names the encoding of the matrix `name`.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.overrides.iter().any(|o| o.matches(name))
    }
}

/// Limit on the bits of a file, distributed over the matrices of the blocks.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// Average bits per weight in the matrices of the blocks,
    /// including scales and all other arrays.
    Blocks(f64),
    /// Bytes of the whole file.
    File(u64),
}

impl Budget {
    /// Returns the encoding nearest in size to the blocks: `t3` or `t4`.
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

/// Returns whether the encoder of a matrix can use the inputs of a calibration.
pub(crate) fn is_calibrated(layer: &LayerInfo) -> bool {
    encoder_of(layer).is_ok_and(|encoder| encoder.is_calibrated)
        && LayerInput::of(&layer.name).is_some()
}

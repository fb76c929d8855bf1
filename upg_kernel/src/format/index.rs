//! The list of compressed matrices in the metadata of a file.
#![forbid(unsafe_code)]

use super::{json, rules};
use crate::error::{Error, ErrorKind, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

/// How the weights of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Encoding {
    /// Delta-compressed sparse rows with a prime for every weight; 32 bits a weight, nearly lossless.
    MdCsr,
    /// int8 levels, a prime for every 64 columns; 8.13 bits a weight.
    Q8,
    /// 4-bit codes into a codebook, a prime for every 32 columns; 4.25 bits a weight.
    Q4,
    /// Trellis codes of 2 bits in a rotated basis; 2.01 bits a weight with 5120 columns.
    T2,
    /// As `t2`, with codes of 3 bits.
    T3,
    /// As `t2`, with codes of 4 bits.
    T4,
    /// `q8` under a bitmap of kept weights: zeros stay exactly zero; 1.13 bits a weight and 8 for each
    /// that is kept.
    S8,
    /// `q4` under a bitmap of kept weights; about 1.16 bits a weight and 4 for each that is kept.
    S4,
}

impl Encoding {
    /// Every encoding, in the order of the specification.
    pub const ALL: [Self; 8] = [
        Self::MdCsr,
        Self::Q8,
        Self::Q4,
        Self::T2,
        Self::T3,
        Self::T4,
        Self::S8,
        Self::S4,
    ];

    /// The name in files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::MdCsr => "mdcsr",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::T2 => "t2",
            Self::T3 => "t3",
            Self::T4 => "t4",
            Self::S8 => "s8",
            Self::S4 => "s4",
        }
    }

    /// Bits of a trellis code, if it is one of the trellis encodings.
    pub const fn trellis_bits(self) -> Option<u8> {
        match self {
            Self::T2 => Some(2),
            Self::T3 => Some(3),
            Self::T4 => Some(4),
            _ => None,
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Encoding {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|e| e.name() == name)
            .ok_or_else(|| {
                let known = Self::ALL.map(Self::name).join(" ");
                let name = json::cut(name);
                Error::new(ErrorKind::Unsupported, format!("unknown encoding '{name}'"))
                    .hint(format!("known encodings: {known}"))
            })
    }
}

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
    encoding_name: String,
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
    /// A description without parameters or error.
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

    /// Checks name, sizes and parameters (rules 5 and 6), as opening a file does.
    ///
    /// Errors: `Invalid`, `TooLarge` or `Unsupported` with the rule.
    pub fn check(&self) -> Result<()> {
        rules::name(&self.name, rules::LAYERS)?;
        let encoding = self.encoding().map_err(|e| e.rule(rules::ENCODING))?;
        let (rows, cols) = (self.rows, self.cols);
        let fits = (1..=rules::MOST_ROWS).contains(&rows) && (1..=rules::MOST_COLS).contains(&cols);
        let weights = rows.checked_mul(cols);
        if !fits || weights.is_none_or(|n| n > rules::LARGEST_MATRIX) {
            let message = format!("a matrix [{rows}, {cols}] is outside the limits");
            return Err(Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS));
        }
        self.check_parameters(encoding)
    }

    fn check_parameters(&self, encoding: Encoding) -> Result<()> {
        let wrong = |message| Err(Error::new(ErrorKind::Invalid, message).rule(rules::ENCODING));
        match (encoding, self.group) {
            (Encoding::Q8 | Encoding::Q4, Some(group)) => rules::group(group)?,
            (Encoding::S8 | Encoding::S4, Some(64)) => {}
            (Encoding::Q8 | Encoding::Q4 | Encoding::S8 | Encoding::S4, found) => {
                return wrong(format!("{encoding} with 'group' {found:?}"));
            }
            (_, Some(_)) => return wrong(format!("{encoding} has no 'group'")),
            (_, None) => {}
        }
        match (encoding.trellis_bits(), self.hadamard) {
            (Some(_), Some(size)) => rules::hadamard(self.cols, size),
            (Some(_), None) => wrong(format!("{encoding} without 'hadamard'")),
            (None, Some(_)) => wrong(format!("{encoding} has no 'hadamard'")),
            (None, None) => Ok(()),
        }
    }
}

/// Parses and checks the `layers` and `num_layers` metadata (rules 5 and 6).
///
/// Memory: at most twice the text, and 24 MB.
pub(super) fn parse(layers: &str, num_layers: &str) -> Result<Vec<LayerInfo>> {
    let bad = |message: String| Error::new(ErrorKind::Invalid, message).rule(rules::LAYERS);
    let layers = json::parse(layers, Listed)
        .map_err(|e| bad(json::message("metadata 'layers'", &e)).with_source(e))?;
    if num_layers != layers.len().to_string() {
        return Err(bad(format!(
            "metadata 'num_layers' is '{}', 'layers' lists {}",
            json::cut(num_layers),
            layers.len(),
        )));
    }
    let mut names = HashSet::new();
    for layer in &layers {
        layer.check().map_err(|e| e.tensor(&layer.name))?;
        if !names.insert(layer.name.as_str()) {
            return Err(bad("listed twice in metadata 'layers'".into()).tensor(&layer.name));
        }
    }
    Ok(layers)
}

/// A list of at most [`rules::MOST_LAYERS`] layers.
struct Listed;

impl<'de> DeserializeSeed<'de> for Listed {
    type Value = Vec<LayerInfo>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Listed {
    type Value = Vec<LayerInfo>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of layers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut layers = Vec::new();
        while let Some(layer) = list.next_element()? {
            if layers.len() == rules::MOST_LAYERS {
                let most = rules::MOST_LAYERS;
                return Err(A::Error::custom(format_args!("more than {most} layers")));
            }
            layers.push(layer);
        }
        Ok(layers)
    }
}

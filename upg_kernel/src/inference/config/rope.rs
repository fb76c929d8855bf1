//! Rotary embedding of a config, in its older and its newer spelling.
#![forbid(unsafe_code)]

use super::family::Family;
use super::fields::Fields;
use super::{MAX_CONTEXT, MAX_HEAD_DIM};
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;

/// Parameters of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies `theta^(-2i / dim)`.
    pub theta: f64,
    /// Number of rotated elements of a head, from the first on; even.
    pub dim: usize,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// Changes of the frequencies; the names are those of `rope_type`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No change. Also `dynamic`, which is the same up to `max_position_embeddings`, our limit.
    Default,
    /// Every frequency is divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// Divisor, at least the growth of the context.
        factor: f64,
    },
    /// Low frequencies are divided, high ones kept,
    /// and those between blended linearly (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low` are divided.
        low: f64,
        /// Wavelengths below `original_context / high` are kept; above `low`.
        high: f64,
        /// Context before the extension.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071): a ramp over the dimensions between kept and divided.
    Yarn {
        /// Divisor of low frequencies.
        factor: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Flag: the ends of the ramp are rounded outwards to whole dimensions.
        truncate: bool,
        /// Context before the extension.
        original_context: usize,
        /// Factor of cos and sin.
        attention_factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor for each frequency.
    ///
    /// One set applies up to `original_context` positions, another one to longer sequences.
    LongRope {
        /// Divisors for short sequences, `[dim / 2]`.
        short: Vec<f64>,
        /// Divisors for long sequences, `[dim / 2]`.
        long: Vec<f64>,
        /// Longest sequence that counts as short.
        original_context: usize,
        /// Factor of cos and sin, in short and long sequences alike.
        attention_factor: f64,
    },
}

impl RopeConfig {
    /// Checks the values that the tables rely on.
    pub(super) fn check(&self, head_dim: usize) -> Result<()> {
        let invalid = |message: String| {
            Err(Error::new(
                ErrorKind::Invalid,
                format!("config.json: {message}"),
            ))
        };
        if self.dim == 0 || !self.dim.is_multiple_of(2) || self.dim > head_dim {
            return invalid(format!(
                "{} of {head_dim} elements of a head are rotated, expected an even number above 0",
                self.dim
            ));
        }
        // The ramp of YaRN divides by ln(theta); nobody uses a base below 1.
        if !(self.theta.is_finite() && self.theta > 1.0) {
            return invalid(format!(
                "'rope_theta' is {}, expected a finite number above 1",
                self.theta
            ));
        }
        if let RopeScaling::LongRope { short, long, .. } = &self.scaling
            && (short.len() != self.dim / 2 || long.len() != self.dim / 2)
        {
            return invalid(format!(
                "{} short and {} long rope factors, expected {} each",
                short.len(),
                long.len(),
                self.dim / 2
            ));
        }
        Ok(())
    }
}

/// Allowed keys of `rope_scaling` or `rope_parameters`;
/// any other could mean other arithmetic.
const KNOWN_KEYS: &[&str] = &[
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
];

/// Keys that transformers ignores, of which other engines give some a meaning.
///
/// `attn_factor` multiplies cos and sin in llama.cpp and vLLM.
const IGNORED_KEYS: &[&str] = &["attn_factor", "extrapolation_factor"];

/// Input of the scaling.
struct Source<'a> {
    /// Keys of `rope_scaling` or `rope_parameters`.
    rope: Fields<'a>,
    /// Context before the extension, as transformers determines it.
    original_context: usize,
    /// Value of `max_position_embeddings`.
    context: usize,
    dim: usize,
}

/// Reads the rotary embedding; `context` grows if YaRN specifies it.
pub(super) fn parse(
    fields: &Fields<'_>,
    family: &Family,
    head_dim: usize,
    context: &mut usize,
) -> Result<RopeConfig> {
    let empty = serde_json::Map::new();
    let rope = match fields.object("rope_scaling")? {
        Some(rope) if !rope.map.is_empty() => Some(rope),
        _ => fields.object("rope_parameters")?,
    };
    let rope = rope.unwrap_or(Fields {
        map: &empty,
        ..*fields
    });
    for key in rope.map.keys() {
        let known = [KNOWN_KEYS, IGNORED_KEYS].concat();
        if !known.contains(&key.as_str()) && !is_off(rope.get(key)) {
            return Err(rope.error(
                ErrorKind::Unsupported,
                format_args!("unknown rope parameter '{}'", key.escape_debug()),
            ));
        }
    }
    let first = |key| -> Result<Option<f64>> {
        Ok(match rope.positive(key)? {
            Some(value) => Some(value),
            None => fields.positive(key)?,
        })
    };
    let dim = rotated_dim(fields, family, head_dim, first("partial_rotary_factor")?)?;
    let theta = first("rope_theta")?.unwrap_or(10_000.0);
    let original_context =
        |fields: &Fields<'_>| fields.size("original_max_position_embeddings", MAX_CONTEXT);
    let source = Source {
        rope,
        original_context: match original_context(fields)? {
            Some(outer) => outer,
            None => original_context(&rope)?
                .or(family.default_original_context)
                .unwrap_or(*context),
        },
        context: *context,
        dim,
    };
    let name = match rope.text("rope_type")? {
        Some(name) => name,
        None => rope.text("type")?.unwrap_or("default"),
    };
    // Early Phi-3 files have other names for longrope.
    let name = match name {
        "su" | "yarn" if family.longrope => "longrope",
        other => other,
    };
    let scaling = match name {
        "default" | "dynamic" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: rope.required_positive("factor")?,
        },
        "llama3" => source.llama3()?,
        "yarn" => {
            let (scaling, longer) = source.yarn()?;
            *context = longer;
            scaling
        }
        // For other families transformers does not recompute the cache at the switch, so that its
        // output depends on how the prompt was split, unless there is no switch.
        "longrope" if family.longrope || rope.get("short_factor") == rope.get("long_factor") => {
            source.longrope()?
        }
        other => {
            return Err(rope.error(
                ErrorKind::Unsupported,
                format_args!(
                    "rope type '{}' is not supported for family '{}'",
                    other.escape_debug(),
                    family.name
                ),
            ));
        }
    };
    Ok(RopeConfig {
        theta,
        dim,
        scaling,
    })
}

/// Returns whether a value of a key says that there is no such thing.
fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::String(_) | Value::Number(_) | Value::Bool(true)) => false,
    }
}

/// Returns the keys of the rotary embedding that are ignored.
pub(super) fn ignored(fields: &Fields<'_>) -> impl Iterator<Item = &'static str> {
    let objects = ["rope_scaling", "rope_parameters"].map(|key| fields.object(key).ok().flatten());
    let given = move |key: &str| objects.iter().flatten().any(|rope| rope.get(key).is_some());
    IGNORED_KEYS.iter().copied().filter(move |key| given(key))
}

fn rotated_dim(
    fields: &Fields<'_>,
    family: &Family,
    head_dim: usize,
    factor: Option<f64>,
) -> Result<usize> {
    let factor = factor.unwrap_or(1.0);
    if factor > 1.0 {
        return Err(fields.error(
            ErrorKind::Invalid,
            format_args!("'partial_rotary_factor' is {factor}, expected at most 1"),
        ));
    }
    if factor != 1.0 && !family.partial_rotary {
        return Err(fields.error(
            ErrorKind::Unsupported,
            format_args!(
                "'partial_rotary_factor' is {factor}, but family '{}' rotates whole heads",
                family.name
            ),
        ));
    }
    debug_assert!(head_dim <= MAX_HEAD_DIM);
    Ok((head_dim as f64 * factor) as usize)
}

impl Source<'_> {
    fn llama3(&self) -> Result<RopeScaling> {
        let low = self.rope.required_positive("low_freq_factor")?;
        let high = self.rope.required_positive("high_freq_factor")?;
        if low >= high {
            return Err(self.rope.error(
                ErrorKind::Invalid,
                format_args!("'low_freq_factor' {low} is not below 'high_freq_factor' {high}"),
            ));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.rope.required_positive("factor")?,
            low,
            high,
            original_context: self.original_context,
        })
    }

    /// Returns the YaRN scaling and the extended context.
    ///
    /// Files keep the trained `max_position_embeddings`.
    fn yarn(&self) -> Result<(RopeScaling, usize)> {
        let original = self.original_context;
        let factor = match self.rope.positive("factor")? {
            Some(factor) => factor,
            None => self.context as f64 / original as f64,
        };
        let magnitude = |scale: f64| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let explicit = self.rope.positive("attention_factor")?;
        let pair = (
            self.rope.positive_or_zero("mscale")?,
            self.rope.positive_or_zero("mscale_all_dim")?,
        );
        let attention_factor = match (explicit, pair) {
            (Some(factor), _) => factor,
            (None, (Some(mscale), Some(all))) => magnitude(mscale) / magnitude(all),
            (None, _) => magnitude(1.0),
        };
        let extended = (factor * original as f64).round();
        if extended > MAX_CONTEXT as f64 {
            return Err(self.rope.error(
                ErrorKind::TooLarge,
                format_args!(
                    "yarn extends the context to {extended}, expected at most {MAX_CONTEXT}"
                ),
            ));
        }
        let scaling = RopeScaling::Yarn {
            factor,
            beta_fast: self.rope.positive_or_zero("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.rope.positive_or_zero("beta_slow")?.unwrap_or(1.0),
            truncate: self.rope.flag("truncate", true)?,
            original_context: original,
            attention_factor,
        };
        Ok((scaling, self.context.max(extended as usize)))
    }

    fn longrope(&self) -> Result<RopeScaling> {
        let original = self.original_context;
        let factor = match self.rope.positive("factor")? {
            Some(factor) => factor,
            None => self.context as f64 / original as f64,
        };
        let attention_factor = match self.rope.positive("attention_factor")? {
            Some(attention_factor) => attention_factor,
            None if factor <= 1.0 => 1.0,
            None if original == 1 => {
                return Err(self.rope.error(
                    ErrorKind::Invalid,
                    "longrope with 'original_max_position_embeddings' 1",
                ));
            }
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short: self.rope.positives("short_factor", self.dim / 2)?,
            long: self.rope.positives("long_factor", self.dim / 2)?,
            original_context: original,
            attention_factor,
        })
    }
}

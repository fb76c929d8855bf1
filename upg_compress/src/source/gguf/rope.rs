//! `rope_scaling` rebuilt from the factor tensors and `rope.scaling.*` keys of GGUF.
#![forbid(unsafe_code)]

use super::dims::{Dims, FromTensors};
use super::metadata::Metadata;
use serde_json::{Map, Value, json};
use std::f64::consts::TAU;
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum relative difference between a stored rotary factor (f32) and the formula in f64.
///
/// Covers a few f32 roundings in the converter's wavelengths.
const FACTOR_TOLERANCE: f64 = 1e-4;

/// Maximum relative difference between the stored attention factor
/// and transformers' own formula.
const ATTENTION_TOLERANCE: f64 = 1e-4;

/// Returns the `rope_scaling` of llama, mistral and qwen; null without scaling.
///
/// Errors: `Unsupported` for a kind without a name in transformers,
/// or whose parameters cannot be recovered.
pub(super) fn scaling(
    m: &Metadata<'_>,
    arch: &str,
    dims: &Dims,
    tensors: &FromTensors,
) -> Result<Value> {
    let kind = m.text(&format!("{arch}.rope.scaling.type"))?;
    if let Some(freqs) = &tensors.rope_freqs {
        if kind.is_some_and(|k| k != "none") {
            return Err(unsupported("rope_freqs.weight beside another rope scaling"));
        }
        return llama3(freqs, dims);
    }
    if tensors.rope_factors.is_some() {
        return Err(unsupported(format!("longrope factors in a {arch} model")));
    }
    let factor = m.float(&format!("{arch}.rope.scaling.factor"))?;
    // Before `rope.scaling.*`, linear scaling had its own key.
    let factor = factor.or(m.float(&format!("{arch}.rope.scale_linear"))?);
    let factor = factor.filter(|f| *f != 1.0);
    let is_yarn = kind.as_deref() == Some("yarn") && factor.is_some();
    let attention = m.float(&format!("{arch}.rope.scaling.attn_factor"))?;
    if let Some(attention) = attention.filter(|x| *x != 1.0 && !is_yarn) {
        return Err(unsupported(format!(
            "rope.scaling.attn_factor {attention} without YaRN"
        )));
    }
    match (kind.as_deref().unwrap_or("linear"), factor) {
        ("none", _) | ("linear", None) => Ok(Value::Null),
        (_, Some(f)) if f <= 0.0 => Err(unsupported(format!("rope scaling factor {f}"))),
        ("linear", Some(factor)) => Ok(json!({"rope_type": "linear", "factor": factor})),
        ("yarn", Some(factor)) => yarn(m, arch, factor),
        (kind, _) => Err(unsupported(format!("rope scaling {kind:?}"))),
    }
}

/// Returns YaRN scaling (arXiv 2309.00071) with the parameters of the file.
fn yarn(m: &Metadata<'_>, arch: &str, factor: f64) -> Result<Value> {
    let mut scaling = Map::new();
    scaling.insert("rope_type".to_owned(), json!("yarn"));
    scaling.insert("factor".to_owned(), json!(factor));
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    if let Some(n) = m.number(&key("original_context_length"))? {
        scaling.insert("original_max_position_embeddings".to_owned(), json!(n));
    }
    let names = [
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ];
    for (gguf, hf) in names {
        if let Some(x) = m.float(&key(gguf))? {
            scaling.insert(hf.to_owned(), json!(x));
        }
    }
    // llama.cpp multiplies the factor of cos and sin that the scaling implies.
    if let Some(x) = m.float(&key("attn_factor"))?.filter(|x| *x != 1.0) {
        let implied = if factor > 1.0 {
            0.1 * factor.ln() + 1.0
        } else {
            1.0
        };
        scaling.insert("attention_factor".to_owned(), json!(x * implied));
    }
    for name in ["yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"] {
        if m.float(&key(name))?.is_some_and(|x| x != 1.0) {
            return Err(unsupported(format!("YaRN with {name}")));
        }
    }
    Ok(Value::Object(scaling))
}

/// Returns longrope scaling (arXiv 2402.13753) of phi3: a divisor per frequency, for short
/// and for long contexts.
pub(super) fn longrope(
    m: &Metadata<'_>,
    dims: &Dims,
    tensors: &FromTensors,
    original: usize,
) -> Result<Value> {
    let kind = m.text("phi3.rope.scaling.type")?;
    let Some((short, long)) = &tensors.rope_factors else {
        return match kind {
            None => Ok(Value::Null),
            Some(kind) if kind == "none" => Ok(Value::Null),
            Some(kind) => Err(unsupported(format!(
                "rope scaling {kind:?} without factors"
            ))),
        };
    };
    if kind.as_ref().is_some_and(|k| k != "longrope") {
        return Err(unsupported(format!("rope scaling {kind:?} with factors")));
    }
    let mut scaling = Map::new();
    // Older versions of transformers read `type`, newer ones `rope_type`.
    scaling.insert("type".to_owned(), json!("longrope"));
    scaling.insert("rope_type".to_owned(), json!("longrope"));
    scaling.insert("short_factor".to_owned(), json!(shortest(short)));
    scaling.insert("long_factor".to_owned(), json!(shortest(long)));
    if let Some(stored) = m.float("phi3.rope.scaling.attn_factor")? {
        let formula = longrope_attention_factor(dims.context, original);
        if (stored / formula - 1.0).abs() > ATTENTION_TOLERANCE {
            scaling.insert("attention_factor".to_owned(), json!(stored));
        }
    }
    Ok(Value::Object(scaling))
}

/// Returns the factor of cos and sin that transformers uses by default
/// (`_compute_longrope_parameters`).
fn longrope_attention_factor(context: usize, original: usize) -> f64 {
    let scale = context as f64 / original.max(1) as f64;
    if scale <= 1.0 {
        return 1.0;
    }
    (1.0 + scale.ln() / (original as f64).ln()).sqrt()
}

/// Parameters of llama3 scaling. Only the ratios to `original` matter, so `low` is always 1.
#[derive(Debug, Clone, Copy)]
struct Llama3 {
    factor: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    const LOW: f64 = 1.0;

    /// Returns the divisor of the frequency of `wavelength` (`_compute_llama3_parameters`).
    fn divisor(&self, wavelength: f64) -> f64 {
        if wavelength < self.original / self.high {
            return 1.0;
        }
        if wavelength > self.original / Self::LOW {
            return self.factor;
        }
        let smooth = (self.original / wavelength - Self::LOW) / (self.high - Self::LOW);
        1.0 / ((1.0 - smooth) / self.factor + smooth)
    }

    fn fits(&self, points: &[(f64, f64)]) -> bool {
        let near = |(w, d): &(f64, f64)| (self.divisor(*w) / d - 1.0).abs() < FACTOR_TOLERANCE;
        points.iter().all(near)
    }
}

/// Recovers the parameters that llama.cpp turned into the divisors `freqs`,
/// one per rotary frequency.
///
/// The largest divisor is the factor. Between the two ends 1/d is linear in 1/wavelength. So each
/// point there gives `original` for the usual high factor 4, and two points give both. The result
/// is accepted only if it reproduces every divisor; else all of them are listed, as in longrope.
fn llama3(freqs: &[f32], dims: &Dims) -> Result<Value> {
    let count = dims.rotary_dim / 2;
    if freqs.len() != count || freqs.iter().any(|f| !f.is_finite() || *f <= 0.0) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{} rotary factors for {count} frequencies", freqs.len()),
        )
        .tensor("rope_freqs.weight"));
    }
    let points: Vec<(f64, f64)> = freqs
        .iter()
        .enumerate()
        .map(|(i, d)| {
            let exponent = 2.0 * i as f64 / dims.rotary_dim as f64;
            (TAU * dims.rope_theta.powf(exponent), f64::from(*d))
        })
        .collect();
    let factor = points.iter().fold(1.0, |max: f64, p| max.max(p.1));
    if factor == 1.0 && points.iter().all(|p| p.1 == 1.0) {
        return Ok(Value::Null);
    }
    let found = candidates(&points, factor)
        .into_iter()
        .find(|c| c.original >= 1.0 && c.high > Llama3::LOW && c.fits(&points));
    let Some(Llama3 {
        factor,
        high,
        original,
    }) = found
    else {
        return Ok(any_divisors(freqs, dims.context));
    };
    Ok(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": Llama3::LOW,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as u64,
    }))
}

/// Returns scaling with a divisor for each frequency, at every length.
fn any_divisors(freqs: &[f32], context: usize) -> Value {
    let list = shortest(freqs);
    json!({
        "rope_type": "longrope",
        "short_factor": list,
        "long_factor": list,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    })
}

/// Returns the shortest decimal numbers that give `factors` again.
fn shortest(factors: &[f32]) -> Vec<Value> {
    let number = |f: &f32| json!(f.to_string().parse::<f64>().unwrap_or(f64::NAN));
    factors.iter().map(number).collect()
}

fn candidates(points: &[(f64, f64)], factor: f64) -> Vec<Llama3> {
    let made = |high: f64, original: f64| Llama3 {
        factor,
        high,
        original: original.round(),
    };
    // Pairs (1/wavelength, smooth) of the points strictly between the two ends.
    let smooth: Vec<(f64, f64)> = points
        .iter()
        .filter(|(_, d)| *d > 1.0 && *d < factor)
        .map(|(w, d)| (1.0 / w, (1.0 / d - 1.0 / factor) / (1.0 - 1.0 / factor)))
        .collect();
    let mut all = vec![made(4.0, 8192.0)];
    // smooth = (original / w - low) / (high - low)
    all.extend(smooth.iter().map(|(x, s)| made(4.0, (3.0 * s + 1.0) / x)));
    if let (Some(a), Some(b)) = (smooth.first(), smooth.last())
        && a.0 != b.0
    {
        let slope = (a.1 - b.1) / (a.0 - b.0);
        let intercept = a.1 - slope * a.0;
        let span = -Llama3::LOW / intercept;
        all.push(made(
            ((span + Llama3::LOW) * 1e3).round() / 1e3,
            slope * span,
        ));
    }
    // Without a point between the ends, any length that separates them gives the same frequencies.
    all.extend((4..24).map(|power| made(4.0, f64::from(1u32 << power))));
    all
}

fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::f32::consts::TAU as TAU_F32;

    /// Computes the divisors with the converter's own arithmetic, in f32.
    ///
    /// Source: convert_hf_to_gguf.py, `generate_extra_tensors`.
    fn converted(dim: usize, theta: f32, factor: f32, high: f32, original: f32) -> Vec<f32> {
        let divisor = |i: usize| {
            let wavelength = TAU_F32 * theta.powf(2.0 * i as f32 / dim as f32);
            if wavelength < original / high {
                1.0
            } else if wavelength > original {
                factor
            } else {
                let smooth = (original / wavelength - 1.0) / (high - 1.0);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        (0..dim / 2).map(divisor).collect()
    }

    fn dims(rotary_dim: usize, rope_theta: f64) -> Dims {
        Dims::for_rope(rotary_dim, rope_theta)
    }

    #[test]
    fn llama3_parameters_are_found_again() {
        // Llama 3.1, Llama 3.2, and two unused variants.
        let cases = [
            (128, 500000.0, 8.0, 4.0, 8192.0),
            (64, 500000.0, 32.0, 4.0, 8192.0),
            (64, 10000.0, 16.0, 4.0, 1000.0),
            (96, 20000.0, 4.0, 8.0, 3000.0),
        ];
        for (dim, theta, factor, high, original) in cases {
            let freqs = converted(dim, theta, factor, high, original);
            let found = llama3(&freqs, &dims(dim, f64::from(theta))).unwrap();
            let get = |key: &str| found[key].as_f64().unwrap();
            assert_eq!(
                (get("factor"), get("low_freq_factor")),
                (f64::from(factor), 1.0)
            );
            assert_eq!(get("high_freq_factor"), f64::from(high), "{found}");
            assert_eq!(get("original_max_position_embeddings"), f64::from(original));
        }
    }

    #[test]
    fn factors_that_do_nothing_are_none_and_others_are_listed() {
        let dims = dims(8, 10000.0);
        assert_eq!(llama3(&[1.0; 4], &dims).unwrap(), Value::Null);
        let listed = llama3(&[1.0, 2.0, 1.0, 3.1], &dims).unwrap();
        let factors = json!([1.0, 2.0, 1.0, 3.1]);
        assert_eq!(
            (&listed["short_factor"], &listed["long_factor"]),
            (&factors, &factors)
        );
        assert_eq!(listed["attention_factor"], 1.0);
        for bad in [&[1.0; 3][..], &[1.0, 1.0, 1.0, f32::NAN], &[0.0; 4]] {
            assert!(llama3(bad, &dims).is_err(), "{bad:?}");
        }
    }
}

//! Settings of compressed weights in `config.json`.
#![forbid(unsafe_code)]

use super::parts::HINT;
use serde_json::{Map, Value};
use upg_kernel::{Error, ErrorKind, Result};

/// Keys of `config.json` that may hold the settings; the last one alone up to version 0.3.
const KEYS: [&str; 3] = [
    "quantization_config",
    "compression_config",
    "sparsity_config",
];

/// Pattern of the nonzero weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SparseFormat {
    /// Any pattern.
    Any,
    /// Two of four adjacent weights in a row.
    TwoOfFour,
}

/// Formats of `sparsity_config` by name; `None` for one that compresses nothing.
const SPARSE_FORMATS: [(&str, Option<SparseFormat>); 3] = [
    ("dense", None),
    ("sparse-bitmask", Some(SparseFormat::Any)),
    ("sparse-24-bitmask", Some(SparseFormat::TwoOfFour)),
];

/// Bit widths whose packing is the same in every version of the package.
///
/// Others end at word boundaries in old versions, but not in new ones.
const BITS: [u64; 3] = [2, 4, 8];

/// Scheme by which integers become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Scheme {
    /// Bits of an integer: 2, 4 or 8.
    pub bits: usize,
    /// Columns that share a scale; `None`: the whole row.
    pub group: Option<usize>,
    /// Flag: there are no zero points.
    pub symmetric: bool,
}

/// Compression of the weights of a model.
///
/// With neither field the weights are plain, and the config says so.
#[derive(Debug)]
pub(in super::super) struct Compression {
    pub(super) sparse: Option<SparseFormat>,
    /// Schemes of `pack-quantized`.
    pub(super) schemes: Vec<Scheme>,
}

impl Compression {
    /// Reads the compression from `config`; `None` if nothing is compressed.
    ///
    /// Errors: `Unsupported` for a method other than `compressed-tensors`, for an unsupported
    /// format, and for quantization of more than weights.
    pub fn of(config: &Value) -> Result<Option<Self>> {
        let given = |key: &str| config.get(key).filter(|value| !value.is_null());
        if KEYS.iter().all(|key| given(key).is_none()) {
            return Ok(None);
        }
        let nothing = Value::Object(Map::new());
        // The method has a name in all versions that write the first of the keys.
        let (quantization, is_known) = match (given(KEYS[0]), given(KEYS[1])) {
            (Some(quantization), _) => (quantization, false),
            (None, Some(quantization)) => (quantization, quantization.is_object()),
            (None, None) => (&nothing, true),
        };
        let method = quantization.get("quant_method").and_then(Value::as_str);
        if method != Some("compressed-tensors") && !(method.is_none() && is_known) {
            let message = format!("weights already quantized ({})", method.unwrap_or("?"));
            return Err(Error::new(ErrorKind::Unsupported, message).hint(HINT));
        }
        for key in ["kv_cache_scheme", "transform_config"] {
            if !is_empty(quantization.get(key)) {
                return Err(unsupported(&format!("with a '{key}'")));
            }
        }
        let sparsity = quantization.get(KEYS[2]).or(given(KEYS[2]));
        let sparse = match sparsity.filter(|s| !is_empty(Some(s))) {
            None => None,
            Some(sparsity) => {
                let format = text(sparsity, "format");
                let known = SPARSE_FORMATS.iter().find(|(name, _)| *name == format);
                known
                    .ok_or_else(|| unsupported(&format!("of format '{format}'")))?
                    .1
            }
        };
        let schemes = schemes(quantization)?;
        if sparse.is_some() && !schemes.is_empty() {
            return Err(unsupported("both sparse and quantized"));
        }
        Ok(Some(Self { sparse, schemes }))
    }
}

/// Returns the text of a config whose weights are no longer compressed.
pub(in super::super) fn without_compression(config: &Value) -> String {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        KEYS.iter().for_each(|key| {
            object.shift_remove(*key);
        });
    }
    format!("{config:#}")
}

/// Returns the distinct schemes of the groups of a `quantization_config`.
fn schemes(quantization: &Value) -> Result<Vec<Scheme>> {
    let format = quantization.get("format").and_then(Value::as_str);
    let groups = match quantization.get("config_groups") {
        groups if is_empty(groups) => None,
        Some(Value::Object(groups)) => Some(groups),
        _ => return Err(unsupported("with 'config_groups' that are not described")),
    };
    let Some(groups) = groups else {
        return match format {
            None | Some("dense") => Ok(Vec::new()),
            Some(format) => Err(unsupported(&format!("of format '{format}'"))),
        };
    };
    let mut schemes = Vec::new();
    for group in groups.values() {
        let own = group.get("format").and_then(Value::as_str);
        let format = own.or(format).unwrap_or("?");
        if format != "pack-quantized" {
            return Err(unsupported(&format!("of format '{format}'")));
        }
        for key in ["input_activations", "output_activations"] {
            if !is_empty(group.get(key)) {
                return Err(unsupported(&format!("with '{key}'")));
            }
        }
        let scheme = scheme(group.get("weights").unwrap_or(&Value::Null))?;
        if !schemes.contains(&scheme) {
            schemes.push(scheme);
        }
    }
    Ok(schemes)
}

/// Reads the `weights` of a group.
fn scheme(weights: &Value) -> Result<Scheme> {
    let kind = weights.get("type").map_or("int", |_| text(weights, "type"));
    let bits = weights.get("num_bits").and_then(Value::as_u64);
    let bits = bits.filter(|bits| kind == "int" && BITS.contains(bits));
    let Some(bits) = bits else {
        let bits = weights.get("num_bits").unwrap_or(&Value::Null);
        return Err(unsupported(&format!(
            "as {kind} of {bits} bits, expected int of 2, 4 or 8"
        )));
    };
    let size = weights.get("group_size").and_then(Value::as_i64);
    let strategy = match (text(weights, "strategy"), size) {
        ("?", Some(-1)) => "channel",
        ("?", Some(_)) => "group",
        (strategy, _) => strategy,
    };
    let group = match (strategy, size.and_then(|size| usize::try_from(size).ok())) {
        ("channel", _) => None,
        ("group", Some(size)) if size > 0 => Some(size),
        _ => {
            let size = weights.get("group_size").unwrap_or(&Value::Null);
            return Err(unsupported(&format!(
                "by the strategy '{strategy}' with a group size of {size}, expected 'group' or 'channel'"
            )));
        }
    };
    Ok(Scheme {
        bits: bits as usize,
        group,
        symmetric: weights.get("symmetric") != Some(&Value::Bool(false)),
    })
}

/// Returns a text of an object, `?` if there is none.
fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or("?")
}

/// Returns whether a value is absent, `null`, or an object or list without entries.
fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(object)) => object.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    }
}

fn unsupported(how: &str) -> Error {
    let message = format!("weights compressed by compressed-tensors {how}");
    Error::new(ErrorKind::Unsupported, message).hint(HINT)
}

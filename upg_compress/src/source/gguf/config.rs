//! `config.json` and `generation_config.json` rebuilt from the metadata of a GGUF file.
//!
//! The fields are those that transformers reads. `rope_theta` and `rope_scaling` have the older
//! form, which every version of it understands. Dropout, initializer and training fields are not in
//! a GGUF file, and so not in the config.
#![forbid(unsafe_code)]

use super::dims::{Dims, FromTensors};
use super::families::{Family, Window, family};
use super::metadata::Metadata;
use super::rope;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use upg_kernel::{Error, ErrorKind, Result};

/// Checks that the file is a language model; returns its family and sizes.
///
/// `vocab` is the number of rows of the embeddings. Errors: `Unsupported` (families, variants),
/// `Missing`, `Malformed`, `Invalid`.
pub(super) fn read_dims(m: &Metadata<'_>, vocab: usize) -> Result<(&'static Family, Dims)> {
    let arch = check_kind(m)?;
    let key = |name: &str| format!("{arch}.{name}");
    let window = m
        .number(&key("attention.sliding_window"))?
        .filter(|w| *w > 0);
    let family = family(&arch, window.is_some())?;
    if m.number(&key("expert_count"))?.unwrap_or(0) > 0 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a mixture-of-experts model, which no supported family has",
        ));
    }
    let hidden = m.required(&key("embedding_length"))?;
    let heads = m.required(&key("attention.head_count"))?;
    let head_dim = match m.number(&key("attention.key_length"))? {
        Some(n) => n,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{hidden} hidden values for {heads} heads"),
            ));
        }
    };
    let value_length = m.number(&key("attention.value_length"))?;
    if value_length.is_some_and(|v| v != head_dim) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("values of another length ({value_length:?}) than keys ({head_dim})"),
        ));
    }
    let eps = m.float(&key("attention.layer_norm_rms_epsilon"))?;
    let dims = Dims {
        hidden,
        layers: m.required(&key("block_count"))?,
        heads,
        kv_heads: m.number(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        ffn: m.required(&key("feed_forward_length"))?,
        vocab,
        context: m.required(&key("context_length"))?,
        rotary_dim: m.number(&key("rope.dimension_count"))?.unwrap_or(head_dim),
        rope_theta: m.float(&key("rope.freq_base"))?.unwrap_or(10000.0),
        rms_eps: eps
            .ok_or_else(|| Error::new(ErrorKind::Missing, "no attention.layer_norm_rms_epsilon"))?,
        sliding_window: window,
    };
    family.check(&dims)?;
    Ok((family, dims))
}

/// Returns the architecture if the file is a language model.
fn check_kind(m: &Metadata<'_>) -> Result<String> {
    let unsupported = |message: String| Error::new(ErrorKind::Unsupported, message);
    if let Some(kind) = m.text("general.type")?.filter(|kind| kind != "model") {
        return Err(
            unsupported(format!("a GGUF file of type {kind:?}, not a model"))
                .hint("pass the file of the language model itself"),
        );
    }
    m.text("general.architecture")?
        .ok_or_else(|| Error::new(ErrorKind::Missing, "no metadata key general.architecture"))
}

/// Returns the text of `config.json`. Errors: those of the rope scaling.
pub(super) fn config_json(
    m: &Metadata<'_>,
    family: &Family,
    dims: &Dims,
    tensors: &FromTensors,
) -> Result<String> {
    let id = |name: &str| m.token_id(name, dims.vocab);
    let mut config = Map::new();
    let mut set = |key: &str, value: Value| config.insert(key.to_owned(), value);
    set("architectures", json!([family.class]));
    set("model_type", json!(family.model_type));
    set("torch_dtype", json!(tensors.torch_dtype));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(dims.hidden));
    set("intermediate_size", json!(dims.ffn));
    set("num_hidden_layers", json!(dims.layers));
    set("num_attention_heads", json!(dims.heads));
    set("num_key_value_heads", json!(dims.kv_heads));
    let derived =
        dims.hidden.is_multiple_of(dims.heads) && dims.hidden / dims.heads == dims.head_dim;
    // Qwen3's head dimension defaults to 128 for any other sizes.
    if !derived || family.keys.head_dim {
        set("head_dim", json!(dims.head_dim));
    }
    set("max_position_embeddings", json!(dims.context));
    set("rms_norm_eps", json!(dims.rms_eps));
    set("vocab_size", json!(dims.vocab));
    set("tie_word_embeddings", json!(tensors.tied));
    set("bos_token_id", json!(id("bos")?));
    set("eos_token_id", json!(id("eos")?));
    set("pad_token_id", json!(id("padding")?));
    set("use_cache", json!(true));
    set("attention_dropout", json!(0.0));
    if family.keys.attention_bias {
        set("attention_bias", json!(tensors.attention_bias));
    }
    if family.keys.mlp_bias {
        set("mlp_bias", json!(tensors.mlp_bias));
    }
    match family.keys.window {
        Window::Absent => {}
        Window::Size => drop(set("sliding_window", json!(dims.sliding_window))),
        Window::Off => {
            set("use_sliding_window", json!(false));
            set("sliding_window", json!(null));
        }
    }
    set("rope_theta", json!(dims.rope_theta));
    if family.keys.longrope {
        let original = m.number("phi3.rope.scaling.original_context_length")?;
        let original = original.unwrap_or(dims.context);
        set("original_max_position_embeddings", json!(original));
        set("partial_rotary_factor", json!(dims.partial_rotary_factor()));
        set("rope_scaling", rope::longrope(m, dims, tensors, original)?);
    } else {
        set(
            "rope_scaling",
            rope::scaling(m, family.arch, dims, tensors)?,
        );
    }
    pretty(&Value::Object(config))
}

/// Returns the text of `generation_config.json`: the special tokens, every token that ends an
/// answer, and the recommended options of sampling.
///
/// The latter are those in the metadata, and `known`, the tokens of the vocabulary that are known
/// to end answers.
pub(super) fn generation_config_json(
    m: &Metadata<'_>,
    vocab: usize,
    known: &[u32],
) -> Result<String> {
    let mut ends: Vec<u32> = Vec::new();
    for name in ["eos", "eot", "eom"] {
        ends.extend(m.token_id(name, vocab)?);
    }
    ends.extend(known);
    let mut seen = HashSet::new();
    ends.retain(|id| seen.insert(*id));
    let eos = match ends.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        several => json!(several),
    };
    let mut config = json!({
        "bos_token_id": m.token_id("bos", vocab)?,
        "eos_token_id": eos,
        "pad_token_id": m.token_id("padding", vocab)?,
    });
    for (key, name) in SAMPLING {
        if let Some(value) = m.recommended(key) {
            config[name] = value;
        }
    }
    pretty(&config)
}

/// Recommended options of sampling, with their names in `generation_config.json`.
const SAMPLING: [(&str, &str); 5] = [
    ("general.sampling.temp", "temperature"),
    ("general.sampling.top_k", "top_k"),
    ("general.sampling.top_p", "top_p"),
    ("general.sampling.min_p", "min_p"),
    ("general.sampling.penalty_repeat", "repetition_penalty"),
];

fn pretty(value: &Value) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|e| Error::new(ErrorKind::Invalid, format!("cannot write the config: {e}")))
}

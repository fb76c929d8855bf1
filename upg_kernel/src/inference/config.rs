//! Validated `config.json` of a model: the computation of the forward pass, as data.
//!
//! The text is untrusted. Every setting that would change the arithmetic and is not implemented is
//! refused (`Unsupported`), never ignored. Every size has a limit.
#![forbid(unsafe_code)]

mod family;
mod fields;
mod rope;

pub use family::{FAMILIES, Family};
pub use rope::{RopeConfig, RopeScaling};

use crate::error::{Error, ErrorKind, Result};
use crate::format::json;
use family::{BiasRule, WindowRule};
use fields::Fields;
use serde_json::{Map, Value};

/// Maximum decoder layers of a config.
pub const MAX_LAYERS: usize = 1024;
/// Maximum attention heads.
pub const MAX_HEADS: usize = 1024;
/// Maximum head dimension.
pub const MAX_HEAD_DIM: usize = 4096;
/// Maximum hidden size.
pub const MAX_HIDDEN: usize = 1 << 17;
/// Maximum feed-forward size.
pub const MAX_INTERMEDIATE: usize = 1 << 20;
/// Maximum vocabulary size.
pub const MAX_VOCAB: usize = 1 << 22;
/// Maximum context length.
pub const MAX_CONTEXT: usize = 1 << 24;
/// Maximum end-of-sequence ids.
const MAX_EOS_IDS: usize = 256;

/// Configuration of a decoder, created and validated by [`ModelConfig::from_json`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Model family.
    pub family: &'static Family,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Size of the hidden state.
    pub hidden_size: usize,
    /// Size of the feed-forward state.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Maximum positions of the model.
    pub context: usize,
    /// Constant added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Positions that a query attends to in each layer, including its own; `None`: all.
    pub windows: Vec<Option<usize>>,
    /// Flag: the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Flag: q, k and v have a bias.
    pub qkv_bias: bool,
    /// Flag: the attention output has a bias.
    pub output_bias: bool,
    /// Flag: gate, up and down have a bias.
    pub mlp_bias: bool,
    /// End-of-sequence ids of `generation_config.json`, then the others of `config.json`.
    pub eos_ids: Vec<u32>,
    /// Begin-of-sequence id, if the config names one.
    pub bos_id: Option<u32>,
    /// Settings that are ignored, each as a sentence for a note.
    pub notes: Vec<String>,
}

impl ModelConfig {
    /// Reads `config.json` and, for the end-of-sequence ids, `generation_config.json`.
    ///
    /// Both spellings of the rotary embedding are accepted: `rope_theta` with
    /// `rope_scaling`, and `rope_parameters`. Absent keys have the defaults of Hugging Face
    /// transformers, but sizes are required.
    ///
    /// Errors: `Malformed` (not a JSON object), `Missing` (a size), `Invalid` (a value of the wrong
    /// type, zero, or inconsistent sizes), `TooLarge` (above the limit of a size, or of
    /// [`json::value`]), `Unsupported` (another family, or arithmetic that is not implemented).
    pub fn from_json(config_json: &str, generation_config: Option<&str>) -> Result<Self> {
        let config = parse_object("config.json", config_json)?;
        let generation = generation_config
            .map(|text| parse_object("generation_config.json", text))
            .transpose()?;
        let fields = Fields {
            document: "config.json",
            map: &config,
        };
        let family = Family::of(&fields)?;
        refuse_foreign_arithmetic(&fields)?;

        let hidden_size = fields.required_size("hidden_size", MAX_HIDDEN)?;
        let num_layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
        let num_heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
        let num_kv_heads = fields
            .size("num_key_value_heads", MAX_HEADS)?
            .or(family.default_kv_heads)
            .unwrap_or(num_heads);
        let head_dim = head_dim(&fields, family, hidden_size, num_heads)?;
        let mut context = fields.required_size("max_position_embeddings", MAX_CONTEXT)?;
        let rope = rope::parse(&fields, family, head_dim, &mut context)?;
        let bias = |rule| match rule {
            BiasRule::Never => Ok(false),
            BiasRule::Always => Ok(true),
            BiasRule::Flag(key) => fields.flag(key, false),
        };
        let config = Self {
            family,
            vocab_size: fields.required_size("vocab_size", MAX_VOCAB)?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size", MAX_INTERMEDIATE)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            context,
            rms_norm_eps: fields
                .positive("rms_norm_eps")?
                .unwrap_or(family.default_norm_eps) as f32,
            rope,
            windows: windows(&fields, family, num_layers, context)?,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            qkv_bias: bias(family.qkv_bias)?,
            output_bias: bias(family.output_bias)?,
            mlp_bias: bias(family.mlp_bias)?,
            eos_ids: eos_ids(&fields, generation.as_ref())?,
            bos_id: fields.token_ids("bos_token_id", 1)?.first().copied(),
            notes: notes(&fields),
        };
        config.check()?;
        Ok(config)
    }

    /// Returns the rows of the query projection.
    pub fn query_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Returns the rows of the key projection, and of the value projection.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Checks the relations that the forward pass relies on.
    ///
    /// Runs again when a model is created from a config, because its fields are public.
    pub(crate) fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("hidden_size", self.hidden_size, MAX_HIDDEN),
            (
                "intermediate_size",
                self.intermediate_size,
                MAX_INTERMEDIATE,
            ),
            ("num_hidden_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_heads, MAX_HEADS),
            ("num_key_value_heads", self.num_kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("max_position_embeddings", self.context, MAX_CONTEXT),
        ];
        for (name, found, cap) in sizes {
            if !(1..=cap).contains(&found) {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("config.json: '{name}' is {found}, expected 1 to {cap}"),
                ));
            }
        }
        let invalid = |message: String| {
            Err(Error::new(
                ErrorKind::Invalid,
                format!("config.json: {message}"),
            ))
        };
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return invalid(format!(
                "{} attention heads cannot share {} key/value heads evenly",
                self.num_heads, self.num_kv_heads
            ));
        }
        if self.windows.len() != self.num_layers || self.windows.contains(&Some(0)) {
            return invalid(format!(
                "{} attention windows for {} layers, expected one each, none of them 0",
                self.windows.len(),
                self.num_layers
            ));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return invalid(format!(
                "'rms_norm_eps' is {}, expected a finite number above 0",
                self.rms_norm_eps
            ));
        }
        self.rope.check(self.head_dim)
    }
}

fn parse_object(document: &str, text: &str) -> Result<Map<String, Value>> {
    match json::value(document, text)? {
        Value::Object(map) => Ok(map),
        _ => Err(Error::new(
            ErrorKind::Malformed,
            format!("{document}: not a JSON object"),
        )),
    }
}

/// Keys of other architectures that change the arithmetic,
/// each with its neutral number, if any.
///
/// `null`, `false`, and an empty text, list or object are always neutral.
const FOREIGN_KEYS: &[(&str, Option<f64>)] = &[
    ("alibi", None),
    ("attention_chunk_size", None),
    ("attention_multiplier", None),
    ("attn_logit_softcapping", None),
    ("clip_qkv", None),
    ("embedding_multiplier", Some(1.0)),
    ("final_logit_softcapping", None),
    ("first_k_dense_replace", None),
    ("is_encoder_decoder", None),
    ("kv_lora_rank", None),
    ("logit_scale", Some(1.0)),
    ("logits_scaling", Some(1.0)),
    ("moe_intermediate_size", None),
    ("n_routed_experts", Some(0.0)),
    ("no_rope_layers", None),
    ("num_experts", Some(0.0)),
    ("num_local_experts", Some(0.0)),
    ("parallel_residual", None),
    ("q_lora_rank", None),
    ("qk_layernorm", None),
    ("quantization_config", None),
    ("query_pre_attn_scalar", None),
    ("residual_multiplier", Some(1.0)),
    ("rope_interleaved", None),
    ("scale_emb", Some(1.0)),
    ("text_config", None),
    ("use_mrope", None),
    ("use_parallel_residual", None),
    ("use_qk_norm", None),
    ("vision_config", None),
];

fn refuse_foreign_arithmetic(fields: &Fields<'_>) -> Result<()> {
    for &(key, neutral) in FOREIGN_KEYS {
        let harmless = match fields.get(key) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Bool(true)) => false,
            Some(Value::Number(n)) => neutral.is_some() && n.as_f64() == neutral,
            Some(Value::String(text)) => text.is_empty(),
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
        };
        if !harmless {
            return Err(fields.error(
                ErrorKind::Unsupported,
                format_args!("'{key}' requires arithmetic that is not implemented"),
            ));
        }
    }
    // SiLU has two names.
    match fields.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(()),
        other => Err(fields.error(
            ErrorKind::Unsupported,
            format_args!("'hidden_act' is '{other}', only 'silu' is implemented"),
        )),
    }
}

fn head_dim(
    fields: &Fields<'_>,
    family: &Family,
    hidden_size: usize,
    num_heads: usize,
) -> Result<usize> {
    if let Some(dim) = fields
        .size("head_dim", MAX_HEAD_DIM)?
        .or(family.default_head_dim)
    {
        return Ok(dim);
    }
    if !hidden_size.is_multiple_of(num_heads) {
        return Err(fields.error(
            ErrorKind::Invalid,
            format_args!(
                "'hidden_size' {hidden_size} is not a multiple of 'num_attention_heads' \
                 {num_heads}, and there is no 'head_dim'"
            ),
        ));
    }
    match hidden_size / num_heads {
        dim if dim <= MAX_HEAD_DIM => Ok(dim),
        dim => Err(fields.error(
            ErrorKind::TooLarge,
            format_args!(
                "'hidden_size' {hidden_size} makes {num_heads} heads of {dim}, at most {MAX_HEAD_DIM}"
            ),
        )),
    }
}

/// Returns the attention window of each layer. A window of at least the context is none.
fn windows(
    fields: &Fields<'_>,
    family: &Family,
    num_layers: usize,
    context: usize,
) -> Result<Vec<Option<usize>>> {
    let is_used = match family.window {
        WindowRule::None => fields.flag("use_sliding_window", true)?,
        WindowRule::EveryLayer => true,
        WindowRule::ByLayer => fields.flag("use_sliding_window", false)?,
    };
    let given = match fields.map.get("sliding_window") {
        _ if !is_used => None,
        // Absent and null differ: only an absent key has the default of the family.
        None => family.default_window,
        // Two other spellings of null, which kernels of attention define.
        Some(value) if matches!(value.as_i64(), Some(0 | -1)) => None,
        Some(_) => fields.size("sliding_window", usize::MAX)?,
    };
    let narrow = given.filter(|&window| window < context);
    if let (WindowRule::None, Some(window)) = (family.window, narrow) {
        return Err(fields.error(
            ErrorKind::Unsupported,
            format_args!(
                "'sliding_window' is {window}, but family '{}' has no sliding window",
                family.name
            ),
        ));
    }
    match fields.get("layer_types") {
        Some(types) => windows_of_types(fields, family, types, num_layers, given)
            .map(|windows| windows.into_iter().map(|w| w.and(narrow)).collect()),
        None if matches!(family.window, WindowRule::ByLayer) => {
            let first = match fields.map.get("max_window_layers") {
                // Zero is valid here, unlike for a size.
                Some(value) => value.as_u64().ok_or_else(|| {
                    fields.error(
                        ErrorKind::Invalid,
                        "'max_window_layers' is not a whole number",
                    )
                })?,
                None => family::DEFAULT_MAX_WINDOW_LAYERS,
            };
            Ok((0..num_layers as u64)
                .map(|layer| narrow.filter(|_| layer >= first))
                .collect())
        }
        None => Ok(vec![narrow; num_layers]),
    }
}

/// Reads `layer_types`: a name for each layer.
fn windows_of_types(
    fields: &Fields<'_>,
    family: &Family,
    types: &Value,
    num_layers: usize,
    given: Option<usize>,
) -> Result<Vec<Option<usize>>> {
    let types = types
        .as_array()
        .filter(|types| types.len() == num_layers)
        .ok_or_else(|| {
            fields.error(
                ErrorKind::Invalid,
                format_args!("'layer_types' is not a list of {num_layers} names"),
            )
        })?;
    types
        .iter()
        .map(|name| match (name.as_str(), given) {
            (Some("full_attention"), Some(_)) if !matches!(family.window, WindowRule::ByLayer) => {
                Err(fields.error(
                    ErrorKind::Unsupported,
                    format_args!(
                        "'layer_types' mixes full and sliding attention, which family '{}' does \
                         not define",
                        family.name
                    ),
                ))
            }
            (Some("full_attention"), _) => Ok(None),
            (Some("sliding_attention"), Some(window)) => Ok(Some(window)),
            (Some("sliding_attention"), None) => Err(fields.error(
                ErrorKind::Invalid,
                "'layer_types' has sliding attention, but there is no 'sliding_window' in use",
            )),
            _ => Err(fields.error(
                ErrorKind::Unsupported,
                format_args!(
                    "'layer_types' has {name}, known are full_attention and sliding_attention"
                ),
            )),
        })
        .collect()
}

fn eos_ids(fields: &Fields<'_>, generation: Option<&Map<String, Value>>) -> Result<Vec<u32>> {
    let mut ids = match generation {
        Some(map) => {
            let document = "generation_config.json";
            Fields { document, map }.token_ids("eos_token_id", MAX_EOS_IDS)?
        }
        None => Vec::new(),
    };
    for id in fields.token_ids("eos_token_id", MAX_EOS_IDS)? {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn notes(fields: &Fields<'_>) -> Vec<String> {
    rope::ignored(fields)
        .map(|key| {
            format!("config.json: '{key}' of the rotary embedding is ignored, as in transformers")
        })
        .collect()
}

#[cfg(test)]
mod tests;

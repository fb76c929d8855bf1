//! Model families, as data.
#![forbid(unsafe_code)]

use super::fields::Fields;
use crate::error::{ErrorKind, Result};

/// Condition for the bias of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum BiasRule {
    Never,
    Always,
    /// The layer has a bias if this key of the config is true.
    Flag(&'static str),
}

/// Layers with a sliding window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum WindowRule {
    /// The family has no window.
    None,
    /// `sliding_window`, if set, applies to every layer.
    EveryLayer,
    /// With `use_sliding_window`: the layers of `layer_types`, or from `max_window_layers` on.
    ByLayer,
}

/// Default of `max_window_layers`.
pub(super) const DEFAULT_MAX_WINDOW_LAYERS: u64 = 28;

/// Properties of a family. The defaults are those of transformers.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// Name, the `model_type` in `config.json`.
    pub name: &'static str,
    /// Flag: q, k, v are one matrix `qkv_proj`, and gate, up one matrix `gate_up_proj`.
    pub fused: bool,
    /// Flag: each head of q and k is normalized before the rotary embedding.
    pub qk_norm: bool,
    /// Flag: the rotary embedding may apply to only the first part of each head.
    pub partial_rotary: bool,
    pub(super) longrope: bool,
    pub(super) qkv_bias: BiasRule,
    pub(super) output_bias: BiasRule,
    pub(super) mlp_bias: BiasRule,
    pub(super) window: WindowRule,
    pub(super) default_window: Option<usize>,
    pub(super) default_head_dim: Option<usize>,
    pub(super) default_norm_eps: f64,
    /// Default key/value heads; `None`: as many as query heads.
    pub(super) default_kv_heads: Option<usize>,
    /// Default context before a rotary extension; `None`: `max_position_embeddings`.
    pub(super) default_original_context: Option<usize>,
}

/// Llama, the plain form from which the others differ.
const LLAMA: Family = Family {
    name: "llama",
    fused: false,
    qk_norm: false,
    partial_rotary: false,
    longrope: false,
    qkv_bias: BiasRule::Flag("attention_bias"),
    output_bias: BiasRule::Flag("attention_bias"),
    mlp_bias: BiasRule::Flag("mlp_bias"),
    window: WindowRule::None,
    default_window: None,
    default_head_dim: None,
    default_norm_eps: 1e-6,
    default_kv_heads: None,
    default_original_context: None,
};

/// Every family that the engine runs.
pub static FAMILIES: [Family; 5] = [
    LLAMA,
    Family {
        name: "mistral",
        qkv_bias: BiasRule::Never,
        output_bias: BiasRule::Never,
        mlp_bias: BiasRule::Never,
        window: WindowRule::EveryLayer,
        default_window: Some(4096),
        default_kv_heads: Some(8),
        ..LLAMA
    },
    Family {
        name: "qwen2",
        qkv_bias: BiasRule::Always,
        output_bias: BiasRule::Never,
        mlp_bias: BiasRule::Never,
        window: WindowRule::ByLayer,
        default_window: Some(4096),
        default_kv_heads: Some(32),
        ..LLAMA
    },
    Family {
        name: "qwen3",
        qk_norm: true,
        mlp_bias: BiasRule::Never,
        window: WindowRule::ByLayer,
        default_window: Some(4096),
        default_head_dim: Some(128),
        default_kv_heads: Some(32),
        ..LLAMA
    },
    Family {
        name: "phi3",
        fused: true,
        partial_rotary: true,
        longrope: true,
        qkv_bias: BiasRule::Never,
        output_bias: BiasRule::Never,
        mlp_bias: BiasRule::Never,
        window: WindowRule::EveryLayer,
        default_norm_eps: 1e-5,
        default_original_context: Some(4096),
        ..LLAMA
    },
];

impl Family {
    /// Returns the family that `model_type` names.
    ///
    /// Errors: `Missing` (no `model_type`), `Unsupported` (another one; lists the known ones).
    pub(super) fn of(fields: &Fields<'_>) -> Result<&'static Self> {
        let name = fields
            .text("model_type")?
            .ok_or_else(|| fields.missing("model_type"))?;
        FAMILIES.iter().find(|f| f.name == name).ok_or_else(|| {
            let known: Vec<_> = FAMILIES.iter().map(|f| f.name).collect();
            fields.error(
                ErrorKind::Unsupported,
                format_args!(
                    "model_type '{}' is not supported, known are {}",
                    name.escape_debug(),
                    known.join(", ")
                ),
            )
        })
    }
}

//! Names and shapes of the tensors of each family, in GGUF and in transformers.
//!
//! Source: llama.cpp's `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`; checked
//! against the `gguf` package (see the tests).
#![forbid(unsafe_code)]

use super::dims::Dims;
use upg_kernel::{Error, ErrorKind, Result};

/// Model family, as data.
#[derive(Debug)]
pub(in crate::source) struct Family {
    /// Name in GGUF, `general.architecture`.
    pub(in crate::source) arch: &'static str,
    /// Name in transformers, `model_type`.
    pub(in crate::source) model_type: &'static str,
    /// Class in transformers, `architectures`.
    pub(in crate::source) class: &'static str,
    /// Keys of its `config.json` that not every family has.
    pub(in crate::source) keys: Keys,
    /// Tensors of one layer.
    layer: &'static [Slot],
}

/// Keys of `config.json` in which families differ. There is no default: a new family says each.
#[derive(Debug)]
pub(in crate::source) struct Keys {
    /// Set if there is a `head_dim` even where it is the hidden size over the number of heads.
    pub(in crate::source) head_dim: bool,
    pub(in crate::source) attention_bias: bool,
    pub(in crate::source) mlp_bias: bool,
    pub(in crate::source) window: Window,
    /// Set if a part of each head may be rotated, with longrope scaling.
    pub(in crate::source) longrope: bool,
}

/// Keys of a sliding window.
#[derive(Debug)]
pub(in crate::source) enum Window {
    Absent,
    /// `sliding_window`.
    Size,
    /// `use_sliding_window` too, which is false: llama.cpp stores no window for these families.
    Off,
}

/// Tensor of a layer: GGUF name, Hugging Face name, shape, and whether it is required.
#[derive(Debug)]
struct Slot(&'static str, &'static str, &'static [Dim], Need);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Required,
    /// Optional bias: a file has all biases of a part (attention, feed-forward) or none of them.
    Optional,
}

/// Dimension of a tensor, named by its role in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dim {
    Hidden,
    /// Rows of q: heads x head_dim.
    Query,
    /// Rows of k and v: kv_heads x head_dim.
    KeyValue,
    /// Rows of the fused q, k and v.
    QueryKeyValue,
    Head,
    Ffn,
    /// Rows of the fused gate and up.
    GateUp,
}

/// Order of the rows of a tensor in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::source) enum RowOrder {
    Same,
    /// The two halves of a rotary pair are adjacent, in q and k of the llama architecture.
    ///
    /// llama.cpp stores them like this (`permute` in convert_hf_to_gguf.py); in transformers they
    /// are half a head apart.
    Interleaved {
        head_dim: usize,
    },
}

impl RowOrder {
    /// Returns the row of the file that holds row `row` of the model.
    pub(in crate::source) fn stored_row(self, row: usize) -> usize {
        match self {
            Self::Same => row,
            Self::Interleaved { head_dim } => {
                let (head, in_head) = (row / head_dim, row % head_dim);
                let half = head_dim / 2;
                head * head_dim + 2 * (in_head % half) + in_head / half
            }
        }
    }
}

/// Tensor that the model has: its names, shape and row order.
#[derive(Debug)]
pub(in crate::source) struct ExpectedTensor {
    pub(in crate::source) gguf: String,
    pub(in crate::source) hf: String,
    pub(in crate::source) shape: Vec<usize>,
    pub(in crate::source) order: RowOrder,
    pub(in crate::source) required: bool,
}

use Dim::{Ffn, GateUp, Head, Hidden, KeyValue, Query, QueryKeyValue};
use Need::{Optional, Required};

macro_rules! slots {
    ($($gguf:literal $hf:literal $dims:tt $need:ident;)*) => { &[$(Slot($gguf, $hf, &$dims, $need),)*] };
}

const LLAMA: &[Slot] = slots! {
    "attn_norm.weight"   "input_layernorm.weight"          [Hidden] Required;
    "attn_q.weight"      "self_attn.q_proj.weight"         [Query, Hidden] Required;
    "attn_q.bias"        "self_attn.q_proj.bias"           [Query] Optional;
    "attn_k.weight"      "self_attn.k_proj.weight"         [KeyValue, Hidden] Required;
    "attn_k.bias"        "self_attn.k_proj.bias"           [KeyValue] Optional;
    "attn_v.weight"      "self_attn.v_proj.weight"         [KeyValue, Hidden] Required;
    "attn_v.bias"        "self_attn.v_proj.bias"           [KeyValue] Optional;
    "attn_output.weight" "self_attn.o_proj.weight"         [Hidden, Query] Required;
    "attn_output.bias"   "self_attn.o_proj.bias"           [Hidden] Optional;
    "ffn_norm.weight"    "post_attention_layernorm.weight" [Hidden] Required;
    "ffn_gate.weight"    "mlp.gate_proj.weight"            [Ffn, Hidden] Required;
    "ffn_gate.bias"      "mlp.gate_proj.bias"              [Ffn] Optional;
    "ffn_up.weight"      "mlp.up_proj.weight"              [Ffn, Hidden] Required;
    "ffn_up.bias"        "mlp.up_proj.bias"                [Ffn] Optional;
    "ffn_down.weight"    "mlp.down_proj.weight"            [Hidden, Ffn] Required;
    "ffn_down.bias"      "mlp.down_proj.bias"              [Hidden] Optional;
};

const QWEN2: &[Slot] = slots! {
    "attn_norm.weight"   "input_layernorm.weight"          [Hidden] Required;
    "attn_q.weight"      "self_attn.q_proj.weight"         [Query, Hidden] Required;
    "attn_q.bias"        "self_attn.q_proj.bias"           [Query] Required;
    "attn_k.weight"      "self_attn.k_proj.weight"         [KeyValue, Hidden] Required;
    "attn_k.bias"        "self_attn.k_proj.bias"           [KeyValue] Required;
    "attn_v.weight"      "self_attn.v_proj.weight"         [KeyValue, Hidden] Required;
    "attn_v.bias"        "self_attn.v_proj.bias"           [KeyValue] Required;
    "attn_output.weight" "self_attn.o_proj.weight"         [Hidden, Query] Required;
    "ffn_norm.weight"    "post_attention_layernorm.weight" [Hidden] Required;
    "ffn_gate.weight"    "mlp.gate_proj.weight"            [Ffn, Hidden] Required;
    "ffn_up.weight"      "mlp.up_proj.weight"              [Ffn, Hidden] Required;
    "ffn_down.weight"    "mlp.down_proj.weight"            [Hidden, Ffn] Required;
};

const QWEN3: &[Slot] = slots! {
    "attn_norm.weight"   "input_layernorm.weight"          [Hidden] Required;
    "attn_q.weight"      "self_attn.q_proj.weight"         [Query, Hidden] Required;
    "attn_q.bias"        "self_attn.q_proj.bias"           [Query] Optional;
    "attn_q_norm.weight" "self_attn.q_norm.weight"         [Head] Required;
    "attn_k.weight"      "self_attn.k_proj.weight"         [KeyValue, Hidden] Required;
    "attn_k.bias"        "self_attn.k_proj.bias"           [KeyValue] Optional;
    "attn_k_norm.weight" "self_attn.k_norm.weight"         [Head] Required;
    "attn_v.weight"      "self_attn.v_proj.weight"         [KeyValue, Hidden] Required;
    "attn_v.bias"        "self_attn.v_proj.bias"           [KeyValue] Optional;
    "attn_output.weight" "self_attn.o_proj.weight"         [Hidden, Query] Required;
    "attn_output.bias"   "self_attn.o_proj.bias"           [Hidden] Optional;
    "ffn_norm.weight"    "post_attention_layernorm.weight" [Hidden] Required;
    "ffn_gate.weight"    "mlp.gate_proj.weight"            [Ffn, Hidden] Required;
    "ffn_up.weight"      "mlp.up_proj.weight"              [Ffn, Hidden] Required;
    "ffn_down.weight"    "mlp.down_proj.weight"            [Hidden, Ffn] Required;
};

const PHI3: &[Slot] = slots! {
    "attn_norm.weight"   "input_layernorm.weight"          [Hidden] Required;
    "attn_qkv.weight"    "self_attn.qkv_proj.weight"       [QueryKeyValue, Hidden] Required;
    "attn_output.weight" "self_attn.o_proj.weight"         [Hidden, Query] Required;
    "ffn_norm.weight"    "post_attention_layernorm.weight" [Hidden] Required;
    "ffn_up.weight"      "mlp.gate_up_proj.weight"         [GateUp, Hidden] Required;
    "ffn_down.weight"    "mlp.down_proj.weight"            [Hidden, Ffn] Required;
};

/// Supported families.
///
/// llama.cpp converts Mistral to the architecture `llama` too. The second entry is chosen if the
/// file has a sliding window.
static FAMILIES: [Family; 5] = [
    Family {
        arch: "llama",
        model_type: "llama",
        class: "LlamaForCausalLM",
        keys: Keys {
            head_dim: false,
            attention_bias: true,
            mlp_bias: true,
            window: Window::Absent,
            longrope: false,
        },
        layer: LLAMA,
    },
    Family {
        arch: "llama",
        model_type: "mistral",
        class: "MistralForCausalLM",
        keys: Keys {
            head_dim: false,
            attention_bias: false,
            mlp_bias: false,
            window: Window::Size,
            longrope: false,
        },
        layer: LLAMA,
    },
    Family {
        arch: "qwen2",
        model_type: "qwen2",
        class: "Qwen2ForCausalLM",
        keys: Keys {
            head_dim: false,
            attention_bias: false,
            mlp_bias: false,
            window: Window::Off,
            longrope: false,
        },
        layer: QWEN2,
    },
    Family {
        arch: "qwen3",
        model_type: "qwen3",
        class: "Qwen3ForCausalLM",
        keys: Keys {
            head_dim: true,
            attention_bias: true,
            mlp_bias: false,
            window: Window::Off,
            longrope: false,
        },
        layer: QWEN3,
    },
    Family {
        arch: "phi3",
        model_type: "phi3",
        class: "Phi3ForCausalLM",
        keys: Keys {
            head_dim: false,
            attention_bias: false,
            mlp_bias: false,
            window: Window::Size,
            longrope: true,
        },
        layer: PHI3,
    },
];

/// Returns the family of `general.architecture`; `windowed`: the file has a sliding window.
///
/// Errors: `Unsupported`, with the names of the supported ones.
pub(in crate::source) fn family(arch: &str, windowed: bool) -> Result<&'static Family> {
    let mut matching = FAMILIES.iter().filter(|f| f.arch == arch);
    let chosen = match (matching.next(), matching.next()) {
        (Some(_), Some(second)) if windowed => Some(second),
        (first, _) => first,
    };
    chosen.ok_or_else(|| {
        let mut known: Vec<&str> = FAMILIES.iter().map(|f| f.arch).collect();
        known.dedup();
        Error::new(
            ErrorKind::Unsupported,
            format!("model architecture {arch:?}, expected {}", known.join(", ")),
        )
    })
}

/// Returns the family of a `model_type` of transformers. Errors: `Unsupported`.
pub(in crate::source) fn family_of_model_type(model_type: &str) -> Result<&'static Family> {
    let found = FAMILIES.iter().find(|f| f.model_type == model_type);
    found.ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.model_type).collect();
        Error::new(
            ErrorKind::Unsupported,
            format!(
                "model_type {model_type:?}, expected one of {}",
                known.join(", ")
            ),
        )
    })
}

impl Family {
    /// Checks that `dims` are in range, consistent and allowed in the family.
    pub(in crate::source) fn check(&self, dims: &Dims) -> Result<()> {
        dims.check()?;
        let (head_dim, rotary_dim) = (dims.head_dim, dims.rotary_dim);
        if rotary_dim != head_dim && !self.keys.longrope {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{rotary_dim} of {head_dim} head dimensions rotated, which no {} has",
                    self.class
                ),
            ));
        }
        Ok(())
    }

    /// Returns every tensor that a model of this family and these dimensions has or may have.
    pub(in crate::source) fn expected<'a>(
        &'a self,
        dims: &'a Dims,
    ) -> impl Iterator<Item = ExpectedTensor> + 'a {
        let (hidden, vocab) = (dims.hidden, dims.vocab);
        let outer = [
            (
                "token_embd.weight",
                "model.embed_tokens.weight",
                vec![vocab, hidden],
                true,
            ),
            (
                "output_norm.weight",
                "model.norm.weight",
                vec![hidden],
                true,
            ),
            (
                "output.weight",
                "lm_head.weight",
                vec![vocab, hidden],
                false,
            ),
        ];
        let outer = outer
            .into_iter()
            .map(|(gguf, hf, shape, required)| ExpectedTensor {
                gguf: gguf.to_owned(),
                hf: hf.to_owned(),
                shape,
                order: RowOrder::Same,
                required,
            });
        let layers = (0..dims.layers).flat_map(|i| self.layer.iter().map(move |slot| (i, slot)));
        outer.chain(layers.map(|(i, slot)| self.layer_tensor(i, slot, dims)))
    }

    fn layer_tensor(&self, layer: usize, slot: &Slot, dims: &Dims) -> ExpectedTensor {
        let Slot(gguf, hf, shape, need) = slot;
        let rotary = gguf.starts_with("attn_q.") || gguf.starts_with("attn_k.");
        let order = if self.arch == "llama" && rotary {
            RowOrder::Interleaved {
                head_dim: dims.head_dim,
            }
        } else {
            RowOrder::Same
        };
        ExpectedTensor {
            gguf: format!("blk.{layer}.{gguf}"),
            hf: format!("model.layers.{layer}.{hf}"),
            shape: shape.iter().map(|d| dims.size(*d)).collect(),
            order,
            required: *need == Required,
        }
    }
}

impl Dims {
    fn size(&self, dim: Dim) -> usize {
        let query = self.heads * self.head_dim;
        let key_value = self.kv_heads * self.head_dim;
        match dim {
            Hidden => self.hidden,
            Query => query,
            KeyValue => key_value,
            QueryKeyValue => query + 2 * key_value,
            Head => self.head_dim,
            Ffn => self.ffn,
            GateUp => 2 * self.ffn,
        }
    }
}

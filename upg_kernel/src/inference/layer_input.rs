//! The four activations that the matrices of a layer are multiplied by.
#![forbid(unsafe_code)]

use super::config::ModelConfig;

/// Activation that some matrices of a layer are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerInput {
    /// Input of queries, keys and values: `[n, hidden]`.
    Attention,
    /// Input of the output projection: `[n, query size]`.
    Output,
    /// Input of gate and up: `[n, hidden]`.
    FeedForward,
    /// Input of down: `[n, intermediate size]`.
    Down,
}

impl LayerInput {
    /// Returns the layer and the input of a matrix, given its Hugging Face name; `None` outside
    /// the layers.
    pub fn of(name: &str) -> Option<(usize, Self)> {
        let (index, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let input = match part {
            "self_attn.q_proj.weight"
            | "self_attn.k_proj.weight"
            | "self_attn.v_proj.weight"
            | "self_attn.qkv_proj.weight" => Self::Attention,
            "self_attn.o_proj.weight" => Self::Output,
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" | "mlp.gate_up_proj.weight" => {
                Self::FeedForward
            }
            "mlp.down_proj.weight" => Self::Down,
            _ => return None,
        };
        Some((index.parse().ok()?, input))
    }

    /// Returns the matrices of a layer with this input, and the number of rows of each.
    ///
    /// A matrix is named by the part of its name between `model.layers.N.` and `.weight`.
    pub fn matrices(self, config: &ModelConfig) -> Vec<(&'static str, usize)> {
        let (query, kv) = (config.query_size(), config.kv_size());
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        match (self, config.family.fused) {
            (Self::Attention, true) => vec![("self_attn.qkv_proj", query + 2 * kv)],
            (Self::Attention, false) => vec![
                ("self_attn.q_proj", query),
                ("self_attn.k_proj", kv),
                ("self_attn.v_proj", kv),
            ],
            (Self::Output, _) => vec![("self_attn.o_proj", hidden)],
            (Self::FeedForward, true) => vec![("mlp.gate_up_proj", 2 * mlp)],
            (Self::FeedForward, false) => vec![("mlp.gate_proj", mlp), ("mlp.up_proj", mlp)],
            (Self::Down, _) => vec![("mlp.down_proj", hidden)],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_input_of_a_matrix() {
        for (part, input) in [
            ("self_attn.q_proj", LayerInput::Attention),
            ("self_attn.k_proj", LayerInput::Attention),
            ("self_attn.v_proj", LayerInput::Attention),
            ("self_attn.qkv_proj", LayerInput::Attention),
            ("self_attn.o_proj", LayerInput::Output),
            ("mlp.gate_proj", LayerInput::FeedForward),
            ("mlp.up_proj", LayerInput::FeedForward),
            ("mlp.gate_up_proj", LayerInput::FeedForward),
            ("mlp.down_proj", LayerInput::Down),
        ] {
            let name = format!("model.layers.17.{part}.weight");
            assert_eq!(LayerInput::of(&name), Some((17, input)), "{name}");
        }
        for name in [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.layers.x.mlp.down_proj.weight",
            "model.layers.1.mlp.down_proj.bias",
            "model.layers.1.input_layernorm.weight",
        ] {
            assert_eq!(LayerInput::of(name), None, "{name}");
        }
    }
}

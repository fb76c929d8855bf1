//! One layer of a decoder: attention, then a gated feed-forward network.
#![forbid(unsafe_code)]

use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::layers::gated_silu;
use super::rope::RopeTable;
use super::weights::LayerWeights;
use crate::cpu::Cpu;
use crate::cpu::attention::{Attention, Plan, Shape};
use crate::cpu::product::{Scratch, Write};
use crate::error::Result;
use crate::kernels::Kernels;
use std::ops::Range;

/// What the matrices of a layer are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// Of queries, keys and values: `[n, hidden]`.
    Attention,
    /// Of the output projection: `[n, query size]`.
    Output,
    /// Of gate and up: `[n, hidden]`.
    FeedForward,
    /// Of down: `[n, intermediate size]`.
    Down,
}

impl Input {
    /// The layer of a matrix and what it is multiplied with, by its Hugging Face name; `None` for what is not in
    /// a layer.
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

    /// The matrices of a layer with this input, by the parts of their names between `model.layers.N.` and `.weight`, with
    /// their rows.
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

/// Sees every input of a layer before the product: which one, how many rows it has, and those `[n, cols]`. An error ends
/// the pass.
pub type Observer<'a> = &'a mut dyn FnMut(Input, usize, &[f32]) -> Result<()>;

/// What has keys and values of a sequence.
pub(super) trait Cached {
    fn cache(&self) -> &KvCache;
    fn cache_mut(&mut self) -> &mut KvCache;
}

impl Cached for KvCache {
    fn cache(&self) -> &KvCache {
        self
    }

    fn cache_mut(&mut self) -> &mut KvCache {
        self
    }
}

/// A layer and where its keys and values are.
pub(super) struct Block<'a> {
    config: &'a ModelConfig,
    layer: &'a LayerWeights,
    /// Of the layer in the caches.
    index: usize,
}

impl<'a> Block<'a> {
    pub(super) fn new(config: &'a ModelConfig, layer: &'a LayerWeights, index: usize) -> Self {
        Self {
            config,
            layer,
            index,
        }
    }

    /// Takes the `n` rows of `workspace.x` through the layer. The workspace knows their segments, one for each part,
    /// and the caches get their keys and values.
    pub(super) fn compute<C: Cached + Send + Sync>(
        &self,
        cpu: &Cpu,
        parts: &mut [C],
        workspace: &mut Workspace,
        n: usize,
        observe: Observer<'_>,
    ) -> Result<()> {
        self.attend(cpu, parts, workspace, n, observe)?;
        self.feed_forward(cpu, workspace, n, observe)
    }

    /// `x += o_proj(attention(norm(x)))`.
    fn attend<C: Cached + Send + Sync>(
        &self,
        cpu: &Cpu,
        parts: &mut [C],
        workspace: &mut Workspace,
        n: usize,
        observe: Observer<'_>,
    ) -> Result<()> {
        let &Self {
            config,
            layer,
            index,
        } = self;
        let query = config.query_size();
        let shape = Shape::of(config);
        let width = shape.width;
        let Workspace {
            segments,
            plan,
            x,
            normed,
            wide: qkv,
            narrow: mixed,
            rope,
            product,
            ..
        } = workspace;
        layer.input_norm.of(cpu, x, normed);
        observe(Input::Attention, n, normed)?;
        qkv.resize(n * width, 0.0);
        layer.qkv.multiply(cpu, normed, n, product, qkv)?;
        cpu.team().chunks(qkv, width, |number, row| {
            turn_heads(cpu.kernels(), config, layer, rope, number, row);
        });
        cpu.team().chunks(parts, 1, |number, part| {
            let rows = segments[number].rows.clone();
            part[0]
                .cache_mut()
                .append(index, &qkv[rows.start * width..rows.end * width], width);
        });
        mixed.resize(n * query, 0.0);
        let parts = &*parts;
        let attention = Attention {
            cache: |segment: usize| parts[segment].cache().layer(index),
            segments,
            queries: qkv,
            shape,
        };
        attention.compute(cpu, plan, mixed);
        observe(Input::Output, n, mixed)?;
        layer.output.multiply(cpu, mixed, n, Write::Add, product, x)
    }

    /// `x += down(silu(gate(norm(x))) * up(norm(x)))`.
    fn feed_forward(
        &self,
        cpu: &Cpu,
        workspace: &mut Workspace,
        n: usize,
        observe: Observer<'_>,
    ) -> Result<()> {
        let (layer, size) = (self.layer, self.config.intermediate_size);
        let Workspace {
            x,
            normed,
            wide: gate_up,
            narrow: gated,
            product,
            ..
        } = workspace;
        layer.mlp_norm.of(cpu, x, normed);
        observe(Input::FeedForward, n, normed)?;
        gate_up.resize(n * 2 * size, 0.0);
        layer.gate_up.multiply(cpu, normed, n, product, gate_up)?;
        gated_silu(cpu, gate_up, size, gated);
        observe(Input::Down, n, gated)?;
        layer.down.multiply(cpu, gated, n, Write::Add, product, x)
    }
}

/// Normalizes the heads of queries and keys of a `row` of queries, keys and values, where the family does, and turns them to
/// the position of number `index`.
pub(super) fn turn_heads(
    kernels: Kernels,
    config: &ModelConfig,
    layer: &LayerWeights,
    rope: &RopeTable,
    index: usize,
    row: &mut [f32],
) {
    let head_dim = config.head_dim;
    let (q, kv) = row.split_at_mut(config.query_size());
    let k = &mut kv[..config.kv_size()];
    if let Some([q_norm, k_norm]) = &layer.head_norms {
        q.chunks_exact_mut(head_dim)
            .for_each(|head| q_norm.apply(kernels, head));
        k.chunks_exact_mut(head_dim)
            .for_each(|head| k_norm.apply(kernels, head));
    }
    rope.apply(index, q, head_dim);
    rope.apply(index, k, head_dim);
}

/// What a sequence has in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Its rows of the pass, one after the other; none if nothing of it is due.
    pub(crate) rows: Range<usize>,
    /// The position of the first of them in the sequence.
    pub(crate) first: usize,
}

/// Memory of forward passes, used again from layer to layer and from pass to pass.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// Of each sequence.
    pub(super) segments: Vec<Segment>,
    pub(super) plan: Plan,
    /// Hidden states, `[n, hidden]`.
    pub(super) x: Vec<f32>,
    /// Those of the positions whose logits are wanted.
    pub(super) kept: Vec<f32>,
    /// Normalized ones.
    pub(super) normed: Vec<f32>,
    /// Queries, keys and values side by side, or gates and ups.
    wide: Vec<f32>,
    /// What attention makes of the former, or the gated activation of the latter.
    narrow: Vec<f32>,
    pub(super) rope: RopeTable,
    pub(super) product: Scratch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_a_matrix_is_multiplied_with() {
        for (part, input) in [
            ("self_attn.q_proj", Input::Attention),
            ("self_attn.k_proj", Input::Attention),
            ("self_attn.v_proj", Input::Attention),
            ("self_attn.qkv_proj", Input::Attention),
            ("self_attn.o_proj", Input::Output),
            ("mlp.gate_proj", Input::FeedForward),
            ("mlp.up_proj", Input::FeedForward),
            ("mlp.gate_up_proj", Input::FeedForward),
            ("mlp.down_proj", Input::Down),
        ] {
            let name = format!("model.layers.17.{part}.weight");
            assert_eq!(Input::of(&name), Some((17, input)), "{name}");
        }
        for name in [
            "model.embed_tokens.weight",
            "lm_head.weight",
            "model.layers.x.mlp.down_proj.weight",
            "model.layers.1.mlp.down_proj.bias",
            "model.layers.1.input_layernorm.weight",
        ] {
            assert_eq!(Input::of(name), None, "{name}");
        }
    }
}

//! The forward pass: a [`Model`] that any number of [`Session`]s share, one by one or several in one pass.
#![forbid(unsafe_code)]

use super::attention::{Attention, Plan, Shape};
use super::config::ModelConfig;
use super::layers::gated_silu;
use super::rope::{Rope, RopeTable};
use super::session::Session;
use super::weights::{LayerWeights, ModelWeights, WeightSource};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::matrix::product::{Scratch, Write, multiply};
use crate::team::Team;
use std::ops::Range;

/// The weights of a decoder and what to compute with them. Read-only: share it in an [`Arc`](std::sync::Arc).
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    weights: ModelWeights,
    rope: Rope,
}

/// A sequence and the tokens that are appended to it.
pub(super) type Part<'a> = (&'a mut Session, &'a [u32]);

impl Model {
    /// A model of this config with the weights of `source`.
    ///
    /// Costs what the source costs: nothing is copied here, and tied embeddings share one matrix.
    /// Errors: `Invalid` (sizes of the config), `Missing`, `Shape` (prints both shapes), and
    /// `Unsupported` for a tensor that this family would have to ignore.
    pub fn load(config: ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        config.check()?;
        Ok(Self {
            weights: ModelWeights::load(&config, source)?,
            rope: Rope::new(&config.rope),
            config,
        })
    }

    /// What this model computes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.rope
    }

    /// One pass over what is due of every sequence ([`Session::due`]), `workspace.x [n, hidden]`: the hidden states
    /// after the last layer, not yet normalized, those of a sequence at its segment's rows. The caches hold them
    /// afterwards. Nothing happens if nothing is due.
    ///
    /// Errors: of the caches and, looked at before each layer, [`Session::proceed`]. The caches then hold what
    /// [`Session::truncate`] has to take back.
    pub(super) fn hidden_states(
        &self,
        parts: &mut [Part<'_>],
        workspace: &mut Workspace,
    ) -> Result<()> {
        let kernels = Kernels::active()?;
        let n = self.begin(parts, workspace)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let mut sessions = parts.iter();
            sessions.try_for_each(|(session, _)| session.proceed())?;
            self.attend(kernels, layer, index, parts, workspace, n)?;
            feed_forward(kernels, layer, self.config.intermediate_size, workspace, n)?;
        }
        for ((session, _), segment) in parts.iter_mut().zip(&workspace.segments) {
            session.cache.commit(segment.rows.len());
        }
        Ok(())
    }

    /// What is due as rows of `workspace.x`, and what all layers need to know of them. Returns their number.
    fn begin(&self, parts: &mut [Part<'_>], workspace: &mut Workspace) -> Result<usize> {
        let Workspace {
            segments, rope, x, ..
        } = workspace;
        segments.clear();
        rope.clear();
        x.clear();
        let hidden = self.config.hidden_size;
        let mut end = 0;
        for (session, _) in parts {
            let (first, n) = (session.cache.len(), session.due());
            session.cache.reserve(n)?;
            self.rope.extend(rope, first, n, session.long);
            x.resize((end + n) * hidden, 0.0);
            let tokens = &session.tokens()[first..first + n];
            self.weights
                .embedding
                .gather(tokens, &mut x[end * hidden..])?;
            let rows = end..end + n;
            segments.push(Segment { rows, first });
            end += n;
        }
        workspace.plan.make(segments, self.shape());
        Ok(end)
    }

    fn shape(&self) -> Shape {
        let config = &self.config;
        Shape {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            width: config.query_size() + 2 * config.kv_size(),
        }
    }

    /// `x += o_proj(attention(norm(x)))`.
    fn attend(
        &self,
        kernels: Kernels,
        layer: &LayerWeights,
        index: usize,
        parts: &mut [Part<'_>],
        workspace: &mut Workspace,
        n: usize,
    ) -> Result<()> {
        let config = &self.config;
        let (head_dim, query) = (config.head_dim, config.query_size());
        let shape = self.shape();
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
        layer.input_norm.of(kernels, x, normed);
        qkv.resize(n * width, 0.0);
        layer.qkv.multiply(normed, n, product, qkv)?;
        Team::global().chunks(qkv, width, |number, row| {
            let (q, kv) = row.split_at_mut(query);
            let k = &mut kv[..config.kv_size()];
            if let Some([q_norm, k_norm]) = &layer.head_norms {
                q.chunks_exact_mut(head_dim)
                    .for_each(|head| q_norm.apply(kernels, head));
                k.chunks_exact_mut(head_dim)
                    .for_each(|head| k_norm.apply(kernels, head));
            }
            rope.apply(number, q, head_dim);
            rope.apply(number, k, head_dim);
        });
        Team::global().chunks(parts, 1, |number, part| {
            let rows = segments[number].rows.clone();
            let cache = &mut part[0].0.cache;
            cache.append(index, &qkv[rows.start * width..rows.end * width], width);
        });
        mixed.resize(n * query, 0.0);
        let parts = &*parts;
        let attention = Attention {
            cache: |segment: usize| parts[segment].0.cache.layer(index),
            segments,
            queries: qkv,
            shape,
        };
        attention.compute(kernels, plan, mixed);
        layer.output.multiply(mixed, n, Write::Add, product, x)
    }

    /// Logits `[n, vocab]` of the hidden states `workspace.kept [n, hidden]`, `most` at once, appended to `logits`.
    pub(super) fn logits(
        &self,
        workspace: &mut Workspace,
        most: usize,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let kernels = Kernels::active()?;
        let Workspace {
            kept,
            normed,
            product,
            ..
        } = workspace;
        let ModelConfig {
            hidden_size: hidden,
            vocab_size: vocab,
            ..
        } = self.config;
        for x in kept.chunks(most.saturating_mul(hidden)) {
            self.weights.norm.of(kernels, x, normed);
            let (start, n) = (logits.len(), x.len() / hidden);
            logits.resize(start + n * vocab, 0.0);
            let head = [Some(&self.weights.head)];
            multiply(head, normed, n, Write::Set, product, &mut logits[start..])?;
        }
        Ok(())
    }
}

/// `x += down(silu(gate(norm(x))) * up(norm(x)))`.
fn feed_forward(
    kernels: Kernels,
    layer: &LayerWeights,
    size: usize,
    workspace: &mut Workspace,
    n: usize,
) -> Result<()> {
    let Workspace {
        x,
        normed,
        wide: gate_up,
        narrow: gated,
        product,
        ..
    } = workspace;
    layer.mlp_norm.of(kernels, x, normed);
    gate_up.resize(n * 2 * size, 0.0);
    layer.gate_up.multiply(normed, n, product, gate_up)?;
    gated_silu(kernels, gate_up, size, gated);
    layer.down.multiply(gated, n, Write::Add, product, x)
}

/// What a sequence has in a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Its rows of the pass, one after the other; none if nothing of it is due.
    pub(super) rows: Range<usize>,
    /// The position of the first of them in the sequence.
    pub(super) first: usize,
}

/// Memory of forward passes, used again from layer to layer and from pass to pass.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    /// Of each sequence.
    pub(super) segments: Vec<Segment>,
    plan: Plan,
    /// Hidden states, `[n, hidden]`.
    pub(super) x: Vec<f32>,
    /// Those of the positions whose logits are wanted.
    pub(super) kept: Vec<f32>,
    /// Normalized ones.
    normed: Vec<f32>,
    /// Queries, keys and values side by side, or gates and ups.
    wide: Vec<f32>,
    /// What attention makes of the former, or the gated activation of the latter.
    narrow: Vec<f32>,
    rope: RopeTable,
    product: Scratch,
}

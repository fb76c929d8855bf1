//! The forward pass: a [`Model`] that any number of [`Session`]s share, one by one or several in one pass.
#![forbid(unsafe_code)]

use super::block::{Block, Cached, Segment, Workspace};
use super::config::ModelConfig;
use super::kv_cache::KvCache;
use super::rope::Rope;
use super::session::Session;
use super::weights::{ModelWeights, WeightSource};
use crate::cpu::Cpu;
use crate::cpu::attention::Shape;
use crate::cpu::product::{Write, multiply};
use crate::error::Result;

/// The weights of a decoder and what to compute with them. Read-only: share it in an [`Arc`](std::sync::Arc).
#[derive(Debug)]
pub struct Model {
    cpu: Cpu,
    config: ModelConfig,
    weights: ModelWeights,
    rope: Rope,
}

/// A sequence and the tokens that are appended to it.
pub(super) type Part<'a> = (&'a mut Session, &'a [u32]);

impl Cached for Part<'_> {
    fn cache(&self) -> &KvCache {
        &self.0.cache
    }

    fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.0.cache
    }
}

impl Model {
    /// Loads the weights that `config` asks for from `source`, to run on [`Cpu::shared`].
    ///
    /// Errors: those of [`Cpu::shared`] and [`Model::load_on`].
    pub fn load(config: ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        Self::load_on(Cpu::shared()?.clone(), config, source)
    }

    /// Loads the weights that `config` asks for from `source`, to run on `cpu`.
    ///
    /// Costs what the source costs: nothing is copied here, and tied embeddings share one matrix.
    /// Errors: `Invalid` (sizes of the config), `Missing`, `Shape` (prints both shapes), and
    /// `Unsupported` for a tensor that this family would have to ignore.
    pub fn load_on(cpu: Cpu, config: ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        config.check()?;
        Ok(Self {
            cpu,
            weights: ModelWeights::load(&config, source)?,
            rope: Rope::new(&config.rope),
            config,
        })
    }

    /// What this model computes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device that computes it.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
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
        let n = self.begin(parts, workspace)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let mut sessions = parts.iter();
            sessions.try_for_each(|(session, _)| session.proceed())?;
            let block = Block::new(&self.config, layer, index);
            block.compute(&self.cpu, parts, workspace, n, &mut |_, _, _| Ok(()))?;
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
                .gather_on(&self.cpu, tokens, &mut x[end * hidden..])?;
            let rows = end..end + n;
            segments.push(Segment { rows, first });
            end += n;
        }
        workspace.plan.make(segments, Shape::of(&self.config));
        Ok(end)
    }

    /// Logits `[n, vocab]` of the hidden states `workspace.kept [n, hidden]`, `most` at once, appended to `logits`.
    pub(super) fn logits(
        &self,
        workspace: &mut Workspace,
        most: usize,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
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
            self.weights.norm.of(&self.cpu, x, normed);
            let (start, n) = (logits.len(), x.len() / hidden);
            logits.resize(start + n * vocab, 0.0);
            let head = [Some(&self.weights.head)];
            let out = &mut logits[start..];
            multiply(&self.cpu, head, normed, n, Write::Set, product, out)?;
        }
        Ok(())
    }
}

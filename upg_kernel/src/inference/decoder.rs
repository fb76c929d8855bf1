//! Decoder: the computation of a layer, written once over the steps of a [`Device`].
#![forbid(unsafe_code)]

use super::cache::CacheLayout;
use super::config::ModelConfig;
use super::layer_input::LayerInput;
use super::pass::Pass;
use super::rope::Rope;
use super::weights::{Layer, Weights};
use crate::device::{Device, Heads, Write};
use crate::error::Result;
use std::sync::Arc;

/// Weights of a decoder on a device. Read-only, so that several engines can share them.
pub(crate) struct Decoder<D: Device> {
    device: D,
    config: ModelConfig,
    rope: Rope,
    weights: Weights<D::Weight, D::Vector>,
}

/// Engine of forward passes: the weights of a decoder and a KV cache.
pub(crate) trait Engine: Send {
    /// Computes a pass and appends the logits `[wanted, vocab]` of its wanted rows to `logits`.
    ///
    /// Calls `proceed` before each layer. Errors: those of `proceed`; `TooLarge` if there is no
    /// memory for the cache. The cache then has no additional positions of any sequence.
    fn forward(
        &mut self,
        pass: &Pass,
        proceed: &dyn Fn() -> Result<()>,
        logits: &mut Vec<f32>,
    ) -> Result<()>;
}

/// Factory of engines: a [`Decoder`] for any device.
pub(crate) trait MakeEngine: Send + Sync {
    /// Creates an engine with an empty cache. Errors: those of [`Device::cache`].
    fn engine(self: Arc<Self>, layout: &CacheLayout) -> Result<Box<dyn Engine>>;
}

/// Hidden states and activations of a pass, reused between layers and passes.
pub(crate) struct Workspace<D: Device> {
    /// Hidden states, `[n, hidden]`.
    pub(crate) x: D::Buffer,
    /// Normalized hidden states, `[n, hidden]`.
    normed: D::Buffer,
    /// Queries, keys and values, or gate and up outputs.
    wide: D::Buffer,
    /// Attention output, or gated activation.
    narrow: D::Buffer,
    /// Logits, `[wanted, vocab]`.
    logits: D::Buffer,
    pub(crate) scratch: D::Scratch,
}

impl<D: Device> Default for Workspace<D> {
    fn default() -> Self {
        Self {
            x: D::Buffer::default(),
            normed: D::Buffer::default(),
            wide: D::Buffer::default(),
            narrow: D::Buffer::default(),
            logits: D::Buffer::default(),
            scratch: D::Scratch::default(),
        }
    }
}

/// Callback for every input of a layer before its product. An error ends the pass.
pub(crate) type Observe<'a, D> =
    &'a mut dyn FnMut(LayerInput, &<D as Device>::Buffer) -> Result<()>;

impl<D: Device> Decoder<D> {
    /// Uploads the weights to `device`. Errors: those of the device.
    pub(crate) fn new(device: D, config: ModelConfig, weights: Weights) -> Result<Self> {
        Ok(Self {
            weights: weights.on(&device)?,
            rope: Rope::new(&config.rope),
            device,
            config,
        })
    }

    fn compute(
        &self,
        pass: &Pass,
        proceed: &dyn Fn() -> Result<()>,
        cache: &mut D::Cache,
        workspace: &mut Workspace<D>,
        layer_done: &mut dyn FnMut(),
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let (device, weights) = (&self.device, &self.weights);
        let heads = Heads::new(&self.config);
        device.begin(pass, &self.rope, heads, cache, &mut workspace.scratch)?;
        device.gather(&weights.embedding, &pass.tokens, &mut workspace.x)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            proceed()?;
            let size = self.config.intermediate_size;
            let observe: Observe<'_, D> = &mut |_, _| Ok(());
            compute_layer(device, layer, index, pass, size, cache, workspace, observe)?;
            layer_done();
        }
        if pass.wanted.is_empty() {
            return device.finish();
        }
        let Workspace {
            x,
            normed,
            narrow: selected,
            logits: out,
            scratch,
            ..
        } = workspace;
        device.select(x, self.config.hidden_size, &pass.wanted, selected);
        device.norm(&weights.norm, selected, normed);
        let (head, n) = (std::slice::from_ref(&weights.head), pass.wanted.len());
        device.linear(head, normed, n, Write::Set, scratch, out)?;
        device.read(out, logits)
    }
}

/// Computes a layer on the hidden states `workspace.x [n, hidden]`.
///
/// Its keys and values are those of layer `index` of the cache. It computes
/// `x += o_proj(attention(norm(x)))`, then `x += down(silu(gate(norm(x))) * up(norm(x)))`.
#[expect(clippy::too_many_arguments, reason = "one call in each of two places")]
pub(crate) fn compute_layer<D: Device>(
    device: &D,
    layer: &Layer<D::Weight, D::Vector>,
    index: usize,
    pass: &Pass,
    size: usize,
    cache: &mut D::Cache,
    workspace: &mut Workspace<D>,
    observe: Observe<'_, D>,
) -> Result<()> {
    let Workspace {
        x,
        normed,
        wide,
        narrow,
        scratch,
        ..
    } = workspace;
    let n = pass.rows();
    let one = std::slice::from_ref;

    device.norm(&layer.input_norm, x, normed);
    observe(LayerInput::Attention, normed)?;
    device.linear(&layer.qkv, normed, n, Write::Set, scratch, wide)?;
    let norms = layer.head_norms.as_ref();
    device.rope_append(pass, index, norms, wide, cache, scratch);
    device.attend(pass, index, wide, cache, scratch, narrow);
    observe(LayerInput::Output, narrow)?;
    device.linear(one(&layer.output), narrow, n, Write::Add, scratch, x)?;

    device.norm(&layer.mlp_norm, x, normed);
    observe(LayerInput::FeedForward, normed)?;
    device.linear(&layer.gate_up, normed, n, Write::Set, scratch, wide)?;
    device.gated_silu(wide, size, narrow);
    observe(LayerInput::Down, narrow)?;
    device.linear(one(&layer.down), narrow, n, Write::Add, scratch, x)
}

impl<D: Device> MakeEngine for Decoder<D> {
    fn engine(self: Arc<Self>, layout: &CacheLayout) -> Result<Box<dyn Engine>> {
        Ok(Box::new(DecoderEngine {
            cache: self.device.cache(layout)?,
            workspace: Workspace::default(),
            decoder: self,
        }))
    }
}

/// Engine of a [`Decoder`] with its own cache and memory.
struct DecoderEngine<D: Device> {
    decoder: Arc<Decoder<D>>,
    cache: D::Cache,
    workspace: Workspace<D>,
}

impl<D: Device> Engine for DecoderEngine<D> {
    fn forward(
        &mut self,
        pass: &Pass,
        proceed: &dyn Fn() -> Result<()>,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let Self {
            decoder,
            cache,
            workspace,
        } = self;
        decoder.device.in_turn(|layer_done| {
            decoder.compute(pass, proceed, cache, workspace, layer_done, logits)
        })
    }
}

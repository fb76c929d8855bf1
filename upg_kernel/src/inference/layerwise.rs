//! Layer-by-layer forward pass of a decoder over texts that are known from the start.
#![forbid(unsafe_code)]

use super::cache::{BlockPool, BlockTables, CacheLayout, CacheType};
use super::config::ModelConfig;
use super::decoder::{Workspace, compute_layer};
use super::layer_input::LayerInput;
use super::pass::{Pass, Segment};
use super::rope::Rope;
use super::weights::{Layer, WeightSource};
use crate::cpu::Cpu;
use crate::cpu::device::CpuDevice;
use crate::device::{Device, Heads};
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use std::fmt;
use std::sync::Arc;

/// Callback for every input of a layer before its product.
///
/// It gets the kind of input, its number of rows, and the rows `[n, cols]`. An error ends the pass.
pub type Observer<'a> = &'a mut dyn FnMut(LayerInput, usize, &[f32]) -> Result<()>;

/// Positions that are computed at once, unless a sequence is longer.
pub const POSITIONS_TOGETHER: usize = 2048;

/// Hidden states of several sequences in a forward pass through a decoder.
///
/// One layer is in memory at a time, so that models larger than memory can be processed. A
/// compressor calibrates on the inputs of the matrices. Products are those of a
/// [`Session`](super::Session) with f32 keys and values; with uncompressed weights all arithmetic
/// is f32.
pub struct Layerwise {
    cpu: CpuDevice,
    config: ModelConfig,
    rope: Rope,
    /// Tokens of each sequence.
    len: usize,
    /// Hidden states `[sequences, len, hidden]`.
    hidden: Vec<f32>,
    workspace: Workspace<CpuDevice>,
    pass: Pass,
}

impl Layerwise {
    /// Starts before the first layer, with the embeddings of `tokens`, sequences of `len` each.
    ///
    /// Memory: `4 * hidden` bytes per token, and that of passes over 2,048 positions. Errors:
    /// `Invalid` (sizes of the config); `Argument` if `len` is 0 or beyond the context, the tokens
    /// are not whole sequences, or one is not in the vocabulary; `TooLarge` if there is no memory
    /// for them; those of [`Matrix::gather`] for an embedding of another shape.
    pub fn new(
        config: ModelConfig,
        embedding: &Matrix,
        tokens: &[u32],
        len: usize,
    ) -> Result<Self> {
        config.check()?;
        let argument = |message: String| Err(Error::new(ErrorKind::Argument, message));
        if len == 0
            || len > config.context
            || tokens.is_empty()
            || !tokens.len().is_multiple_of(len)
        {
            return argument(format!(
                "{} tokens as sequences of {len}, expected whole ones of 1 to {}",
                tokens.len(),
                config.context
            ));
        }
        if let Some(token) = tokens.iter().find(|&&t| t as usize >= config.vocab_size) {
            return argument(format!(
                "token id {token} is not in the vocabulary of {}",
                config.vocab_size
            ));
        }
        let too_large = || {
            let message = format!("no memory for the hidden states of {} tokens", tokens.len());
            Error::new(ErrorKind::TooLarge, message)
        };
        let values = tokens.len().checked_mul(config.hidden_size);
        let values = values.ok_or_else(too_large)?;
        let mut hidden = Vec::new();
        hidden.try_reserve_exact(values).map_err(|_| too_large())?;
        hidden.resize(values, 0.0);
        let cpu = CpuDevice(Cpu::shared()?.clone());
        embedding.gather_on(&cpu.0, tokens, &mut hidden)?;
        Ok(Self {
            cpu,
            rope: Rope::new(&config.rope),
            config,
            len,
            hidden,
            workspace: Workspace::default(),
            pass: Pass::default(),
        })
    }

    /// Returns the hidden states `[sequences, len, hidden]`, the output of the last layer passed.
    pub fn hidden(&self) -> &[f32] {
        &self.hidden
    }

    /// Returns [`Layerwise::hidden`] by value.
    pub fn into_hidden(self) -> Vec<f32> {
        self.hidden
    }

    /// Passes all sequences through layer `index` with the weights of `source`.
    ///
    /// `observe` sees the inputs of all positions, a few sequences at a time: for these the four
    /// [`LayerInput`](super::LayerInput)s in order.
    ///
    /// Errors: those of loading the layer ([`Model::load`](super::Model::load)) and of `observe`.
    /// After an error the hidden states are unusable.
    pub fn layer(
        &mut self,
        index: usize,
        source: &dyn WeightSource,
        observe: Observer<'_>,
    ) -> Result<()> {
        let Some(&window) = self.config.windows.get(index) else {
            let message = format!("layer {index} of {}", self.config.num_layers);
            return Err(Error::new(ErrorKind::Argument, message));
        };
        let weights = Layer::load(&self.config, source, index)?;
        // The cache has only this layer.
        let mut of_layer = self.config.clone();
        of_layer.windows = vec![window];
        let layout = Arc::new(CacheLayout::new(&of_layer, CacheType::F32));
        let (len, size) = (self.len, self.len * self.config.hidden_size);
        let together = (POSITIONS_TOGETHER / len).max(1);
        let long = self.rope.is_long(len);
        let Self {
            cpu,
            config,
            rope,
            workspace,
            pass,
            ..
        } = self;
        for hidden in self.hidden.chunks_mut(together * size) {
            let count = hidden.len() / size;
            let pool = BlockPool::new(Arc::clone(&layout), None)?;
            let mut cache = cpu.cache(&layout)?;
            let mut tables = vec![BlockTables::new(&pool); count];
            pass.clear();
            // Only their number matters: the hidden states are there already.
            pass.tokens.resize(count * len, 0);
            for (sequence, tables) in tables.iter_mut().enumerate() {
                tables.reserve(&pool, len, (len, len), pass)?;
                pass.segments.push(Segment {
                    rows: sequence * len..(sequence + 1) * len,
                    first: 0,
                    long,
                });
            }
            cpu.begin(
                pass,
                rope,
                Heads::new(config),
                &mut cache,
                &mut workspace.scratch,
            )?;
            workspace.x.clear();
            workspace.x.extend_from_slice(hidden);
            let mlp = config.intermediate_size;
            let observe = &mut |input, x: &Vec<f32>| observe(input, count * len, x);
            compute_layer(cpu, &weights, 0, pass, mlp, &mut cache, workspace, observe)?;
            hidden.copy_from_slice(&workspace.x);
        }
        Ok(())
    }
}

impl fmt::Debug for Layerwise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layerwise")
            .field("config", &self.config)
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

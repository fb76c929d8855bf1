//! The forward pass: a [`Model`] that any number of [`Session`]s share.
#![forbid(unsafe_code)]

use super::attention::{Attention, Shape};
use super::config::ModelConfig;
pub use super::kv_cache::CacheType;
use super::kv_cache::KvCache;
use super::layers::gated_silu;
use super::rope::{Rope, RopeTable};
use super::weights::{LayerWeights, ModelWeights, WeightSource};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::Kernels;
use crate::matrix::product::{Scratch, Write, multiply};
use crate::team::Team;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The weights of a decoder and what to compute with them. Read-only: share it in an [`Arc`].
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    weights: ModelWeights,
    rope: Rope,
}

/// How a [`Session`] uses memory.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Most positions of a sequence, prompt and answer; `None` is what the model was made for.
    pub context: Option<usize>,
    /// How many positions of a prompt are computed at once, 1 to 65,536; bounds the memory for
    /// activations.
    pub prefill_chunk: usize,
    /// How keys and values are stored.
    pub cache_type: CacheType,
    /// Refuse a context whose KV cache could become larger than this; `None` is no limit.
    pub max_cache_bytes: Option<usize>,
    /// Once it is true every call ends with an error of kind `Interrupted`, within the time of one
    /// layer; the sequence is then as before the call. `None`: calls cannot be stopped.
    pub interrupt: Option<Arc<AtomicBool>>,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            context: None,
            prefill_chunk: 512,
            cache_type: CacheType::default(),
            max_cache_bytes: None,
            interrupt: None,
        }
    }
}

/// Most positions that are computed at once.
const MAX_PREFILL_CHUNK: usize = 1 << 16;

/// One sequence: its tokens and the KV cache that belongs to them.
///
/// Logits depend on the tokens alone (to rounding), not on how they were cut into calls. Where a
/// cache cannot be continued (a longrope model grows past its switch or shrinks below it; a
/// sequence is cut back to where a sliding window has already dropped keys) the next call computes
/// the whole sequence again.
#[derive(Debug)]
pub struct Session {
    model: Arc<Model>,
    tokens: Vec<u32>,
    cache: KvCache,
    /// Whether the cache was made with the frequencies for long sequences.
    long: bool,
    context: usize,
    chunk: usize,
    interrupt: Option<Arc<AtomicBool>>,
    workspace: Workspace,
}

/// Which logits a call is about.
#[derive(Clone, Copy)]
enum Wanted {
    Last,
    /// From this position on.
    From(usize),
}

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

    /// The hidden states after the last layer for `tokens` at the positions that follow those in
    /// `cache`, `workspace.x [n, hidden]`, not yet normalized. The cache holds them afterwards.
    ///
    /// `proceed` is asked before each layer; its error ends the pass.
    fn hidden_states(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        long: bool,
        workspace: &mut Workspace,
        proceed: impl Fn() -> Result<()>,
    ) -> Result<()> {
        let n = tokens.len();
        let kernels = Kernels::active()?;
        cache.reserve(n)?;
        self.rope.fill(&mut workspace.rope, cache.len(), n, long);
        self.embed(tokens, &mut workspace.x)?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            proceed()?;
            self.attend(kernels, layer, index, cache, workspace, n)?;
            feed_forward(kernels, layer, self.config.intermediate_size, workspace, n)?;
        }
        cache.commit(n);
        Ok(())
    }

    /// Rows of the embedding, `[n, hidden]`.
    fn embed(&self, tokens: &[u32], x: &mut Vec<f32>) -> Result<()> {
        let hidden = self.config.hidden_size;
        x.resize(tokens.len() * hidden, 0.0);
        self.weights.embedding.gather(tokens, x)
    }

    /// `x += o_proj(attention(norm(x)))`.
    fn attend(
        &self,
        kernels: Kernels,
        layer: &LayerWeights,
        index: usize,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        n: usize,
    ) -> Result<()> {
        let config = &self.config;
        let (head_dim, query) = (config.head_dim, config.query_size());
        let width = query + 2 * config.kv_size();
        let Workspace {
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
        Team::global().chunks(qkv, width, |position, row| {
            let (q, kv) = row.split_at_mut(query);
            let k = &mut kv[..config.kv_size()];
            if let Some([q_norm, k_norm]) = &layer.head_norms {
                q.chunks_exact_mut(head_dim)
                    .for_each(|head| q_norm.apply(kernels, head));
                k.chunks_exact_mut(head_dim)
                    .for_each(|head| k_norm.apply(kernels, head));
            }
            rope.apply(position, q, head_dim);
            rope.apply(position, k, head_dim);
        });
        let first = cache.len();
        let cache = cache.append(index, qkv, width);
        mixed.resize(n * query, 0.0);
        let shape = Shape {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim,
            width,
        };
        let attention = Attention {
            cache,
            queries: qkv,
            first,
            shape,
        };
        attention.compute(kernels, mixed);
        layer.output.multiply(mixed, n, Write::Add, product, x)
    }

    /// Logits `[n, vocab]` of the last `n` rows of `workspace.x`, appended to `logits`.
    fn logits(&self, workspace: &mut Workspace, n: usize, logits: &mut Vec<f32>) -> Result<()> {
        let kernels = Kernels::active()?;
        let Workspace {
            x, normed, product, ..
        } = workspace;
        let x = &x[x.len() - n * self.config.hidden_size..];
        self.weights.norm.of(kernels, x, normed);
        let start = logits.len();
        logits.resize(start + n * self.config.vocab_size, 0.0);
        let head = [Some(&self.weights.head)];
        multiply(head, normed, n, Write::Set, product, &mut logits[start..])
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

/// Memory of a forward pass, used again from layer to layer and from pass to pass.
#[derive(Debug, Default)]
struct Workspace {
    /// Hidden states, `[n, hidden]`.
    x: Vec<f32>,
    /// Normalized ones.
    normed: Vec<f32>,
    /// Queries, keys and values side by side, or gates and ups.
    wide: Vec<f32>,
    /// What attention makes of the former, or the gated activation of the latter.
    narrow: Vec<f32>,
    rope: RopeTable,
    product: Scratch,
}

impl Session {
    /// An empty sequence. Allocates nothing yet: the KV cache grows with the sequence.
    ///
    /// Errors: `Argument` (a context of 0 or beyond that of the model, a chunk of 0), `TooLarge`
    /// (the cache of a full context would be above `max_cache_bytes`).
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Self> {
        let config = model.config();
        let context = options.context.unwrap_or(config.context);
        if !(1..=config.context).contains(&context) {
            return Err(Error::new(
                ErrorKind::Argument,
                format!(
                    "context of {context} positions, expected 1 to {}",
                    config.context
                ),
            ));
        }
        let chunk = options.prefill_chunk;
        if !(1..=MAX_PREFILL_CHUNK).contains(&chunk) {
            return Err(Error::new(
                ErrorKind::Argument,
                format!("prefill chunk of {chunk} positions, expected 1 to {MAX_PREFILL_CHUNK}"),
            ));
        }
        let bytes = KvCache::max_bytes(config, context, chunk, options.cache_type)?;
        if let Some(limit) = options.max_cache_bytes.filter(|&limit| bytes > limit) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the KV cache of {context} positions takes {bytes} bytes, expected at most \
                     {limit}"
                ),
            )
            .hint("ask for a smaller context"));
        }
        Ok(Self {
            tokens: Vec::new(),
            cache: KvCache::new(config, context, chunk, options.cache_type),
            long: false,
            context,
            chunk,
            interrupt: options.interrupt.clone(),
            workspace: Workspace::default(),
            model,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The tokens of the sequence so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Most tokens that the sequence can have.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Appends `tokens`; returns the logits `[vocab]` of the last one.
    ///
    /// Computed `prefill_chunk` positions at a time. Errors (`Argument`): no tokens, an id beyond
    /// the vocabulary, more than fit into the context. After an error the sequence is as before.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.extend(tokens, Wanted::Last)
    }

    /// Appends `tokens`; returns the logits `[n, vocab]` of each of them.
    ///
    /// Allocates `4 n vocab` bytes for the result. Errors: as [`Session::prefill`], and `TooLarge`
    /// if the result does not fit into memory.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.extend(tokens, Wanted::From(self.tokens.len()))
    }

    /// Appends one token; returns its logits `[vocab]`. Errors: as [`Session::prefill`].
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.step_into(token, &mut logits)?;
        Ok(logits)
    }

    /// [`Session::step`] with the logits in place of what is in `logits`. Allocates nothing if that has
    /// the room, unless the KV cache has to grow.
    pub fn step_into(&mut self, token: u32, logits: &mut Vec<f32>) -> Result<()> {
        self.extend_into(&[token], Wanted::Last, logits)
    }

    /// Makes `tokens` the whole sequence; returns the logits `[vocab]` of the last one.
    ///
    /// What the sequence has in common with `tokens` at the front is not computed again, but at
    /// least the last token is. Errors: as [`Session::prefill`].
    pub fn replace(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.check(0, tokens)?;
        let kept = self.common_prefix(tokens);
        self.truncate(kept);
        self.prefill(&tokens[kept..])
    }

    /// How many of the first of `tokens` the sequence already has; all but the last at most.
    pub(crate) fn common_prefix(&self, tokens: &[u32]) -> usize {
        let pairs = self.tokens.iter().zip(tokens);
        let common = pairs.take_while(|(a, b)| a == b).count();
        common.min(tokens.len().saturating_sub(1))
    }

    /// Cuts the sequence back to its first `len` tokens; nothing happens if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.cache.truncate(len);
    }

    fn check(&self, position: usize, tokens: &[u32]) -> Result<()> {
        let argument = |message: String| Err(Error::new(ErrorKind::Argument, message));
        if tokens.is_empty() {
            return Err(
                Error::new(ErrorKind::Argument, "no tokens to compute").hint("pass some text")
            );
        }
        let vocab = self.model.config.vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return argument(format!(
                "token id {token} is not in the vocabulary of {vocab}"
            ));
        }
        match position.checked_add(tokens.len()) {
            Some(len) if len <= self.context => Ok(()),
            _ => Err(Error::new(
                ErrorKind::Argument,
                format!(
                    "prompt of {} tokens does not fit the context of {}",
                    position.saturating_add(tokens.len()),
                    self.context
                ),
            )
            .hint("shorten it or ask for a larger context")),
        }
    }

    fn extend(&mut self, tokens: &[u32], wanted: Wanted) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.extend_into(tokens, wanted, &mut logits)?;
        Ok(logits)
    }

    fn extend_into(&mut self, tokens: &[u32], wanted: Wanted, logits: &mut Vec<f32>) -> Result<()> {
        let before = self.tokens.len();
        self.check(before, tokens)?;
        self.tokens.extend_from_slice(tokens);
        let result = self.compute(wanted, logits);
        if result.is_err() {
            self.truncate(before);
        }
        result
    }

    /// Brings the cache up to the tokens.
    fn compute(&mut self, wanted: Wanted, logits: &mut Vec<f32>) -> Result<()> {
        let model = Arc::clone(&self.model);
        let len = self.tokens.len();
        let vocab = model.config.vocab_size;
        let long = model.rope.is_long(len);
        if long != self.long {
            self.cache.truncate(0);
            self.long = long;
        }
        let from = match wanted {
            Wanted::Last => len - 1,
            Wanted::From(position) => position,
        };
        logits.clear();
        (len - from)
            .checked_mul(vocab)
            .and_then(|values| logits.try_reserve_exact(values).ok())
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::TooLarge,
                    format!("no memory for the logits of {} positions", len - from),
                )
            })?;
        while self.cache.len() < len {
            let first = self.cache.len();
            let end = len.min(first + self.chunk);
            let interrupt = self.interrupt.as_deref();
            let proceed = || match interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
                true => Err(Error::new(ErrorKind::Interrupted, "stopped")),
                false => Ok(()),
            };
            let tokens = &self.tokens[first..end];
            let workspace = &mut self.workspace;
            model.hidden_states(tokens, &mut self.cache, long, workspace, proceed)?;
            if end > from {
                let rows = end - first.max(from);
                model.logits(workspace, rows, logits)?;
            }
        }
        Ok(())
    }
}

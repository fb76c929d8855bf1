//! One sequence: a [`Session`] of a [`Model`].
#![forbid(unsafe_code)]

use super::batch::{Wanted, extend};
use super::block::Workspace;
pub use super::kv_cache::CacheType;
use super::kv_cache::KvCache;
use super::model::Model;
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
    pub(super) cache: KvCache,
    /// Whether the cache was made with the frequencies for long sequences.
    pub(super) long: bool,
    context: usize,
    chunk: usize,
    interrupt: Option<Arc<AtomicBool>>,
    workspace: Workspace,
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
        self.extend(tokens, Wanted::Every)
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
    /// least the last token is. Errors: as [`Session::prefill`]; only what is in common is left then, unless it
    /// was an `Argument`.
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

    /// Errors (`Argument`): these tokens cannot follow the first `position` ones.
    pub(super) fn check(&self, position: usize, tokens: &[u32]) -> Result<()> {
        let argument = |message: String| Err(Error::new(ErrorKind::Argument, message));
        if tokens.is_empty() {
            return Err(
                Error::new(ErrorKind::Argument, "no tokens to compute").hint("pass some text")
            );
        }
        let vocab = self.model.config().vocab_size;
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
        let mut workspace = std::mem::take(&mut self.workspace);
        let result = extend(&mut [(self, tokens)], wanted, &mut workspace, logits);
        self.workspace = workspace;
        result
    }

    /// Takes tokens that were checked; [`Session::truncate`] takes them back.
    pub(super) fn append(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        let long = self.model.rope().is_long(self.tokens.len());
        if long != self.long {
            self.cache.truncate(0);
            self.long = long;
        }
    }

    /// How many positions it has in the next forward pass, `prefill_chunk` at most.
    pub(super) fn due(&self) -> usize {
        self.chunk.min(self.tokens.len() - self.cache.len())
    }

    /// Most positions of a forward pass.
    pub(super) fn chunk(&self) -> usize {
        self.chunk
    }

    /// Errors (`Interrupted`): the flag of its options is set.
    pub(super) fn proceed(&self) -> Result<()> {
        let interrupt = self.interrupt.as_deref();
        match interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped")),
            false => Ok(()),
        }
    }
}

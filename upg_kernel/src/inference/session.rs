//! One sequence with a cache of its own: a [`Session`] of a [`Model`].
#![forbid(unsafe_code)]

use super::context::{Context, Logits, Sequence, SessionOptions};
use super::model::Model;
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;

/// One sequence: its tokens and the KV cache that belongs to them.
///
/// Logits depend on the tokens alone (to rounding), not on how they were cut into calls. Where a
/// cache cannot be continued (a longrope model grows past its switch or shrinks below it; a
/// sequence is cut back to where a sliding window has already dropped keys) the next call computes
/// the whole sequence again.
#[derive(Debug)]
pub struct Session {
    context: Context,
    sequence: Sequence,
}

impl Session {
    /// Makes an empty sequence. Allocates nothing yet: the KV cache grows with the sequence.
    ///
    /// Errors: `Argument` (a context of 0 or beyond that of the model, a chunk of 0), `TooLarge`
    /// (the cache of a full context would be above `max_cache_bytes`).
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Self> {
        let context = Context::new(model, options)?;
        let bytes = context.sequence_bytes()?;
        if let Some(limit) = options.max_cache_bytes.filter(|&limit| bytes > limit) {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "the KV cache of {} positions takes {bytes} bytes, expected at most {limit}",
                    context.max_len()
                ),
            )
            .hint("ask for a smaller context"));
        }
        Ok(Self {
            sequence: context.sequence(),
            context,
        })
    }

    /// Returns the model.
    pub fn model(&self) -> &Arc<Model> {
        self.context.model()
    }

    /// Returns the tokens of the sequence so far.
    pub fn tokens(&self) -> &[u32] {
        self.sequence.tokens()
    }

    /// Returns the most tokens that the sequence can have.
    pub fn context(&self) -> usize {
        self.context.max_len()
    }

    /// Appends `tokens`; returns the logits `[vocab]` of the last one.
    ///
    /// Computed `prefill_chunk` positions at a time. Errors (`Argument`): no tokens, an id beyond
    /// the vocabulary, more than fit into the context. After an error the sequence is as before.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.extend(tokens, Logits::Last)
    }

    /// Appends `tokens`; returns the logits `[n, vocab]` of each of them.
    ///
    /// Allocates `4 n vocab` bytes for the result. Errors: as [`Session::prefill`], and `TooLarge`
    /// if the result does not fit into memory.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.extend(tokens, Logits::All)
    }

    /// Appends one token; returns its logits `[vocab]`. Errors: as [`Session::prefill`].
    pub fn step(&mut self, token: u32) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        self.step_into(token, &mut logits)?;
        Ok(logits)
    }

    /// [`Session::step`] with the logits in place of what is in `logits`.
    ///
    /// Allocates nothing if `logits` has the room, unless the KV cache has to grow.
    pub fn step_into(&mut self, token: u32, logits: &mut Vec<f32>) -> Result<()> {
        let parts = &mut [(&mut self.sequence, &[token][..])];
        self.context.extend(parts, Logits::Last, logits)
    }

    /// Makes `tokens` the whole sequence; returns the logits `[vocab]` of the last one.
    ///
    /// The common prefix of the sequence and `tokens` is not computed again, but at
    /// least the last token is. Errors: as [`Session::prefill`]; only what is in common is left
    /// then, unless it was an `Argument`.
    pub fn replace(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.context.check(0, tokens)?;
        let kept = self.sequence.common_prefix(tokens);
        self.truncate(kept);
        self.prefill(&tokens[kept..])
    }

    /// Cuts the sequence back to its first `len` tokens; nothing happens if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.sequence.truncate(len);
    }

    fn extend(&mut self, tokens: &[u32], wanted: Logits) -> Result<Vec<f32>> {
        let mut logits = Vec::new();
        let parts = &mut [(&mut self.sequence, tokens)];
        self.context.extend(parts, wanted, &mut logits)?;
        Ok(logits)
    }
}

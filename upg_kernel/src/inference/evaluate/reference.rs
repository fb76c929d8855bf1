//! What a model is compared with.
#![forbid(unsafe_code)]

use super::super::{CacheType, Model, Session, SessionOptions};
use super::windows::Window;
use crate::error::Result;
use std::sync::Arc;

/// Where the logits come from that those of a model are compared with.
pub trait Reference {
    /// Logits `[scored, vocab]` of the positions of `window` that are scored, all of a position up to a constant.
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>>;
}

/// How the logits of a model are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvaluationOptions {
    /// Positions that are computed at once, as in [`SessionOptions::prefill_chunk`]: 1 measures what
    /// generation computes, token by token.
    pub chunk: usize,
    /// As [`SessionOptions::cache_type`].
    pub cache_type: CacheType,
}

impl Default for EvaluationOptions {
    fn default() -> Self {
        Self {
            chunk: SessionOptions::default().prefill_chunk,
            cache_type: CacheType::default(),
        }
    }
}

/// A model that computes its logits when they are asked for.
#[derive(Debug, Clone)]
pub struct Computed {
    /// The model.
    pub model: Arc<Model>,
    /// How.
    pub options: EvaluationOptions,
}

impl Reference for Computed {
    /// Memory: those of a session, `4 * scored * vocab` bytes of logits. Errors: those of [`Session::forward`].
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>> {
        let Window { input, first, .. } = window;
        let options = SessionOptions {
            context: Some(input.len()),
            prefill_chunk: self.options.chunk,
            cache_type: self.options.cache_type,
            ..SessionOptions::default()
        };
        let mut session = Session::new(Arc::clone(&self.model), &options)?;
        session.prefill(&input[..*first])?;
        session.forward(&input[*first..input.len() - 1])
    }
}

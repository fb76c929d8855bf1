//! Reference that a model is compared with.
#![forbid(unsafe_code)]

use super::super::{CacheType, Model, Session, SessionOptions};
use super::windows::Window;
use crate::error::Result;
use std::sync::Arc;

/// Source of reference logits.
pub trait Reference {
    /// Returns the logits `[scored, vocab]` of the scored positions of `window`.
    ///
    /// A constant may be added to all logits of a position.
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>>;
}

/// Options for computing the logits of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvaluationOptions {
    /// Positions that are computed at once, as in [`SessionOptions::prefill_chunk`].
    ///
    /// 1 measures the computation of token-by-token generation.
    pub chunk: usize,
    /// Data type of the KV cache, as [`SessionOptions::cache_type`].
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

/// Model that computes its logits on request.
#[derive(Debug, Clone)]
pub struct Computed {
    /// Model.
    pub model: Arc<Model>,
    /// Options of the computation.
    pub options: EvaluationOptions,
}

impl Reference for Computed {
    /// Computes the logits of `window`.
    ///
    /// Memory: that of a session, and `4 * scored * vocab` bytes of logits. Errors: those of
    /// [`Session::forward`].
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

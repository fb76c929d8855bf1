//! Several sequences in one forward pass.
#![forbid(unsafe_code)]

use super::block::Workspace;
use super::model::{Model, Part};
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use std::sync::Arc;

/// Computes tokens of several [`Session`]s of one model together: weights are read once for all of them.
///
/// It owns nothing but memory, and each call says which sequences take part: some may join, leave, or be cut back
/// between two calls. One token of one sequence and many of another may be in the same call, so that a prompt is
/// taken piece by piece while others generate.
///
/// ```no_run
/// # fn main() -> upg_kernel::Result<()> {
/// use upg_kernel::UPGModel;
/// use upg_kernel::inference::{Batch, SessionOptions};
///
/// let model = UPGModel::from_file("smollm2-q4.safetensors")?;
/// let mut one = model.session(&SessionOptions::default())?;
/// let mut other = model.session(&SessionOptions::default())?;
/// let (mut batch, mut logits) = (Batch::new(), Vec::new());
/// batch.extend(&mut [(&mut one, &[504, 3575, 282][..]), (&mut other, &[19556])], &mut logits)?;
/// let vocab = model.model().config().vocab_size;
/// let after_other = &logits[vocab..];
/// # let _ = after_other;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct Batch {
    workspace: Workspace,
}

/// Which logits of each sequence a call is about.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Of the last token.
    Last,
    /// Of each of the tokens.
    Every,
}

impl Batch {
    /// Allocates nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends to each session its tokens; `logits [sessions, vocab]` becomes what follows the last of them.
    ///
    /// They are those that the session gets alone, as closely as products with several vectors are those with one
    /// (`docs/numerics.md`). Tokens are computed in as many passes as the longest of them needs, of each session at
    /// most its `prefill_chunk` in a pass: the sum of these bounds the memory for activations, and for all to go on
    /// after one pass, give pieces of at most that. Allocates nothing once it has computed as many tokens of as many
    /// sessions, unless a KV cache has to grow. No sessions: no logits.
    ///
    /// Errors: of any session those of [`Session::prefill`], `Argument` for sessions of different models,
    /// `Interrupted` if one of them is. After an error every sequence is as before.
    pub fn extend<'a>(
        &mut self,
        parts: &mut [(&'a mut Session, &'a [u32])],
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        extend(parts, Wanted::Last, &mut self.workspace, logits)
    }
}

/// [`Batch::extend`]; the logits of a session stand together.
pub(super) fn extend(
    parts: &mut [Part<'_>],
    wanted: Wanted,
    workspace: &mut Workspace,
    logits: &mut Vec<f32>,
) -> Result<()> {
    let Some((first, _)) = parts.first() else {
        logits.clear();
        return Ok(());
    };
    let model = Arc::clone(first.model());
    for (session, tokens) in &*parts {
        if !Arc::ptr_eq(&model, session.model()) {
            let message = "sessions of different models in one batch";
            return Err(Error::new(ErrorKind::Argument, message));
        }
        session.check(session.tokens().len(), tokens)?;
    }
    for (session, tokens) in &mut *parts {
        session.append(tokens);
    }
    let result = compute(&model, parts, wanted, workspace, logits);
    if result.is_err() {
        for (session, tokens) in parts {
            session.truncate(session.tokens().len() - tokens.len());
        }
    }
    result
}

/// Brings the caches up to the tokens.
fn compute(
    model: &Model,
    parts: &mut [Part<'_>],
    wanted: Wanted,
    workspace: &mut Workspace,
    logits: &mut Vec<f32>,
) -> Result<()> {
    let count = |tokens: &[u32]| match wanted {
        Wanted::Last => 1,
        Wanted::Every => tokens.len(),
    };
    let rows = parts.iter().map(|(_, tokens)| count(tokens)).sum::<usize>();
    logits.clear();
    rows.checked_mul(model.config().vocab_size)
        .and_then(|values| logits.try_reserve_exact(values).ok())
        .ok_or_else(|| {
            Error::new(
                ErrorKind::TooLarge,
                format!("no memory for the logits of {rows} positions"),
            )
        })?;
    let hidden = model.config().hidden_size;
    workspace.kept.resize(rows * hidden, 0.0);
    while parts.iter().any(|(session, _)| session.due() > 0) {
        model.hidden_states(parts, workspace)?;
        let Workspace {
            segments, x, kept, ..
        } = workspace;
        // Of the first position that is wanted of a session, in `kept`.
        let mut row = 0;
        for ((session, tokens), segment) in parts.iter().zip(segments) {
            let from = session.tokens().len() - count(tokens);
            let end = segment.first + segment.rows.len();
            let start = segment.first.max(from);
            if start < end {
                let to = (row + start - from) * hidden..(row + end - from) * hidden;
                let x = &x[(segment.rows.end + start - end) * hidden..segment.rows.end * hidden];
                kept[to].copy_from_slice(x);
            }
            row += count(tokens);
        }
    }
    let chunks = parts.iter().map(|(session, _)| session.chunk());
    model.logits(workspace, chunks.sum(), logits)
}

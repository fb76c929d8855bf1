//! Sequences and the memory of their keys and values: a [`Context`] computes one or several
//! [`Sequence`]s in a pass.
#![forbid(unsafe_code)]

use super::cache::{BlockPool, BlockTables, CacheLayout, CacheType};
use super::decoder::Engine;
use super::model::Model;
use super::pass::{Pass, Segment};
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The memory that sequences may take, and when to stop.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// Most positions of a sequence, prompt and answer; `None` is what the model was made for.
    pub context: Option<usize>,
    /// Number of positions of a sequence that are computed at once, 1 to 65,536; bounds the memory
    /// for activations.
    pub prefill_chunk: usize,
    /// Storage of keys and values.
    pub cache_type: CacheType,
    /// Most bytes of the KV cache that all sequences use; `None` is no limit.
    ///
    /// The memory behind it is allocated for 256 positions of all layers at a time, and kept for
    /// later sequences until the context is dropped.
    pub max_cache_bytes: Option<usize>,
    /// A flag that ends every call with an error of kind `Interrupted`, within the time of one
    /// layer, once it is true; sequences are then as before the call. `None`: calls cannot be
    /// stopped.
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

/// The positions whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// The last token of each sequence.
    Last,
    /// Each of the tokens that are appended.
    All,
}

/// The KV cache of some sequences, and the forward passes over them.
///
/// Weights are read once for all sequences of a pass. Each call says which sequences take part:
/// some may join, leave, or be cut back between two calls. One token of one sequence and many of
/// another may be in the same call, so that a prompt is taken piece by piece while others generate.
///
/// ```no_run
/// # fn main() -> upg_kernel::Result<()> {
/// use std::sync::Arc;
/// use upg_kernel::UPGModel;
/// use upg_kernel::inference::{Context, Logits, SessionOptions};
///
/// let model = UPGModel::from_file("smollm2.safetensors")?;
/// let mut context = Context::new(Arc::clone(model.model()), &SessionOptions::default())?;
/// let (mut one, mut other) = (context.sequence(), context.sequence());
/// let mut logits = Vec::new();
/// let parts = &mut [(&mut one, &[504, 3575, 282][..]), (&mut other, &[19556])];
/// context.extend(parts, Logits::Last, &mut logits)?;
/// let after_other = &logits[model.model().config().vocab_size..];
/// # let _ = after_other;
/// # Ok(())
/// # }
/// ```
pub struct Context {
    model: Arc<Model>,
    engine: Box<dyn Engine>,
    pool: BlockPool,
    /// Most positions of a sequence.
    len: usize,
    chunk: usize,
    interrupt: Option<Arc<AtomicBool>>,
    pass: Pass,
    /// Logits of one of several passes.
    found: Vec<f32>,
}

/// The tokens of a sequence, and where its keys and values are in the cache of a [`Context`].
///
/// Its memory is free when it is dropped. A clone is a fork: both share what they have in common.
#[derive(Debug, Clone)]
pub struct Sequence {
    tokens: Vec<u32>,
    tables: BlockTables,
    /// Set if the cache was made with the frequencies for long sequences.
    long: bool,
}

impl Sequence {
    /// Returns the tokens of the sequence so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Cuts the sequence back to its first `len` tokens; nothing happens if it is not longer.
    pub fn truncate(&mut self, len: usize) {
        self.tokens.truncate(len);
        self.tables.truncate(len);
    }

    /// Returns how many of the first of `tokens` the sequence already has; all but the last at
    /// most.
    pub fn common_prefix(&self, tokens: &[u32]) -> usize {
        let pairs = self.tokens.iter().zip(tokens);
        let common = pairs.take_while(|(a, b)| a == b).count();
        common.min(tokens.len().saturating_sub(1))
    }

    /// Returns the number of positions whose keys and values are in the cache.
    pub(super) fn computed(&self) -> usize {
        self.tables.len()
    }

    /// Returns how many of the first of `tokens` have keys and values here that `tokens` can
    /// continue; 0 where a window has given back what it would see, or where the frequencies of
    /// `model` are others for a sequence of that length.
    pub(super) fn usable_prefix(&self, tokens: &[u32], model: &Model) -> usize {
        let common = self.tables.usable(self.common_prefix(tokens));
        let is_same = |len| model.rope().is_long(len) == self.long;
        match is_same(common + 1) && is_same(tokens.len()) {
            true => common,
            false => 0,
        }
    }

    /// Returns the number of positions that are not computed yet.
    fn pending(&self) -> usize {
        self.tokens.len() - self.tables.len()
    }

    /// Appends tokens that were checked; [`Sequence::truncate`] takes them back.
    fn append(&mut self, model: &Model, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        let long = model.rope().is_long(self.tokens.len());
        if long != self.long {
            self.tables.truncate(0);
            self.long = long;
        }
    }
}

/// A sequence and the tokens that are appended to it.
pub type Part<'a> = (&'a mut Sequence, &'a [u32]);

impl Context {
    /// Makes an empty cache. It grows with the sequences.
    ///
    /// Errors: `Argument` (a context of 0 or beyond that of the model, a chunk of 0).
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Self> {
        let argument = |message: String| Err(Error::new(ErrorKind::Argument, message));
        let most = model.config().context;
        let len = options.context.unwrap_or(most);
        if !(1..=most).contains(&len) {
            return argument(format!("context of {len} positions, expected 1 to {most}"));
        }
        let chunk = options.prefill_chunk;
        if !(1..=MAX_PREFILL_CHUNK).contains(&chunk) {
            return argument(format!(
                "prefill chunk of {chunk} positions, expected 1 to {MAX_PREFILL_CHUNK}"
            ));
        }
        let layout = Arc::new(CacheLayout::new(model.config(), options.cache_type));
        Ok(Self {
            engine: model.engine(&layout)?,
            pool: BlockPool::new(layout, options.max_cache_bytes)?,
            model,
            len,
            chunk,
            interrupt: options.interrupt.clone(),
            pass: Pass::default(),
            found: Vec::new(),
        })
    }

    /// Returns an empty sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence {
            tokens: Vec::new(),
            tables: BlockTables::new(&self.pool),
            long: false,
        }
    }

    /// Returns the model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Returns the most tokens that a sequence can have.
    pub fn max_len(&self) -> usize {
        self.len
    }

    /// Returns the most positions of a sequence in a forward pass.
    pub fn prefill_chunk(&self) -> usize {
        self.chunk
    }

    /// Returns the bytes of the cache that sequences hold.
    pub fn cache_bytes(&self) -> usize {
        self.pool.used_bytes()
    }

    /// Returns the most bytes that the cache of one sequence can take.
    ///
    /// Errors (`TooLarge`): more than fit into a number of this machine.
    pub fn sequence_bytes(&self) -> Result<usize> {
        self.bytes_of(self.len)
    }

    /// Returns the most bytes that the cache of a sequence of so many positions takes. Errors: as
    /// [`Context::sequence_bytes`].
    pub(super) fn bytes_of(&self, positions: usize) -> Result<usize> {
        self.pool.layout().sequence_bytes(positions, self.chunk)
    }

    /// Appends to each sequence its tokens; `logits` becomes those that are wanted, `[n, vocab]`.
    ///
    /// The logits of a sequence stand together, and are those that it gets alone, as closely as
    /// products with several vectors are those with one (`docs/numerics.md`). Takes as many passes
    /// as the longest part needs; a pass has at most `prefill_chunk` positions of each sequence,
    /// which bounds the memory for activations. Allocates nothing once it has computed as much,
    /// unless the cache has to grow. No parts: no logits.
    ///
    /// Errors: `Argument` (no tokens, an id beyond the vocabulary, more than fit into the context,
    /// a sequence of another context), `TooLarge` (no memory for the cache or for the result),
    /// `Interrupted`. After an error every sequence is as before.
    pub fn extend(
        &mut self,
        parts: &mut [Part<'_>],
        wanted: Logits,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        for (sequence, tokens) in &*parts {
            if !sequence.tables.are_of(&self.pool) {
                let message = "a sequence of another context";
                return Err(Error::new(ErrorKind::Argument, message));
            }
            self.check(sequence.tokens.len(), tokens)?;
        }
        for (sequence, tokens) in &mut *parts {
            sequence.append(&self.model, tokens);
        }
        let result = self.compute(parts, wanted, logits);
        if result.is_err() {
            for (sequence, tokens) in parts {
                sequence.truncate(sequence.tokens.len() - tokens.len());
            }
        }
        result
    }

    /// Checks that `tokens` can follow the first `position` ones of a sequence.
    ///
    /// Errors (`Argument`): no tokens, an id beyond the vocabulary, more than fit into the context.
    pub(super) fn check(&self, position: usize, tokens: &[u32]) -> Result<()> {
        let argument = |message: String| Error::new(ErrorKind::Argument, message);
        if tokens.is_empty() {
            return Err(argument("no tokens to compute".into()));
        }
        let vocab = self.model.config().vocab_size;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(argument(format!(
                "token id {token} is not in the vocabulary of {vocab}"
            )));
        }
        let len = position.saturating_add(tokens.len());
        if len <= self.len {
            return Ok(());
        }
        let what = if position == 0 { "prompt" } else { "sequence" };
        let message = format!(
            "{what} of {len} tokens does not fit the context of {}",
            self.len
        );
        let hint = match self.len < self.model.config().context {
            true => "shorten it or ask for a larger context",
            false => "shorten it: the model has no larger context",
        };
        Err(argument(message).hint(hint))
    }

    /// Computes what is pending, pass by pass.
    fn compute(
        &mut self,
        parts: &mut [Part<'_>],
        wanted: Logits,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let count = |tokens: &[u32]| match wanted {
            Logits::Last => 1,
            Logits::All => tokens.len(),
        };
        let vocab = self.model.config().vocab_size;
        let rows = parts.iter().map(|(_, tokens)| count(tokens)).sum::<usize>();
        logits.clear();
        let values = rows.checked_mul(vocab);
        values
            .and_then(|values| logits.try_reserve_exact(values).ok())
            .ok_or_else(|| {
                let message = format!("no memory for the logits of {rows} positions");
                Error::new(ErrorKind::TooLarge, message)
            })?;
        let pending = |parts: &[Part<'_>]| parts.iter().map(|(s, _)| s.pending()).max();
        if pending(parts).unwrap_or(0) <= self.chunk {
            return self.pass(parts, count, logits);
        }
        logits.resize(rows * vocab, 0.0);
        while pending(parts).unwrap_or(0) > 0 {
            let mut found = std::mem::take(&mut self.found);
            found.clear();
            let result = self.pass(parts, count, &mut found);
            self.place(parts, count, &found, logits);
            self.found = found;
            result?;
        }
        Ok(())
    }

    /// Computes one pass and appends the logits of its wanted rows.
    fn pass(
        &mut self,
        parts: &mut [Part<'_>],
        count: impl Fn(&[u32]) -> usize,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let pass = &mut self.pass;
        pass.clear();
        for (sequence, tokens) in &mut *parts {
            let (first, n) = (sequence.tables.len(), sequence.pending().min(self.chunk));
            let limits = (self.len, self.chunk);
            sequence.tables.reserve(&self.pool, n, limits, pass)?;
            let start = pass.tokens.len();
            pass.tokens
                .extend_from_slice(&sequence.tokens[first..first + n]);
            let wanted_from = sequence.tokens.len() - count(tokens);
            let wanted = first.max(wanted_from)..first + n;
            pass.wanted
                .extend(wanted.map(|position| start + position - first));
            pass.segments.push(Segment {
                rows: start..start + n,
                first,
                long: sequence.long,
            });
        }
        if pass.rows() == 0 {
            return Ok(());
        }
        let proceed = || proceed(self.interrupt.as_deref());
        self.engine.forward(pass, &proceed, logits)?;
        for ((sequence, _), segment) in parts.iter_mut().zip(&self.pass.segments) {
            sequence.tables.commit(segment.rows.len());
        }
        Ok(())
    }

    /// Copies the logits of a pass to where they belong in those of all passes.
    fn place(
        &self,
        parts: &[Part<'_>],
        count: impl Fn(&[u32]) -> usize,
        found: &[f32],
        logits: &mut [f32],
    ) {
        let vocab = self.model.config().vocab_size;
        let mut found = found.chunks_exact(vocab);
        let mut row = 0;
        for ((sequence, tokens), segment) in parts.iter().zip(&self.pass.segments) {
            let wanted_from = sequence.tokens.len() - count(tokens);
            let end = segment.first + segment.rows.len();
            for position in segment.first.max(wanted_from)..end {
                let Some(found) = found.next() else {
                    return;
                };
                let at = row + position - wanted_from;
                logits[at * vocab..(at + 1) * vocab].copy_from_slice(found);
            }
            row += count(tokens);
        }
    }
}

/// Errors (`Interrupted`): the flag is set.
fn proceed(interrupt: Option<&AtomicBool>) -> Result<()> {
    match interrupt.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        true => Err(Error::new(ErrorKind::Interrupted, "stopped")),
        false => Ok(()),
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("model", &self.model)
            .field("pool", &self.pool)
            .field("len", &self.len)
            .field("chunk", &self.chunk)
            .finish_non_exhaustive()
    }
}

//! Several requests in common forward passes: a [`Scheduler`] whose requests join, end and fail one by one.
#![forbid(unsafe_code)]

use super::context::{Context, Logits, Part, Sequence, SessionOptions};
use super::generate::{Choices, FinishReason, StopStrings, Text};
use super::tokenizer::{DecodeStream, Tokenizer};
use super::{LogProbs, Sampler, UPGModel};
use crate::error::{Error, ErrorKind, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// A prompt to continue.
#[derive(Debug)]
pub struct Request {
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Chooses the tokens of this request alone.
    pub sampler: Sampler,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the answer, and are not given out.
    pub stop_strings: Vec<String>,
    /// Number of the most probable tokens that [`Event::Token`] reports for each position; `None`: no such events.
    pub log_probs: Option<usize>,
}

/// The number of a request, given by [`Scheduler::submit`] in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// News of a request. After `Finished` or `Failed` there is none.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A token of the answer was chosen; only with [`Request::log_probs`].
    Token(u32, LogProbs),
    /// The next piece of the answer; never empty.
    Text(String),
    /// The answer is complete.
    Finished(FinishReason),
    /// The request has ended with an error. Others go on.
    Failed(Error),
}

/// Continues any number of prompts, some of them in the same forward passes.
///
/// It owns what it needs and can be kept in a thread of its own. Each [`Scheduler::step`] is one forward pass: every
/// sequence that generates has one token in it, and prompts share what `prefill_chunk` leaves, so that a long prompt holds
/// up nobody for longer than that. (A longrope model computes a sequence again, all at once, where it grows past the
/// switch of its frequencies.) Answers are those that a request gets alone, as closely as products with several vectors
/// are those with one (`docs/numerics.md`).
///
/// A request starts when fewer than `at_once` others run and the memory is there that it may need to its end:
/// [`SessionOptions::max_cache_bytes`] is never exceeded, and no request is interrupted for the memory of another.
///
/// ```no_run
/// # fn main() -> upg_kernel::Result<()> {
/// use upg_kernel::UPGModel;
/// use upg_kernel::inference::{Event, Request, Sampler, SamplingOptions, Scheduler, SessionOptions};
///
/// let model = UPGModel::from_file("smollm2-q4.safetensors")?;
/// let mut scheduler = Scheduler::new(&model, 8, &SessionOptions::default())?;
/// for prompt in ["Once upon a time", "1, 2, 3,"] {
///     scheduler.submit(Request {
///         prompt: model.tokenizer()?.encode(prompt, true)?,
///         sampler: Sampler::new(SamplingOptions::default())?,
///         max_tokens: 20,
///         stop_strings: vec!["\n".into()],
///         log_probs: None,
///     })?;
/// }
/// while !scheduler.is_idle() {
///     for (id, event) in scheduler.step() {
///         if let Event::Text(text) = event {
///             println!("{id:?}: {text}");
///         }
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Scheduler {
    model: UPGModel,
    context: Context,
    at_once: usize,
    max_bytes: usize,
    next: u64,
    running: Vec<Running>,
    waiting: VecDeque<Running>,
    /// Logits of a pass, `[running, vocab]`.
    logits: Vec<f32>,
}

/// A request on its way.
#[derive(Debug)]
struct Running {
    id: RequestId,
    sequence: Sequence,
    prompt: Vec<u32>,
    sampler: Sampler,
    choices: Choices,
    text: Text<DecodeStream<Arc<Tokenizer>>>,
    log_probs: Option<usize>,
    /// Most bytes of the cache that it may take.
    bytes: usize,
}

impl Scheduler {
    /// Makes a scheduler for up to `at_once` sequences in a forward pass.
    ///
    /// Errors: `Argument` for an `at_once` of 0; `Missing` if the model has no tokenizer; those of [`Context::new`].
    pub fn new(model: &UPGModel, at_once: usize, options: &SessionOptions) -> Result<Self> {
        if at_once == 0 {
            let message = "no sequences at once, expected at least 1";
            return Err(Error::new(ErrorKind::Argument, message));
        }
        model.tokenizer()?;
        Ok(Self {
            context: Context::new(Arc::clone(model.model()), options)?,
            model: model.clone(),
            at_once,
            max_bytes: options.max_cache_bytes.unwrap_or(usize::MAX),
            next: 0,
            running: Vec::new(),
            waiting: VecDeque::new(),
            logits: Vec::new(),
        })
    }

    /// Takes a request, which starts with one of the next [`Scheduler::step`]s.
    ///
    /// Errors: `Argument` (a prompt that is empty, too long or has ids beyond the vocabulary; an empty stop string),
    /// `TooLarge` (it may need more than `max_cache_bytes` by itself).
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        self.context.check(0, &request.prompt)?;
        let positions = request.prompt.len().saturating_add(request.max_tokens);
        let bytes = self
            .context
            .bytes_of(positions.min(self.context.max_len()))?;
        if bytes > self.max_bytes {
            let message = format!(
                "the KV cache of a request takes up to {bytes} bytes, expected at most {}",
                self.max_bytes
            );
            return Err(Error::new(ErrorKind::TooLarge, message)
                .hint("shorten the prompt, or ask for fewer tokens"));
        }
        let stops = StopStrings::new(request.stop_strings)?;
        let decoder = DecodeStream::new(self.model.shared_tokenizer()?, true);
        let id = RequestId(self.next);
        self.waiting.push_back(Running {
            id,
            sequence: self.context.sequence(),
            prompt: request.prompt,
            sampler: request.sampler,
            choices: Choices::new(self.model.generate_options(request.max_tokens)?),
            text: Text::new(decoder, stops),
            log_probs: request.log_probs,
            bytes,
        });
        self.next += 1;
        Ok(id)
    }

    /// Ends a request without another event; its memory is free at once. Returns whether it was there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let before = self.running.len() + self.waiting.len();
        self.running.retain(|request| request.id != id);
        self.waiting.retain(|request| request.id != id);
        self.running.len() + self.waiting.len() < before
    }

    /// Returns whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Returns the number of requests that run and that wait.
    pub fn requests(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Returns the bytes of the KV cache that are in use.
    pub fn cache_bytes(&self) -> usize {
        self.context.cache_bytes()
    }

    /// Computes one forward pass; returns what follows from it, in the order of the requests' ids.
    ///
    /// An error ends the request that it belongs to. An interrupt ([`SessionOptions::interrupt`]) ends all that run.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        self.admit();
        let mut events = Vec::new();
        if self.running.is_empty() {
            return events;
        }
        match self.pass() {
            Ok(()) => self.advance(0, &mut events),
            Err(_) => self.one_by_one(&mut events),
        }
        self.running.retain(|request| !request.is_over());
        events
    }

    /// Starts requests in their order, as long as there is room for the next one.
    fn admit(&mut self) {
        let mut reserved: usize = self.running.iter().map(|request| request.bytes).sum();
        while self.running.len() < self.at_once
            && let Some(next) = self.waiting.front()
            && let Some(with_next) = reserved.checked_add(next.bytes)
            && with_next <= self.max_bytes
        {
            reserved = with_next;
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Computes one pass over all running requests. After an error every sequence is as before.
    fn pass(&mut self) -> Result<()> {
        let mut left = self
            .context
            .prefill_chunk()
            .saturating_sub(self.running.len());
        let mut parts = Vec::with_capacity(self.running.len());
        for request in &mut self.running {
            let part = request.pending(left);
            left -= part.1.len().saturating_sub(1);
            parts.push(part);
        }
        self.context
            .extend(&mut parts, Logits::Last, &mut self.logits)
    }

    /// Finds out whose error it was, after a pass that has failed: computes a pass for each request alone.
    fn one_by_one(&mut self, events: &mut Vec<(RequestId, Event)>) {
        for index in 0..self.running.len() {
            let chunk = self.context.prefill_chunk();
            let request = &mut self.running[index];
            let parts = &mut [request.pending(chunk - 1)];
            match self.context.extend(parts, Logits::Last, &mut self.logits) {
                Ok(()) => self.advance(index, events),
                Err(error) => {
                    request.text.finish = Some(FinishReason::Failed);
                    events.push((request.id, Event::Failed(error)));
                }
            }
        }
    }

    /// Chooses the next token of the requests from `first` on that `logits` has rows of.
    fn advance(&mut self, first: usize, events: &mut Vec<(RequestId, Event)>) {
        let vocab = self.model.model().config().vocab_size;
        let context = self.context.max_len();
        let rows = self.logits.chunks_exact(vocab);
        for (request, logits) in self.running[first..].iter_mut().zip(rows) {
            if let Err(error) = request.advance(logits, context, events) {
                request.text.finish = Some(FinishReason::Failed);
                events.push((request.id, Event::Failed(error)));
            } else if let Some(reason) = request.text.finish {
                events.push((request.id, Event::Finished(reason)));
            }
        }
    }
}

impl Running {
    fn is_over(&self) -> bool {
        self.text.finish.is_some()
    }

    /// Returns what to compute next: of the prompt up to `more` tokens beside the one that it has in any case.
    fn pending(&mut self, more: usize) -> Part<'_> {
        let tokens = match &self.choices.pending {
            Some(token) => std::slice::from_ref(token),
            None => {
                let rest = &self.prompt[self.sequence.tokens().len()..];
                &rest[..rest.len().min(1 + more)]
            }
        };
        (&mut self.sequence, tokens)
    }

    /// Takes the logits of what was computed; appends what follows from them to `events`.
    fn advance(
        &mut self,
        logits: &[f32],
        context: usize,
        events: &mut Vec<(RequestId, Event)>,
    ) -> Result<()> {
        let len = self.sequence.tokens().len();
        if len < self.prompt.len() {
            return Ok(());
        }
        let mut text = String::new();
        if !self.choices.is_over(len, context) {
            let history = self.sequence.tokens();
            if let Some(token) = self.choices.choose(&mut self.sampler, logits, history)? {
                if let Some(n) = self.log_probs {
                    let log_probs = LogProbs::new(logits, token, n)?;
                    events.push((self.id, Event::Token(token, log_probs)));
                }
                text = self.text.token(token)?;
            }
        }
        if self.text.finish.is_none() && self.choices.is_over(len, context) {
            text.push_str(&self.text.end(self.choices.finish)?);
        }
        if !text.is_empty() {
            events.push((self.id, Event::Text(text)));
        }
        Ok(())
    }
}

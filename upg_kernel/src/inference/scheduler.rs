//! Requests that share forward passes: a [`Scheduler`] whose requests join, end and fail one by
//! one.
#![forbid(unsafe_code)]

use super::context::{Context, Logits, Part, Sequence, SessionOptions};
use super::generate::{FinishReason, StopStrings, Text, Timings};
use super::model::Model;
use super::{LogProbs, Sampler};
use crate::error::{Error, ErrorKind, Result};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod request;

pub use request::{Event, Request, RequestId};

/// Continues any number of prompts, some of them in the same forward passes.
///
/// It owns what it needs and can be kept in a thread of its own. Each [`Scheduler::step`] is one
/// forward pass: every sequence that generates has one token in it, and prompts share what
/// `prefill_chunk` leaves, so that a long prompt holds up nobody for longer than that. (A longrope
/// model computes a sequence again, all at once, where it grows past the switch of its
/// frequencies.) Answers are those that a request gets alone, as closely as products with several
/// vectors are those with one (`docs/numerics.md`).
///
/// A request starts when fewer than `at_once` others run and the memory is there that it may need
/// to its end: [`SessionOptions::max_cache_bytes`] is never exceeded, and no request is interrupted
/// for the memory of another. Shared memory counts for each request that shares it.
///
/// A prompt that begins as a sequence that runs, or as one of the last `at_once` that ended, shares
/// the keys and values of the common part: the next turn of a chat computes what is new. What ended
/// gives way where others need its memory.
///
/// ```no_run
/// # fn main() -> upg_kernel::Result<()> {
/// use upg_kernel::UPGModel;
/// use upg_kernel::inference::{Event, SessionOptions};
///
/// let model = UPGModel::from_file("smollm2.safetensors")?;
/// let mut scheduler = model.scheduler(8, &SessionOptions::default())?;
/// for prompt in ["Once upon a time", "1, 2, 3,"] {
///     let mut request = model.request(model.tokenizer()?.encode(prompt, true)?, 20);
///     request.stop_strings = vec!["\n".into()];
///     scheduler.submit(request)?;
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
    context: Context,
    at_once: usize,
    max_bytes: usize,
    next: u64,
    running: Vec<Running>,
    waiting: VecDeque<Running>,
    /// Sequences of requests that have ended, the last one at the back.
    ended: VecDeque<Sequence>,
    /// Logits of a pass, `[running, vocab]`.
    logits: Vec<f32>,
}

/// A request on its way.
#[derive(Debug)]
struct Running {
    id: RequestId,
    sequence: Sequence,
    prompt: Vec<u32>,
    max_tokens: usize,
    sampler: Sampler,
    stop_ids: Vec<u32>,
    text: Option<Text>,
    log_probs: Option<usize>,
    /// Chosen, but not computed yet: it is only computed if another token is wanted.
    pending: Option<u32>,
    timings: Timings,
    state: State,
    /// Most bytes of the cache that it may take.
    bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    /// Its sequence may be continued.
    Ended,
    Failed,
}

impl Scheduler {
    /// Makes a scheduler for up to `at_once` sequences in a forward pass.
    ///
    /// Errors: `Argument` for an `at_once` of 0; those of [`Context::new`].
    pub fn new(model: Arc<Model>, at_once: usize, options: &SessionOptions) -> Result<Self> {
        if at_once == 0 {
            let message = "no sequences at once, expected at least 1";
            return Err(Error::new(ErrorKind::Argument, message));
        }
        Ok(Self {
            context: Context::new(model, options)?,
            at_once,
            max_bytes: options.max_cache_bytes.unwrap_or(usize::MAX),
            next: 0,
            running: Vec::new(),
            waiting: VecDeque::new(),
            ended: VecDeque::new(),
            logits: Vec::new(),
        })
    }

    /// Takes a request, which starts with one of the next [`Scheduler::step`]s.
    ///
    /// Errors: `Argument` (a prompt that is empty, too long or has ids beyond the vocabulary; an
    /// empty stop string, or stop strings without a decoder), `TooLarge` (it may need more than
    /// `max_cache_bytes` by itself).
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
        if request.decoder.is_none() && !request.stop_strings.is_empty() {
            let message = "stop strings without a decoder of the answer";
            return Err(Error::new(ErrorKind::Argument, message));
        }
        let stops = StopStrings::new(request.stop_strings)?;
        let id = RequestId(self.next);
        self.waiting.push_back(Running {
            id,
            sequence: self.context.sequence(),
            prompt: request.prompt,
            max_tokens: request.max_tokens,
            sampler: request.sampler,
            stop_ids: request.stop_ids,
            text: request.decoder.map(|decoder| Text::new(decoder, stops)),
            log_probs: request.log_probs,
            pending: None,
            timings: Timings::default(),
            state: State::Runs,
            bytes,
        });
        self.next += 1;
        Ok(id)
    }

    /// Submits a request and returns its text as an iterator, which computes a forward pass where
    /// it needs one.
    ///
    /// An answer that is not read to its end is cancelled; its sequence may be continued. Errors:
    /// those of [`Scheduler::submit`]; `Argument` if other requests run or wait, or for a request
    /// without a decoder.
    pub fn stream(&mut self, request: Request) -> Result<TextStream<'_>> {
        TextStream::new(self, request)
    }

    /// Ends a request without another event; its memory is free at once. Returns whether it was
    /// there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        self.take(id).is_some()
    }

    /// Removes a request.
    fn take(&mut self, id: RequestId) -> Option<Running> {
        if let Some(index) = self.running.iter().position(|request| request.id == id) {
            return Some(self.running.remove(index));
        }
        let index = self.waiting.iter().position(|request| request.id == id)?;
        self.waiting.remove(index)
    }

    /// Keeps the sequence of a request that has ended, in place of an older one.
    fn keep(&mut self, sequence: Sequence) {
        if sequence.computed() == 0 {
            return;
        }
        self.ended.push_back(sequence);
        if self.ended.len() > self.at_once {
            self.ended.pop_front();
        }
    }

    /// Frees the memory of sequences that have ended.
    pub fn forget(&mut self) {
        self.ended.clear();
    }

    /// Returns whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Returns the number of requests that run and that wait.
    pub fn requests(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// Returns the tokens and the time of a request so far; `None` if it has ended.
    pub fn timings(&self, id: RequestId) -> Option<Timings> {
        let mut all = self.running.iter().chain(&self.waiting);
        all.find(|request| request.id == id)
            .map(|request| request.timings)
    }

    /// Returns how many tokens of a request's prompt are in the cache, and how many it has; `None`
    /// if it has ended.
    pub fn prompt_progress(&self, id: RequestId) -> Option<(usize, usize)> {
        let mut all = self.running.iter().chain(&self.waiting);
        let request = all.find(|request| request.id == id)?;
        let len = request.prompt.len();
        Some((request.sequence.computed().min(len), len))
    }

    /// Returns the bytes of the KV cache that are in use, those of sequences that have ended
    /// included.
    pub fn cache_bytes(&self) -> usize {
        self.context.cache_bytes()
    }

    /// Computes one forward pass; returns what follows from it, in the order of the requests' ids.
    ///
    /// An error ends the request that it belongs to. An interrupt ([`SessionOptions::interrupt`])
    /// ends all that run.
    pub fn step(&mut self) -> Vec<(RequestId, Event)> {
        self.admit();
        let mut events = Vec::new();
        if self.running.is_empty() {
            return events;
        }
        let started = Instant::now();
        match self.pass() {
            Ok(()) => self.advance(0, started.elapsed(), &mut events),
            Err(_) => self.one_by_one(&mut events),
        }
        let mut index = 0;
        while let Some(request) = self.running.get(index) {
            match request.state {
                State::Runs => index += 1,
                State::Ended => {
                    let request = self.running.remove(index);
                    self.keep(request.sequence);
                }
                State::Failed => drop(self.running.remove(index)),
            }
        }
        events
    }

    /// Starts requests in their order, as long as there is room for the next one.
    fn admit(&mut self) {
        let mut reserved: usize = self.running.iter().map(|request| request.bytes).sum();
        while self.running.len() < self.at_once
            && let Some(next) = self.waiting.front()
            && let Some(with_next) = reserved.checked_add(next.bytes)
            && with_next <= self.max_bytes
            && let Some(next) = self.waiting.pop_front()
        {
            reserved = with_next;
            self.start(next);
            self.make_room(self.max_bytes - reserved);
        }
    }

    /// Starts a request with the longest beginning of its prompt that another sequence has.
    fn start(&mut self, mut request: Running) {
        let prompt = &request.prompt;
        let running = self.running.iter().map(|other| &other.sequence);
        let usable = |sequence: &Sequence| sequence.usable_prefix(prompt, self.context.model());
        let longest = running.chain(&self.ended).max_by_key(|s| usable(s));
        if let Some(sequence) = longest.filter(|sequence| usable(sequence) > 0) {
            request.sequence = sequence.clone();
            request.sequence.truncate(usable(sequence));
        }
        // What the request continues is part of it now.
        self.ended
            .retain(|sequence| sequence.common_prefix(prompt) < sequence.tokens().len());
        let cached = request.sequence.computed();
        request.timings.cached_tokens = cached;
        request.timings.prompt_tokens = prompt.len() - cached;
        self.running.push(request);
    }

    /// Forgets the oldest sequences that have ended until the others take at most `bytes`.
    fn make_room(&mut self, bytes: usize) {
        let size = |sequence: &Sequence| {
            let len = sequence.tokens().len();
            self.context.bytes_of(len).unwrap_or(usize::MAX)
        };
        let mut kept = 0usize;
        let newest_first = self.ended.iter().rev();
        let fitting = newest_first.take_while(|sequence| {
            kept = kept.saturating_add(size(sequence));
            kept <= bytes
        });
        let fitting = fitting.count();
        self.ended.drain(..self.ended.len() - fitting);
    }

    /// Computes one pass over all running requests. After an error every sequence is as before.
    fn pass(&mut self) -> Result<()> {
        let mut left = self
            .context
            .prefill_chunk()
            .saturating_sub(self.running.len());
        let mut parts = Vec::with_capacity(self.running.len());
        for request in &mut self.running {
            let part = request.next_part(left);
            left -= part.1.len().saturating_sub(1);
            parts.push(part);
        }
        self.context
            .extend(&mut parts, Logits::Last, &mut self.logits)
    }

    /// Computes a pass for each request alone, after a common pass has failed, to find whose error
    /// it was.
    fn one_by_one(&mut self, events: &mut Vec<(RequestId, Event)>) {
        for index in 0..self.running.len() {
            let (started, chunk) = (Instant::now(), self.context.prefill_chunk());
            let request = &mut self.running[index];
            let parts = &mut [request.next_part(chunk - 1)];
            match self.context.extend(parts, Logits::Last, &mut self.logits) {
                Ok(()) => self.advance(index, started.elapsed(), events),
                Err(error) => request.fail(error, events),
            }
        }
    }

    /// Chooses the next token of the requests from `first` on that `logits` has rows of, after a
    /// pass of this time.
    fn advance(&mut self, first: usize, time: Duration, events: &mut Vec<(RequestId, Event)>) {
        let vocab = self.context.model().config().vocab_size;
        let context = self.context.max_len();
        let rows = self.logits.chunks_exact(vocab);
        for (request, logits) in self.running[first..].iter_mut().zip(rows) {
            if let Err(error) = request.advance(logits, context, time, events) {
                request.fail(error, events);
            }
        }
    }
}

impl Running {
    /// Returns what to compute next: of the prompt up to `more` tokens beside the one that it has
    /// in any case.
    fn next_part(&mut self, more: usize) -> Part<'_> {
        let tokens = match &self.pending {
            Some(token) => std::slice::from_ref(token),
            None => {
                let rest = &self.prompt[self.sequence.tokens().len()..];
                &rest[..rest.len().min(1 + more)]
            }
        };
        (&mut self.sequence, tokens)
    }

    /// Takes the logits of what was computed in `time`; appends what follows from them to `events`.
    fn advance(
        &mut self,
        logits: &[f32],
        context: usize,
        time: Duration,
        events: &mut Vec<(RequestId, Event)>,
    ) -> Result<()> {
        let started = Instant::now();
        // The pass has computed it.
        let is_step = self.pending.take().is_some();
        let is_prompt_done = self.sequence.tokens().len() >= self.prompt.len();
        let finish = match is_prompt_done {
            true => self.choose(logits, context, events)?,
            false => None,
        };
        let spent = match is_step {
            true => &mut self.timings.step_time,
            false => &mut self.timings.prompt_time,
        };
        *spent += time + started.elapsed();
        if let Some(reason) = finish {
            self.state = State::Ended;
            events.push((self.id, Event::Finished(reason, self.timings)));
        }
        Ok(())
    }

    /// Chooses the next token, unless the answer is complete; returns why it is complete.
    fn choose(
        &mut self,
        logits: &[f32],
        context: usize,
        events: &mut Vec<(RequestId, Event)>,
    ) -> Result<Option<FinishReason>> {
        let mut text = String::new();
        let mut finish = self.limit(context);
        if finish.is_none() {
            let token = self.sampler.sample(logits, self.sequence.tokens())?;
            if self.stop_ids.contains(&token) {
                finish = Some(FinishReason::StopToken(token));
            } else {
                self.pending = Some(token);
                self.timings.generated_tokens += 1;
                let log_probs = self.log_probs.map(|n| LogProbs::new(logits, token, n));
                events.push((self.id, Event::Token(token, log_probs.transpose()?)));
                if let Some(of_answer) = &mut self.text {
                    let stopped;
                    (text, stopped) = of_answer.token(token)?;
                    finish = stopped.map(FinishReason::StopString);
                }
                finish = finish.or_else(|| self.limit(context));
            }
        }
        if let Some(reason) = finish
            && let Some(of_answer) = &mut self.text
        {
            let (rest, stopped) = of_answer.end()?;
            text.push_str(&rest);
            finish = Some(stopped.map_or(reason, FinishReason::StopString));
        }
        if !text.is_empty() {
            events.push((self.id, Event::Text(text)));
        }
        Ok(finish)
    }

    /// Returns why no token can follow.
    fn limit(&self, context: usize) -> Option<FinishReason> {
        let is_full = self.sequence.tokens().len() >= context;
        match self.pending {
            _ if self.timings.generated_tokens >= self.max_tokens => Some(FinishReason::MaxTokens),
            Some(_) if is_full => Some(FinishReason::ContextFull),
            _ => None,
        }
    }

    fn fail(&mut self, error: Error, events: &mut Vec<(RequestId, Event)>) {
        self.state = match error.kind() {
            ErrorKind::Interrupted => State::Ended,
            _ => State::Failed,
        };
        events.push((self.id, Event::Failed(error, self.timings)));
    }
}

/// The text of an answer in non-empty pieces, from [`Scheduler::stream`]. It ends for good after an
/// error.
#[derive(Debug)]
pub struct TextStream<'a> {
    scheduler: &'a mut Scheduler,
    id: RequestId,
    /// Pieces that were computed.
    pieces: VecDeque<Result<String>>,
    timings: Timings,
    finish: Option<FinishReason>,
    is_over: bool,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(scheduler: &'a mut Scheduler, request: Request) -> Result<Self> {
        let argument = |message| Err(Error::new(ErrorKind::Argument, message));
        if !scheduler.is_idle() {
            return argument("a stream beside other requests; use Scheduler::submit for several");
        }
        if request.decoder.is_none() {
            return argument("a text without a decoder");
        }
        Ok(Self {
            id: scheduler.submit(request)?,
            scheduler,
            pieces: VecDeque::new(),
            timings: Timings::default(),
            finish: None,
            is_over: false,
        })
    }

    /// Returns why the answer ended; `None` while it has not, and after an error.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// Returns the tokens and the time so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Computes the prompt. The iterator does it too, but cannot say how far it is.
    ///
    /// Calls `each` before every pass with the number of tokens that are in the cache, and of all.
    pub fn compute_prompt(&mut self, mut each: impl FnMut(usize, usize)) {
        while self.pieces.is_empty()
            && !self.is_over
            && let Some((done, all)) = self.scheduler.prompt_progress(self.id)
            && done < all
        {
            each(done, all);
            self.step();
        }
    }

    fn step(&mut self) {
        for (_, event) in self.scheduler.step() {
            match event {
                Event::Token(..) => {}
                Event::Text(text) => self.pieces.push_back(Ok(text)),
                Event::Finished(reason, timings) => {
                    (self.finish, self.timings, self.is_over) = (Some(reason), timings, true);
                }
                Event::Failed(error, timings) => {
                    (self.timings, self.is_over) = (timings, true);
                    self.pieces.push_back(Err(error));
                }
            }
        }
        if let Some(timings) = self.scheduler.timings(self.id) {
            self.timings = timings;
        }
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        while self.pieces.is_empty() && !self.is_over {
            self.step();
        }
        self.pieces.pop_front()
    }
}

impl Drop for TextStream<'_> {
    fn drop(&mut self) {
        if let Some(request) = self.scheduler.take(self.id) {
            self.scheduler.keep(request.sequence);
        }
    }
}

//! Text of several prompts at once.
#![forbid(unsafe_code)]

use super::generate::{Choices, FinishReason, StopStrings, Text};
use super::tokenizer::DecodeStream;
use super::{Context, Logits, Sampler, SessionOptions, UPGModel, context};
use crate::error::{Error, ErrorKind, Result};
use std::collections::VecDeque;
use std::sync::Arc;

/// What to continue, how to choose, and when to end.
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
}

/// Text of several requests, some of which are computed together: an iterator of non-empty pieces, each with the
/// number of its request. Ends for good after an error, which is one of all requests.
///
/// In a forward pass, every sequence that generates has one token; prompts share what `prefill_chunk` leaves, so
/// that a long one holds up nobody for longer than that (but a longrope model computes a prompt again, all at once, where
/// it grows past the switch of its frequencies).
#[derive(Debug)]
pub struct TextBatch<'a> {
    context: Context,
    logits: Vec<f32>,
    active: Vec<Sequence<'a>>,
    waiting: VecDeque<Sequence<'a>>,
    at_once: usize,
    chunk: usize,
    pieces: VecDeque<(usize, String)>,
    finished: Vec<Option<FinishReason>>,
    /// What is still to be told.
    error: Option<Error>,
}

/// A request on its way.
#[derive(Debug)]
struct Sequence<'a> {
    number: usize,
    tokens: context::Sequence,
    prompt: Vec<u32>,
    sampler: Sampler,
    choices: Choices,
    text: Text<DecodeStream<'a>>,
}

impl<'a> TextBatch<'a> {
    /// [`UPGModel::stream_batch`].
    pub(super) fn new(
        model: &'a UPGModel,
        requests: Vec<Request>,
        at_once: usize,
        options: &SessionOptions,
    ) -> Result<Self> {
        if at_once == 0 {
            let message = "no sequences at once, expected at least 1";
            return Err(Error::new(ErrorKind::Argument, message));
        }
        let context = Context::new(Arc::clone(model.model()), options)?;
        let finished = vec![None; requests.len()];
        let requests = requests.into_iter().enumerate();
        let waiting = requests
            .map(|(number, request)| Sequence::new(model, &context, number, request))
            .collect::<Result<_>>()?;
        Ok(Self {
            context,
            logits: Vec::new(),
            active: Vec::new(),
            waiting,
            at_once,
            chunk: options.prefill_chunk,
            pieces: VecDeque::new(),
            finished,
            error: None,
        })
    }

    /// Why request `number` ended; `None` while it has not, and for a number that there is not.
    pub fn finish_reason(&self, number: usize) -> Option<FinishReason> {
        self.finished.get(number).copied().flatten()
    }

    /// One forward pass, and what follows from it.
    fn pass(&mut self) -> Result<()> {
        let free = self.at_once - self.active.len();
        let joining = self.waiting.drain(..free.min(self.waiting.len()));
        self.active.extend(joining);
        let mut left = self.chunk.saturating_sub(self.active.len());
        let mut parts = Vec::with_capacity(self.active.len());
        for sequence in &mut self.active {
            let part = sequence.due(left);
            left -= part.1.len().saturating_sub(1);
            parts.push(part);
        }
        self.context
            .extend(&mut parts, Logits::Last, &mut self.logits)?;
        let vocab = self.logits.len() / self.active.len().max(1);
        for (sequence, logits) in self.active.iter_mut().zip(self.logits.chunks_exact(vocab)) {
            let text = sequence.advance(logits, self.context.max_len())?;
            if !text.is_empty() {
                self.pieces.push_back((sequence.number, text));
            }
            self.finished[sequence.number] = sequence.text.finish;
        }
        self.active
            .retain(|sequence| sequence.text.finish.is_none());
        Ok(())
    }

    fn fail(&mut self) {
        for sequence in self.active.drain(..).chain(self.waiting.drain(..)) {
            self.finished[sequence.number].get_or_insert(FinishReason::Failed);
        }
    }
}

impl<'a> Sequence<'a> {
    fn new(
        model: &'a UPGModel,
        context: &Context,
        number: usize,
        request: Request,
    ) -> Result<Self> {
        context.check(0, &request.prompt)?;
        let stops = StopStrings::new(request.stop_strings)?;
        Ok(Self {
            number,
            tokens: context.sequence(),
            prompt: request.prompt,
            sampler: request.sampler,
            choices: Choices::new(model.generate_options(request.max_tokens)?),
            text: Text::new(model.tokenizer()?.decode_stream(true), stops),
        })
    }

    /// What to compute next: of the prompt up to `more` tokens beside the one that it has in any case.
    fn due(&mut self, more: usize) -> context::Part<'_> {
        let tokens = match &self.choices.pending {
            Some(token) => std::slice::from_ref(token),
            None => {
                let rest = &self.prompt[self.tokens.tokens().len()..];
                &rest[..rest.len().min(1 + more)]
            }
        };
        (&mut self.tokens, tokens)
    }

    /// Takes the logits of what was computed; returns the text that comes of them.
    fn advance(&mut self, logits: &[f32], context: usize) -> Result<String> {
        if self.tokens.tokens().len() < self.prompt.len() {
            return Ok(String::new());
        }
        let mut text = String::new();
        if !self.choices.is_over(self.tokens.tokens().len(), context) {
            let history = self.tokens.tokens();
            if let Some(token) = self.choices.choose(&mut self.sampler, logits, history)? {
                text = self.text.token(token)?;
            }
        }
        if self.text.finish.is_none() && self.choices.is_over(self.tokens.tokens().len(), context) {
            text.push_str(&self.text.end(self.choices.finish)?);
        }
        Ok(text)
    }
}

impl Iterator for TextBatch<'_> {
    type Item = Result<(usize, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.pieces.is_empty() && !(self.active.is_empty() && self.waiting.is_empty()) {
            if let Err(error) = self.pass() {
                self.fail();
                self.error = Some(error);
            }
        }
        // What others got in the same pass comes first.
        let piece = self.pieces.pop_front().map(Ok);
        piece.or_else(|| self.error.take().map(Err))
    }
}

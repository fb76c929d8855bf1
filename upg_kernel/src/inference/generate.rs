//! Generation as iterators: token ids, and text that ends at stop strings.
#![forbid(unsafe_code)]

use super::sampler::Sampler;
use super::session::Session;
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::time::{Duration, Instant};

/// When generation ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GenerateOptions {
    /// Most tokens to generate; the default is 0, which generates nothing.
    pub max_tokens: usize,
    /// Ids that end the sequence; the id itself is not given out.
    pub stop_ids: Vec<u32>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// This token of `stop_ids` was chosen.
    StopToken(u32),
    /// The stop string of this index was found in the text.
    StopString(usize),
    /// `max_tokens` were generated.
    MaxTokens,
    /// The context is full.
    ContextFull,
    /// The last item was an error.
    Failed,
}

/// What a generation has taken so far. `Display` is one line for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timings {
    /// Tokens of the prompt that were computed; those the session already held are not counted.
    pub prompt_tokens: usize,
    /// Time for them: what one waits for the first token.
    pub prompt_time: Duration,
    /// Tokens after the first one, a forward pass each.
    pub steps: usize,
    /// Time for those passes and for choosing their tokens.
    pub step_time: Duration,
}

impl Timings {
    /// Tokens of the prompt per second; 0 before the prompt is computed.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens per second, without the first one; 0 before the second.
    pub fn step_rate(&self) -> f64 {
        rate(self.steps, self.step_time)
    }
}

fn rate(count: usize, time: Duration) -> f64 {
    match count {
        0 => 0.0,
        _ => count as f64 / time.as_secs_f64().max(1e-9),
    }
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "first token after {:.2} s ({} prompt tokens, {:.1} tokens/s), then {:.1} tokens/s",
            self.prompt_time.as_secs_f64(),
            self.prompt_tokens,
            self.prompt_rate(),
            self.step_rate()
        )
    }
}

/// Generated token ids, one forward pass each. Ends for good after an error.
#[derive(Debug)]
pub struct TokenStream<'a> {
    session: &'a mut Session,
    sampler: &'a mut Sampler,
    choices: Choices,
    logits: Vec<f32>,
    timings: Timings,
}

impl<'a> TokenStream<'a> {
    /// Computes the prompt. `prompt` is the whole sequence (in a chat: all turns so far); the part
    /// that the session already holds at its front is not computed again.
    ///
    /// Errors: those of [`Session::replace`].
    pub fn new(
        session: &'a mut Session,
        sampler: &'a mut Sampler,
        prompt: &[u32],
        options: GenerateOptions,
    ) -> Result<Self> {
        let started = Instant::now();
        let held = session.common_prefix(prompt);
        let logits = session.replace(prompt)?;
        Ok(Self {
            logits,
            session,
            sampler,
            choices: Choices::new(options),
            timings: Timings {
                prompt_tokens: prompt.len() - held,
                prompt_time: started.elapsed(),
                ..Timings::default()
            },
        })
    }

    /// Why the stream ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.choices.finish
    }

    /// How many tokens were given out.
    pub fn generated(&self) -> usize {
        self.choices.generated
    }

    /// What it has taken so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    fn advance(&mut self) -> Result<Option<u32>> {
        let started = Instant::now();
        let (len, context) = (self.session.tokens().len(), self.session.context());
        if self.choices.is_over(len, context) {
            return Ok(None);
        }
        let pending = self.choices.pending;
        if let Some(token) = pending {
            self.session.step_into(token, &mut self.logits)?;
        }
        let history = self.session.tokens();
        let token = self.choices.choose(self.sampler, &self.logits, history);
        if pending.is_some() {
            self.timings.steps += 1;
            self.timings.step_time += started.elapsed();
        }
        token
    }
}

impl Iterator for TokenStream<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        let token = self.advance();
        if token.is_err() {
            self.choices.finish = Some(FinishReason::Failed);
        }
        token.transpose()
    }
}

/// What a generation has chosen, whoever computes the logits.
#[derive(Debug)]
pub(super) struct Choices {
    options: GenerateOptions,
    /// Chosen, but not yet part of the session: computed only if another token is asked for.
    pub(super) pending: Option<u32>,
    pub(super) generated: usize,
    pub(super) finish: Option<FinishReason>,
}

impl Choices {
    pub(super) fn new(options: GenerateOptions) -> Self {
        Self {
            options,
            pending: None,
            generated: 0,
            finish: None,
        }
    }

    /// Returns whether nothing more is to be chosen after `len` tokens and the pending one.
    pub(super) fn is_over(&mut self, len: usize, context: usize) -> bool {
        if self.finish.is_none() {
            let is_full = len >= context;
            self.finish = match self.pending {
                _ if self.generated >= self.options.max_tokens => Some(FinishReason::MaxTokens),
                Some(_) if is_full => Some(FinishReason::ContextFull),
                _ => None,
            };
        }
        self.finish.is_some()
    }

    /// The token after `history`, whose last one has these logits; `None` if it ends the sequence. It is pending now.
    pub(super) fn choose(
        &mut self,
        sampler: &mut Sampler,
        logits: &[f32],
        history: &[u32],
    ) -> Result<Option<u32>> {
        let token = sampler.sample(logits, history)?;
        self.pending = None;
        if self.options.stop_ids.contains(&token) {
            self.finish = Some(FinishReason::StopToken(token));
            return Ok(None);
        }
        self.pending = Some(token);
        self.generated += 1;
        Ok(self.pending)
    }
}

/// Turns ids into text, one after the other; a closure `FnMut(u32) -> Result<String>` is one.
pub trait PieceDecoder {
    /// The text that `id` adds; empty while a character is incomplete.
    fn piece(&mut self, id: u32) -> Result<String>;

    /// What is left after the last id, such as an incomplete character.
    fn finish(&mut self) -> Result<String> {
        Ok(String::new())
    }
}

impl<F: FnMut(u32) -> Result<String>> PieceDecoder for F {
    fn piece(&mut self, id: u32) -> Result<String> {
        self(id)
    }
}

/// Generated text in non-empty pieces, without the stop string and what follows it.
#[derive(Debug)]
pub struct TextStream<'a, D> {
    tokens: TokenStream<'a>,
    text: Text<D>,
}

impl<'a, D: PieceDecoder> TextStream<'a, D> {
    /// The text of `tokens`.
    pub fn new(tokens: TokenStream<'a>, decoder: D, stops: StopStrings) -> Self {
        Self {
            tokens,
            text: Text::new(decoder, stops),
        }
    }

    /// Why the stream ended; `None` while it has not.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.text.finish
    }

    /// How many tokens were generated.
    pub fn generated(&self) -> usize {
        self.tokens.generated()
    }

    /// What it has taken so far.
    pub fn timings(&self) -> Timings {
        self.tokens.timings()
    }

    fn advance(&mut self) -> Result<String> {
        while self.text.finish.is_none() {
            let text = match self.tokens.next().transpose()? {
                Some(token) => self.text.token(token)?,
                None => self.text.end(self.tokens.finish_reason())?,
            };
            if !text.is_empty() {
                return Ok(text);
            }
        }
        Ok(String::new())
    }
}

impl<D: PieceDecoder> Iterator for TextStream<'_, D> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.advance() {
            Ok(text) if text.is_empty() => None,
            Ok(text) => Some(Ok(text)),
            Err(error) => {
                self.text.finish = Some(FinishReason::Failed);
                Some(Err(error))
            }
        }
    }
}

/// The text of tokens that come one by one, up to a stop string.
#[derive(Debug)]
pub(super) struct Text<D> {
    decoder: D,
    stops: StopStrings,
    pub(super) finish: Option<FinishReason>,
}

impl<D: PieceDecoder> Text<D> {
    pub(super) fn new(decoder: D, stops: StopStrings) -> Self {
        Self {
            decoder,
            stops,
            finish: None,
        }
    }

    /// What is certain after one more token; empty if nothing is.
    pub(super) fn token(&mut self, token: u32) -> Result<String> {
        let piece = self.decoder.piece(token)?;
        Ok(self.push(&piece))
    }

    /// What was held back, after the last token; the text ends for this reason unless a stop string is in it.
    pub(super) fn end(&mut self, reason: Option<FinishReason>) -> Result<String> {
        let rest = self.decoder.finish()?;
        let mut text = self.push(&rest);
        text.push_str(&self.stops.flush());
        self.finish = self.finish.or(reason);
        Ok(text)
    }

    fn push(&mut self, piece: &str) -> String {
        let (text, stopped) = self.stops.push(piece);
        if let Some(index) = stopped {
            self.finish = Some(FinishReason::StopString(index));
        }
        text
    }
}

/// Finds stop strings in text that comes in pieces.
///
/// The stop string that is complete first wins, among those the one that began first; so the result
/// does not depend on how the text was cut.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// The end of the text that may be the beginning of a stop string.
    held: String,
    stopped: Option<usize>,
}

impl StopStrings {
    /// Looks for these strings, any number of them. Errors (`Argument`): one of them is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        if stops.iter().any(String::is_empty) {
            return Err(Error::new(ErrorKind::Argument, "a stop string is empty"));
        }
        Ok(Self {
            stops,
            ..Self::default()
        })
    }

    /// Takes the next piece. Returns the text that is certain to come before any stop string, and
    /// the index of the stop string that was found. After that, further pieces give nothing.
    pub fn push(&mut self, piece: &str) -> (String, Option<usize>) {
        if self.stopped.is_some() {
            return (String::new(), self.stopped);
        }
        self.held.push_str(piece);
        let found = self.stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = self.held.find(stop)?;
            Some((start + stop.len(), start, index))
        });
        if let Some((_, start, index)) = found.min() {
            self.stopped = Some(index);
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), self.stopped);
        }
        let undecided = self.undecided();
        let rest = self.held.split_off(undecided);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// The text that was held back, when nothing follows any more.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of the held text starts that is the beginning of a stop string.
    fn undecided(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let earliest = (self.held.len() + 1).saturating_sub(longest);
        self.held
            .char_indices()
            .map(|(at, _)| at)
            .filter(|&at| at >= earliest)
            .find(|&at| self.stops.iter().any(|s| s.starts_with(&self.held[at..])))
            .unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests;

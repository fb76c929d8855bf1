//! The text of generated tokens, where it ends, and how long it took.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::time::Duration;

/// Reason why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// This one of the stop ids was chosen.
    StopToken(u32),
    /// The stop string of this index was found in the text.
    StopString(usize),
    /// The most tokens that were asked for were generated.
    MaxTokens,
    /// The context is full.
    ContextFull,
}

/// Tokens and time of an answer so far. `Display` is one line for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timings {
    /// Tokens of the prompt whose keys and values were in the cache.
    pub cached_tokens: usize,
    /// Tokens of the prompt that were computed.
    pub prompt_tokens: usize,
    /// Time of the forward passes up to the first token.
    pub prompt_time: Duration,
    /// Tokens that were generated.
    pub generated_tokens: usize,
    /// Time of the forward passes after the first token, one for each further token.
    pub step_time: Duration,
}

impl Timings {
    /// Returns the tokens of the prompt per second; 0 before the prompt is computed.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Returns the generated tokens per second, without the first one; 0 before the second.
    pub fn step_rate(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.step_time)
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

/// Decoder of token ids into text, one after the other. A closure `FnMut(u32) -> Result<String>` is
/// one.
pub trait PieceDecoder: Send {
    /// Returns the text that `id` adds; empty while a character is incomplete.
    fn piece(&mut self, id: u32) -> Result<String>;

    /// Returns the text that is left after the last id, such as an incomplete character.
    fn finish(&mut self) -> Result<String> {
        Ok(String::new())
    }
}

impl<F: FnMut(u32) -> Result<String> + Send> PieceDecoder for F {
    fn piece(&mut self, id: u32) -> Result<String> {
        self(id)
    }
}

/// Text of tokens that come one by one, up to a stop string.
pub(super) struct Text {
    decoder: Box<dyn PieceDecoder>,
    stops: StopStrings,
}

impl Text {
    pub(super) fn new(decoder: Box<dyn PieceDecoder>, stops: StopStrings) -> Self {
        Self { decoder, stops }
    }

    /// Takes a token. Returns the text that is certain now, and the index of a stop string that
    /// ends it.
    pub(super) fn token(&mut self, token: u32) -> Result<(String, Option<usize>)> {
        let piece = self.decoder.piece(token)?;
        Ok(self.stops.push(&piece))
    }

    /// Returns what was held back, after the last token, and the index of a stop string that ends
    /// it.
    pub(super) fn end(&mut self) -> Result<(String, Option<usize>)> {
        let rest = self.decoder.finish()?;
        let (mut text, stopped) = self.stops.push(&rest);
        text.push_str(&self.stops.flush());
        Ok((text, stopped))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Text")
            .field("stops", &self.stops)
            .finish_non_exhaustive()
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

    /// Returns the start of the longest suffix of the held text that begins a stop string.
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

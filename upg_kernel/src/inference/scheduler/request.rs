//! Requests to a [`Scheduler`](super::Scheduler), and its reports.
#![forbid(unsafe_code)]

use crate::error::Error;
use crate::inference::generate::{FinishReason, PieceDecoder, Timings};
use crate::inference::{LogProbs, Sampler};
use std::fmt;

/// A prompt to continue. [`UPGModel::request`](crate::UPGModel::request) makes one that gives text
/// and ends where the model ends.
#[non_exhaustive]
pub struct Request {
    /// Token ids of the prompt; in a chat, of all turns so far.
    pub prompt: Vec<u32>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Chooses the tokens of this request alone; greedy unless set.
    pub sampler: Sampler,
    /// Ids that end the answer; the id itself is not given out.
    pub stop_ids: Vec<u32>,
    /// Decoder of the answer; `None`: no text, only tokens.
    pub decoder: Option<Box<dyn PieceDecoder>>,
    /// Texts that end the answer, and are not given out. They need a decoder.
    pub stop_strings: Vec<String>,
    /// Number of the most probable tokens that [`Event::Token`] reports for each position; `None`:
    /// no probabilities.
    pub log_probs: Option<usize>,
}

impl Request {
    /// Makes a request for the `max_tokens` most probable tokens after `prompt`.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
            max_tokens,
            sampler: Sampler::default(),
            stop_ids: Vec::new(),
            decoder: None,
            stop_strings: Vec::new(),
            log_probs: None,
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("prompt", &self.prompt)
            .field("max_tokens", &self.max_tokens)
            .field("sampler", &self.sampler)
            .field("stop_ids", &self.stop_ids)
            .field("stop_strings", &self.stop_strings)
            .field("log_probs", &self.log_probs)
            .finish_non_exhaustive()
    }
}

/// The number of a request, given by [`Scheduler::submit`](super::Scheduler::submit) in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub(super) u64);

/// News of a request. After `Finished` or `Failed` there is none.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A token of the answer was chosen; with probabilities if [`Request::log_probs`] asks for
    /// them.
    Token(u32, Option<LogProbs>),
    /// The next piece of the answer; never empty.
    Text(String),
    /// The answer is complete.
    Finished(FinishReason, Timings),
    /// The request has ended with an error. Others continue.
    Failed(Error, Timings),
}

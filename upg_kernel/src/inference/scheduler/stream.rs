//! The answer to one request as an iterator.
#![forbid(unsafe_code)]

use super::{Event, Request, RequestId, Scheduler};
use crate::error::{Error, ErrorKind, Result};
use crate::inference::generate::{FinishReason, Timings};
use std::collections::VecDeque;

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

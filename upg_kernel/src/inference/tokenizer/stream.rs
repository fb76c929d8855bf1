//! Streaming decoder of ids that arrive one by one.
#![forbid(unsafe_code)]

use super::Tokenizer;
use crate::Result;
use std::borrow::Borrow;

/// Maximum pending ids.
///
/// Real text needs four at most (one character in bytes). If a model writes only broken bytes,
/// steps must not keep getting longer.
const MAX_PENDING: usize = 256;

/// Decoder of a stream of ids that never returns half a character.
///
/// The concatenation of everything that [`push`](Self::push) and [`finish`](Self::finish) return
/// equals [`Tokenizer::decode`] of all ids (unless more than 256 consecutive ids give no whole
/// character). A step decodes a handful of ids, independent of the length of the stream.
///
/// The text of an id depends on its neighbours: a space is stripped at the start of a text only,
/// and bytes join to characters. So each step decodes the ids whose text was returned last together
/// with the new ones, and returns the text that the new ones add.
///
/// `T` is the tokenizer: a reference, or an [`Arc`](std::sync::Arc) for a stream that is stored.
#[derive(Debug)]
pub struct DecodeStream<T> {
    tokenizer: T,
    skip_special: bool,
    /// Ids before `pending` that decode to some text, all of it returned already.
    prefix: Vec<u32>,
    /// Bytes of text that `prefix` alone decodes to.
    prefix_len: usize,
    /// Ids whose text is not certain yet.
    pending: Vec<u32>,
}

impl<T: Borrow<Tokenizer>> DecodeStream<T> {
    /// Creates a stream at the start of a text; `skip_special` omits special tokens.
    pub fn new(tokenizer: T, skip_special: bool) -> Self {
        Self {
            tokenizer,
            skip_special,
            prefix: Vec::new(),
            prefix_len: 0,
            pending: Vec::new(),
        }
    }

    /// Takes one id and returns the text that is now certain, often empty.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        // Such ids decode to nothing, and must not be the context of others.
        let tokenizer = self.tokenizer.borrow();
        if self.skip_special && tokenizer.is_special(id) || tokenizer.id_to_token(id).is_none() {
            return Ok(String::new());
        }
        self.pending.push(id);
        let full = self.pending.len() >= MAX_PENDING;
        // A run of raw bytes is decoded as a whole:
        // one invalid byte affects the characters before it.
        if !full && self.tokenizer.borrow().is_fallback_byte(id) {
            return Ok(String::new());
        }
        let text = self.pending_text()?;
        if !full && text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.settle()?;
        Ok(text)
    }

    /// Returns the text that is still pending, at the end of the stream.
    ///
    /// # Errors
    /// The errors of [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.pending_text()?;
        self.pending.clear();
        Ok(text)
    }

    fn pending_text(&self) -> Result<String> {
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        let window = [self.prefix.as_slice(), self.pending.as_slice()].concat();
        let mut text = self.tokenizer.borrow().decode(&window, self.skip_special)?;
        Ok(if text.is_char_boundary(self.prefix_len) {
            text.split_off(self.prefix_len)
        } else {
            String::new()
        })
    }

    /// Makes the pending ids the context of the next ones, if they have any text of their own.
    ///
    /// Otherwise a following space could be taken for the start of the whole text.
    fn settle(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let len = self
            .tokenizer
            .borrow()
            .decode(&pending, self.skip_special)?;
        let len = len.len();
        if len > 0 || self.prefix.is_empty() {
            self.prefix = pending;
            self.prefix_len = len;
        }
        Ok(())
    }
}

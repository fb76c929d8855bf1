//! Text split into the windows that a model is measured on.
#![forbid(unsafe_code)]

use super::super::config::ModelConfig;
#[cfg(feature = "text")]
use super::super::tokenizer::Tokenizer;
use crate::error::{Error, ErrorKind, Result};

/// Windows of a text, each computed independently.
///
/// The second half of each is scored, as in llama.cpp's perplexity tool, so that figures with the
/// same window are comparable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    len: usize,
    /// Token that replaces the first one of each window.
    bos: Option<u32>,
}

/// One of the [`Windows`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window<'a> {
    /// Index, from 0.
    pub index: usize,
    /// Input tokens of the model.
    pub input: Vec<u32>,
    /// First position whose logits are scored.
    pub first: usize,
    /// Next token of each scored position.
    pub targets: &'a [u32],
}

impl Windows {
    /// Splits `text` into windows of `len` tokens, at most `limit`; the rest is unused.
    ///
    /// If `tokenizer` starts texts with a token, it replaces the first one of each window.
    ///
    /// Errors: those of [`Windows::new`] and of the tokenizer.
    #[cfg(feature = "text")]
    pub fn of_text(tokenizer: &Tokenizer, text: &str, len: usize, limit: usize) -> Result<Self> {
        let tokens = tokenizer.encode(text, true)?;
        let bos = tokenizer.special_ids().bos;
        let bos = bos.filter(|bos| tokens.first() == Some(bos));
        Self::new(tokens, bos, len, limit)
    }

    /// Splits `tokens` into windows of `len`, at most `limit`; `bos`, if any, replaces the first
    /// token of each.
    ///
    /// Errors (`Argument`): `len` is below 4, `limit` 0,
    /// or there are fewer tokens than a window has.
    pub fn new(mut tokens: Vec<u32>, bos: Option<u32>, len: usize, limit: usize) -> Result<Self> {
        if len < 4 || tokens.len() < len || limit == 0 {
            let message = format!("a text of {} tokens has no window of {len}", tokens.len());
            return Err(Error::new(ErrorKind::Argument, message)
                .hint("use a longer text, and a window from 4 on"));
        }
        tokens.truncate(limit.min(tokens.len() / len) * len);
        Ok(Self { tokens, len, bos })
    }

    /// Returns the number of windows.
    pub fn count(&self) -> usize {
        self.tokens.len() / self.len
    }

    /// Returns the tokens of a window.
    pub fn window(&self) -> usize {
        self.len
    }

    /// Returns the number of scored positions of a window.
    pub fn scored(&self) -> usize {
        self.len - 1 - self.len / 2
    }

    /// Iterates over the windows in order.
    pub fn iter(&self) -> impl Iterator<Item = Window<'_>> {
        let first = self.len / 2;
        let windows = self.tokens.chunks_exact(self.len).enumerate();
        windows.map(move |(index, tokens)| {
            let mut input = tokens.to_vec();
            if let Some(bos) = self.bos {
                input[0] = bos;
            }
            let targets = &tokens[first + 1..];
            Window {
                index,
                input,
                first,
                targets,
            }
        })
    }

    /// Checks the windows against a model.
    ///
    /// Errors (`Argument`): a model of this config does not support the window, or lacks a token.
    pub(super) fn check(&self, config: &ModelConfig) -> Result<()> {
        let argument = |message, hint| Error::new(ErrorKind::Argument, message).hint(hint);
        let (len, context, vocab) = (self.len, config.context, config.vocab_size);
        if len > context {
            let message = format!("a window of {len} tokens, the context has {context}");
            return Err(argument(message, "use a smaller window"));
        }
        let mut tokens = self.tokens.iter().chain(&self.bos);
        match tokens.find(|&&t| t as usize >= vocab) {
            None => Ok(()),
            Some(token) => Err(argument(
                format!("token id {token} is not in the vocabulary of {vocab}"),
                "the tokenizer belongs to another model",
            )),
        }
    }
}

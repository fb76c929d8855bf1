//! Options of encoding.
#![forbid(unsafe_code)]

use crate::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Treatment of special tokens that occur in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// `<|im_end|>` in the text becomes the token of that name, as in transformers.
    Parse,
    /// Special tokens in the text are ordinary characters. For text from people who are not
    /// trusted to write them.
    Plain,
}

/// Options of [`Tokenizer::encode_with`](super::Tokenizer::encode_with).
#[derive(Debug, Clone, Copy)]
pub struct EncodeOptions<'a> {
    /// Adds begin and end of sequence where the model wants them.
    ///
    /// Leave it off for the output of a chat template, which has them already.
    pub add_special: bool,
    /// Treatment of special tokens in the text.
    pub special_text: SpecialText,
    /// Flag that, once set, ends the work with an error of kind `Interrupted`.
    pub interrupt: Option<&'a AtomicBool>,
}

impl Default for EncodeOptions<'_> {
    fn default() -> Self {
        Self {
            add_special: true,
            special_text: SpecialText::Parse,
            interrupt: None,
        }
    }
}

impl EncodeOptions<'_> {
    pub(super) fn check_interrupt(&self) -> Result<()> {
        match self.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => {
                Err(Error::new(ErrorKind::Interrupted, "interrupted"))
            }
            _ => Ok(()),
        }
    }
}

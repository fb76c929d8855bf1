//! Tokenizer: text to token ids and back, according to the model's own `tokenizer.json`.
//!
//! This is a thin, checked layer over the `tokenizers` crate. Sizes are limited, errors are ours,
//! the caller decides whether special tokens in the text are parsed, and [`DecodeStream`] returns
//! generated text piece by piece.
#![forbid(unsafe_code)]

mod added_tokens;
mod allowed;
mod contained;
mod cut_points;
mod encode;
mod ends;
mod expressions;
mod file;
mod limits;
mod options;

pub use ends::end_tokens;
pub use file::check_count;
pub use limits::{
    MAX_ADDED_BYTES, MAX_ADDED_TOKENS, MAX_MERGES, MAX_RUN_CHARS, MAX_TEXT_BYTES, MAX_TOKENS,
};
pub use options::{EncodeOptions, SpecialText};

use super::config::ModelConfig;
use crate::format::json;
use crate::{Error, ErrorKind, Result};
use added_tokens::check_added_tokens;
use contained::{contained, wrapped};
use serde_json::Value;
use std::borrow::Borrow;
use std::collections::HashSet;
use std::sync::OnceLock;

/// Ids with a meaning for generation, from the model's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin-of-sequence id.
    pub bos: Option<u32>,
    /// Ids that end a generated text; may be empty.
    pub eos: Vec<u32>,
}

impl From<&ModelConfig> for SpecialIds {
    /// Takes the ids that the configuration of the model names.
    fn from(config: &ModelConfig) -> Self {
        Self {
            bos: config.bos_id,
            eos: config.eos_ids.clone(),
        }
    }
}

/// Tokenizer of one model. Threads can share it by reference.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Copy of the tokenizer that does not parse special tokens, created on first use.
    plain: OnceLock<tokenizers::Tokenizer>,
    cut_points: cut_points::CutPoints,
    special: SpecialIds,
    bos: Option<String>,
    eos: Option<String>,
    eos_id: Option<u32>,
    special_set: HashSet<u32>,
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    byte_fallback: bool,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, with the `tokenizer_config.json` beside it if there is one.
    ///
    /// Only `add_bos_token`, `add_eos_token`, `bos_token` and `eos_token` of the configuration are
    /// used. As in transformers, the begin and end of a text are the tokens named there. If it
    /// names none, the ids of `special` are used, which come from the model's configuration and may
    /// differ. A generated text ends at the ids of `special`, at the end of a text, and at every
    /// special token that is known to end a turn ([`end_tokens`]). Time is linear in the file,
    /// memory at most 16 times the file plus 4 MiB.
    ///
    /// `tokenizer_json` must not change meanwhile: pass a copy of a mapped file
    /// ([`UpgFile::tokenizer_text`](crate::format::UpgFile::tokenizer_text)).
    ///
    /// # Errors
    /// `TooLarge` above [`MAX_TOKENIZER_BYTES`](crate::format::MAX_TOKENIZER_BYTES),
    /// [`MAX_TOKENS`], [`MAX_MERGES`], [`MAX_ADDED_TOKENS`] or [`MAX_ADDED_BYTES`]; `Malformed` if
    /// either text is not such a JSON; `Invalid` if an id of `special` or of an added token is not
    /// in the vocabulary, or belongs to another token.
    pub fn from_json(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&str>,
        special: SpecialIds,
    ) -> Result<Self> {
        let mut parts = file::parse(tokenizer_json)?;
        let growth = parts.check()?;
        let mut inner = contained(|| parts.tokenizer())??;
        // Files saved after training have these settings;
        // a prompt must never be truncated or padded.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| wrapped(ErrorKind::Invalid, "tokenizer.json", e))?;
        check_added_tokens(&inner, &parts.added_tokens.tokens)?;

        let config = Config::parse(tokenizer_config)?;
        let special_set: HashSet<u32> = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
        let (mut special, eos_id) = config.complete(special, &inner)?;
        let is_special = |id: &u32| special_set.contains(id);
        let known = end_tokens(|token| inner.token_to_id(token).filter(is_special));
        let mut seen = HashSet::new();
        special.eos.extend(eos_id.into_iter().chain(known));
        special.eos.retain(|id| seen.insert(*id));
        let spelled = |named: Option<Option<String>>, id: Option<u32>| {
            named.unwrap_or_else(|| id.and_then(|id| inner.id_to_token(id)))
        };
        let (bos, eos) = (
            spelled(config.bos, special.bos),
            spelled(config.eos, eos_id),
        );
        Ok(Self {
            vocab_size: inner.get_vocab_size(true),
            byte_fallback: names_type(&parts.decoder, "ByteFallback"),
            cut_points: cut_points::CutPoints::new(&parts, growth, &inner),
            inner,
            plain: OnceLock::new(),
            special,
            bos,
            eos,
            eos_id,
            special_set,
            add_bos: config.add_bos,
            add_eos: config.add_eos,
        })
    }

    /// Decodes `ids` to text; `skip_special` omits special tokens.
    ///
    /// Bytes that are not UTF-8 become U+FFFD. Ids without a token (the padding rows of an
    /// embedding) decode to nothing. Both are as in transformers. There is no "clean up" of spaces.
    ///
    /// # Errors
    /// `Invalid` if the decoder of the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        contained(|| self.inner.decode(ids, skip_special))?
            .map_err(|e| wrapped(ErrorKind::Invalid, "cannot decode the ids", e))
    }

    /// Creates a decoder for ids that arrive one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<&Self> {
        DecodeStream::new(self, skip_special)
    }

    /// Returns the number of tokens, including added ones.
    ///
    /// The embedding of the model may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Returns the id of a token, given its spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Returns the spelling of a token in the vocabulary, which is not its text: see
    /// [`Tokenizer::decode`].
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Returns whether `id` is a special token (omitted by `skip_special`).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_set.contains(&id)
    }

    /// Returns the spelling of the begin-of-text token, for chat templates.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// Returns the spelling of the end-of-text token, for chat templates.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Returns the begin and end of sequence ids.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.special
    }

    /// Returns the id of a special token that has exactly the spelling `text`.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.token_to_id(text).filter(|id| self.is_special(*id))
    }

    /// Returns whether `id` ends a generated text.
    pub fn is_eos(&self, id: u32) -> bool {
        self.special.eos.contains(&id)
    }

    /// Returns whether `id` is a raw byte (`<0x0A>`),
    /// which is decoded together with its neighbours.
    fn is_fallback_byte(&self, id: u32) -> bool {
        self.byte_fallback
            && self.inner.id_to_token(id).is_some_and(|t| {
                t.strip_prefix("<0x")
                    .and_then(|t| t.strip_suffix('>'))
                    .is_some_and(|hex| hex.len() == 2 && u8::from_str_radix(hex, 16).is_ok())
            })
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size)
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

/// Used fields of `tokenizer_config.json`.
#[derive(Default)]
struct Config {
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    /// Begin token; `None` if the file does not mention it,
    /// `Some(None)` if it says that there is none.
    bos: Option<Option<String>>,
    eos: Option<Option<String>>,
}

impl Config {
    fn parse(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else {
            return Ok(Self::default());
        };
        let keys = ["add_bos_token", "add_eos_token", "bos_token", "eos_token"];
        let value = json::fields("tokenizer_config.json", text, &keys)?;
        Ok(Self {
            add_bos: value.get("add_bos_token").and_then(Value::as_bool),
            add_eos: value.get("add_eos_token").and_then(Value::as_bool),
            bos: value.get("bos_token").map(|v| token_text(Some(v))),
            eos: value.get("eos_token").map(|v| token_text(Some(v))),
        })
    }

    /// Takes the begin of sequence named here, and returns the end-of-text id; checks that every id
    /// exists.
    fn complete(
        &self,
        mut special: SpecialIds,
        inner: &tokenizers::Tokenizer,
    ) -> Result<(SpecialIds, Option<u32>)> {
        let find = |token: &Option<String>| token.as_deref().and_then(|t| inner.token_to_id(t));
        if let Some(bos) = &self.bos {
            special.bos = find(bos);
        }
        let eos = match &self.eos {
            Some(eos) => find(eos),
            None => special.eos.first().copied(),
        };
        for id in special.bos.iter().chain(&special.eos) {
            if inner.id_to_token(*id).is_none() {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "special token id {id} is not among the {} tokens of the tokenizer",
                        inner.get_vocab_size(true)
                    ),
                ));
            }
        }
        Ok((special, eos))
    }
}

/// Returns a token of `tokenizer_config.json`: a string, or the `content` of an object.
pub(super) fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    let text = value.get("content").unwrap_or(value);
    text.as_str().map(str::to_owned)
}

/// Returns whether `"type": name` occurs anywhere in a (nested) decoder description.
fn names_type(value: &Value, name: &str) -> bool {
    match value {
        Value::Object(map) => {
            map.get("type").and_then(Value::as_str) == Some(name)
                || map.values().any(|v| names_type(v, name))
        }
        Value::Array(items) => items.iter().any(|v| names_type(v, name)),
        _ => false,
    }
}

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

#[cfg(test)]
mod tests;

//! Tokenizer: text to token ids and back, according to the model's own `tokenizer.json`.
//!
//! This is a thin, checked layer over the `tokenizers` crate. Sizes are limited, errors are ours,
//! the caller decides whether special tokens in the text are parsed, and [`DecodeStream`] returns
//! generated text piece by piece.
#![forbid(unsafe_code)]

mod allowed;
mod cut_points;
mod encode;
mod expressions;
mod file;
mod stream;

use std::collections::HashSet;
use std::sync::OnceLock;

use serde_json::Value;
use tokenizers::{NormalizedString, Normalizer};

use super::config::ModelConfig;
use crate::format::json;
use crate::{Error, ErrorKind, Result};

pub use encode::{EncodeOptions, SpecialText};
pub use file::{MAX_ADDED_BYTES, MAX_ADDED_TOKENS, MAX_MERGES, MAX_TOKENS, check_count};
pub use stream::DecodeStream;

/// Maximum text of one encode call in bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// Maximum run of whitespace, or of characters without any.
///
/// Known splitting expressions backtrack over a run, as `\s+(?!\S)` does over whitespace. Far above
/// this limit the regex engine gives up (after a million steps), and the rest of the text would
/// stay in one piece: other ids, without an error. All other expressions are refused if they may
/// backtrack over more than a few characters.
pub const MAX_RUN_CHARS: usize = 200_000;

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
    /// differ. The ids of `special`, if any, end a generated text. Time is linear in the file,
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
        let (special, eos_id) = config.complete(special, &inner)?;
        let spelled = |named: Option<Option<String>>, id: Option<u32>| {
            named.unwrap_or_else(|| id.and_then(|id| inner.id_to_token(id)))
        };
        let (bos, eos) = (
            spelled(config.bos, special.bos),
            spelled(config.eos, eos_id),
        );
        let special_set = inner
            .get_added_tokens_decoder()
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(&id, _)| id)
            .collect();
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

    /// Completes the ids with those named here, and returns the end-of-text id; checks that every
    /// id exists.
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
        if special.eos.is_empty() {
            special.eos.extend(eos);
        }
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

/// Checks that added tokens have the ids of the file and a non-empty text.
///
/// The crate gives an added token the next free id, whatever the file says. An empty text is found
/// everywhere, even within characters. A token that takes the whitespace before it, after one that
/// already took it, has a negative length.
///
/// Errors (`Invalid`, `Unsupported`): there is such a token.
fn check_added_tokens(
    inner: &tokenizers::Tokenizer,
    added: &[file::AddedTokenWithId],
) -> Result<()> {
    let takes_space_after = added.iter().any(|token| token.rstrip);
    for token in added {
        let starts_with_space = token.content.starts_with(char::is_whitespace);
        if is_empty_as_text(inner, token)? || takes_space_after && token.lstrip && starts_with_space
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "tokenizer.json: added token '{}' of id {} cannot be distinguished from other text",
                    token.content.escape_debug(),
                    token.id
                ),
            ));
        }
        let found = inner.token_to_id(&token.content);
        if found != Some(token.id) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "tokenizer.json: added token '{}' should have id {}, found {}",
                    token.content.escape_debug(),
                    token.id,
                    found.map_or("none".to_owned(), |id| id.to_string())
                ),
            ));
        }
    }
    Ok(())
}

/// Returns whether an added token is empty after the normalization of the text
/// that is searched.
fn is_empty_as_text(inner: &tokenizers::Tokenizer, token: &file::AddedTokenWithId) -> Result<bool> {
    let normalizer = inner.get_normalizer().filter(|_| token.normalized);
    let Some(normalizer) = normalizer.filter(|_| !token.content.is_empty()) else {
        return Ok(token.content.is_empty());
    };
    let mut text = NormalizedString::from(token.content.as_str());
    contained(|| normalizer.normalize(&mut text))?
        .map_err(|e| wrapped(ErrorKind::Invalid, "tokenizer.json", e))?;
    Ok(text.get().is_empty())
}

/// Runs code of the `tokenizers` crate; a panic in it becomes an error.
///
/// The checks of `allowed` leave none that we know of.
fn contained<T>(run: impl FnOnce() -> T) -> Result<T> {
    // Unwind safe: the tokenizer only changes its own cache, which stays consistent.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|_| {
        Error::new(
            ErrorKind::Invalid,
            "the tokenizer failed: tokenizer.json has a part that it cannot work with",
        )
    })
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

fn wrapped(kind: ErrorKind, what: &str, e: tokenizers::Error) -> Error {
    Error::new(kind, format!("{what}: {e}")).with_source(e)
}

#[cfg(test)]
mod tests;

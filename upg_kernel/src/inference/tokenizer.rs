//! Text to token ids and back, as the model's own `tokenizer.json` says.
//!
//! A thin, checked layer over the `tokenizers` crate: sizes are capped, errors are ours, special
//! tokens in the text are parsed or not as the caller says, and [`DecodeStream`] gives generated
//! text piece by piece.
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

/// Longest text that is encoded in one call, in bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// Longest run of white space, or of characters without any, that is encoded.
///
/// Known splitting expressions go back over a run, as `\s+(?!\S)` does over white space. Far above this
/// the regex engine gives up (after a million steps), and the rest of the text would stay in one piece: other
/// ids, no error. All other expressions are refused if they may go back over more than a few characters.
pub const MAX_RUN_CHARS: usize = 200_000;

/// Ids with a meaning for generation. They come from the model's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begin of sequence.
    pub bos: Option<u32>,
    /// Every id that ends a generated text; may be empty.
    pub eos: Vec<u32>,
}

impl From<&ModelConfig> for SpecialIds {
    /// Those that the configuration of the model names.
    fn from(config: &ModelConfig) -> Self {
        Self {
            bos: config.bos_id,
            eos: config.eos_ids.clone(),
        }
    }
}

/// The tokenizer of one model. Shared by reference between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same tokenizer that leaves special tokens in the text alone; made when first asked for.
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
    /// Of the configuration only `add_bos_token`, `add_eos_token`, `bos_token` and `eos_token` are
    /// used. As in transformers, the begin and end of a text are the tokens named there; the ids of
    /// `special`, which come from the model's configuration and may be others, stand in where it
    /// names none. What ends a generated text are the ids of `special`, if there are any. Time is
    /// linear in the file, memory at most 16 times the file and 4 MiB.
    ///
    /// `tokenizer_json` must not change meanwhile: of a mapped file pass a copy
    /// ([`UpgFile::tokenizer_text`](crate::format::UpgFile::tokenizer_text)).
    ///
    /// # Errors
    /// `TooLarge` above [`MAX_TOKENIZER_BYTES`](crate::format::MAX_TOKENIZER_BYTES), [`MAX_TOKENS`], [`MAX_MERGES`], [`MAX_ADDED_TOKENS`]
    /// or [`MAX_ADDED_BYTES`]; `Malformed` when either text is no such JSON;
    /// `Invalid` when an id of `special` or of an added token is not in the vocabulary or not the
    /// token it is said to be.
    pub fn from_json(
        tokenizer_json: &[u8],
        tokenizer_config: Option<&str>,
        special: SpecialIds,
    ) -> Result<Self> {
        let mut parts = file::parse(tokenizer_json)?;
        let growth = parts.check()?;
        let mut inner = contained(|| parts.tokenizer())??;
        // Files saved after training carry these; a prompt must never be cut or filled up.
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

    /// The text of `ids`; `skip_special` leaves the special tokens out. Bytes that are no UTF-8
    /// become U+FFFD, and ids that no token has (the padding rows of an embedding) become nothing:
    /// both as in transformers. No "clean up" of spaces is done.
    ///
    /// # Errors
    /// `Invalid` when the decoder of the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        contained(|| self.inner.decode(ids, skip_special))?
            .map_err(|e| wrapped(ErrorKind::Invalid, "cannot decode the ids", e))
    }

    /// A decoder for ids that come one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<&Self> {
        DecodeStream::new(self, skip_special)
    }

    /// Number of tokens, the added ones included. The embedding of the model may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token as it is spelled in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary: not its text, see [`Tokenizer::decode`].
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `id` is a special token (left out by `skip_special`).
    pub fn is_special(&self, id: u32) -> bool {
        self.special_set.contains(&id)
    }

    /// The spelling of the token that begins a text, for chat templates.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// The spelling of the token that ends a text, for chat templates.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// Begin and end of sequence.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.special
    }

    /// Whether `id` ends a generated text.
    pub fn is_eos(&self, id: u32) -> bool {
        self.special.eos.contains(&id)
    }

    /// Whether `id` is a raw byte whose neighbours decide what it decodes to (`<0x0A>`).
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

/// The few fields of `tokenizer_config.json` that matter here.
#[derive(Default)]
struct Config {
    add_bos: Option<bool>,
    add_eos: Option<bool>,
    /// `None` if the file does not say, `Some(None)` if it says that there is none.
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

    /// The ids with what is named here, the id of the end of a text; checks that every id exists.
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

/// A token of `tokenizer_config.json`: a string, or an object with its `content`.
pub(super) fn token_text(value: Option<&Value>) -> Option<String> {
    let value = value?;
    let text = value.get("content").unwrap_or(value);
    text.as_str().map(str::to_owned)
}

/// Checks that added tokens have the ids of the file, and a text to be found by.
///
/// The crate gives an added token the next free id, whatever the file says. An empty text is found everywhere, also within
/// characters; and a token that takes the white space before it, after one that took it already, has a negative length.
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
                    "tokenizer.json: added token '{}' of id {} cannot be told from other text",
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

/// Returns whether nothing is left of an added token as the text is normalized in which it is looked for.
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

/// Runs code of the `tokenizers` crate; a panic in it becomes an error. The checks of `allowed` leave
/// none that we know of.
fn contained<T>(run: impl FnOnce() -> T) -> Result<T> {
    // What the tokenizer changes while it works is a cache of its own, which stays sound.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|_| {
        Error::new(
            ErrorKind::Invalid,
            "the tokenizer failed: tokenizer.json has a part that it cannot work with",
        )
    })
}

/// Whether `"type": name` stands anywhere in a (nested) decoder description.
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

//! Bounded reader of `tokenizer.json`, and construction of a tokenizer from it.
//!
//! The `tokenizers` crate reads a model into three trees of values, one after the other, which take
//! 15 to 30 times the text. Here tokens and merges go straight into the lists that the crate builds
//! its model from; lists above their limits are counted to the end but not stored. Memory: at most
//! 16 times the file plus 4 MiB.
#![forbid(unsafe_code)]

use super::contained::wrapped;
use super::limits::{MAX_ADDED_BYTES, MAX_ADDED_TOKENS, MAX_MERGES, MAX_TOKENS};
use crate::format::{check_tokenizer_bytes, json};
use crate::{Error, ErrorKind, Result};
use serde::Deserialize;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess,
};
use serde::de::{SeqAccess, Visitor};
use serde_json::Value;
use std::fmt;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, TokenizerBuilder,
};

/// Maximum values in a component that is neither vocabulary nor added tokens; real ones have
/// less than 300.
const MAX_PART_VALUES: usize = 1 << 14;

/// Version of all files.
const VERSION: &str = "1.0";

/// Checks a count. Errors (`TooLarge`): a file has more than `most` of `what`.
pub fn check_count(what: &str, found: usize, most: usize) -> Result<()> {
    match found <= most {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::TooLarge,
            format!("tokenizer.json has {found} {what}, at most {most}"),
        )),
    }
}

/// Parses the text of a `tokenizer.json`.
///
/// Errors: `TooLarge` above a limit; `Malformed`.
pub(super) fn parse(tokenizer_json: &[u8]) -> Result<Parts> {
    check_tokenizer_bytes(tokenizer_json.len())?;
    let parts: Parts = serde_json::from_slice(tokenizer_json).map_err(refused)?;
    let (model, added) = (&parts.model, &parts.added_tokens);
    check_count("tokens", model.vocab.found, MAX_TOKENS)?;
    check_count("merges", model.merges.found, MAX_MERGES)?;
    check_count("added tokens", added.found, MAX_ADDED_TOKENS)?;
    check_count("bytes of added tokens", added.bytes, MAX_ADDED_BYTES)?;
    if parts
        .version
        .as_deref()
        .is_some_and(|version| version != VERSION)
    {
        let message = format!("tokenizer.json: version, expected {VERSION}");
        return Err(Error::new(ErrorKind::Malformed, message));
    }
    Ok(parts)
}

/// Components of a file.
#[derive(Deserialize)]
pub(super) struct Parts {
    #[serde(default)]
    pub(super) version: Option<String>,
    #[serde(default, deserialize_with = "part")]
    pub(super) normalizer: Value,
    #[serde(default, deserialize_with = "part")]
    pub(super) pre_tokenizer: Value,
    #[serde(default, deserialize_with = "part")]
    pub(super) post_processor: Value,
    #[serde(default, deserialize_with = "part")]
    pub(super) decoder: Value,
    pub(super) model: Model,
    #[serde(default)]
    pub(super) added_tokens: Added,
}

impl Parts {
    /// Returns whether a word that is a token is taken without merging.
    pub(super) fn ignores_merges(&self) -> bool {
        self.model.ignore_merges.unwrap_or(false)
    }

    /// Builds the tokenizer of these components; moves the vocabulary out of them.
    ///
    /// Errors: `Malformed` for a component that the crate does not accept; `Invalid` for merges of
    /// or into something that is not a token.
    pub(super) fn tokenizer(&mut self) -> Result<tokenizers::Tokenizer> {
        let malformed = |e| wrapped(ErrorKind::Malformed, "tokenizer.json", e);
        let model = self.model.build()?;
        let builder = TokenizerBuilder::<
            ModelWrapper,
            NormalizerWrapper,
            PreTokenizerWrapper,
            PostProcessorWrapper,
            DecoderWrapper,
        >::new();
        let built = builder
            .with_model(model.into())
            .with_normalizer(read(&self.normalizer)?)
            .with_pre_tokenizer(read(&self.pre_tokenizer)?)
            .with_post_processor(read(&self.post_processor)?)
            .with_decoder(read(&self.decoder)?);
        let mut tokenizer: tokenizers::Tokenizer = built.build().map_err(malformed)?.into();
        let added = self
            .added_tokens
            .tokens
            .iter()
            .map(AddedTokenWithId::to_added);
        tokenizer.add_tokens(added).map_err(malformed)?;
        Ok(tokenizer)
    }
}

/// Converts a component to the crate's type.
fn read<T: DeserializeOwned>(part: &Value) -> Result<Option<T>> {
    serde_json::from_str(&part.to_string()).map_err(|e| json::error("tokenizer.json", e))
}

/// Reads a component that is checked later.
pub(super) fn part<'de, D: Deserializer<'de>>(from: D) -> Result<Value, D::Error> {
    json::Tree(&mut json::Values::new(MAX_PART_VALUES)).deserialize(from)
}

/// Returns the error for a text that could not be read.
fn refused(e: serde_json::Error) -> Error {
    match json::is_too_many(&e) {
        true => Error::new(
            ErrorKind::TooLarge,
            format!("tokenizer.json: a part of more than {MAX_PART_VALUES} values"),
        ),
        false => json::error("tokenizer.json", e),
    }
}

/// Model, with the settings of its kind that affect how texts are split into tokens.
#[derive(Deserialize)]
pub(super) struct Model {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    pub(super) dropout: Option<f64>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    unk_token: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    pub(super) ignore_merges: Option<bool>,
    #[serde(default)]
    vocab: Tokens,
    #[serde(default)]
    pub(super) merges: MergeList,
}

impl Model {
    fn build(&mut self) -> Result<BPE> {
        let (Some(vocab), Some(merges)) = (self.vocab.ids.take(), self.merges.pairs.take()) else {
            let message = "tokenizer.json: the model has no vocab or no merges";
            return Err(Error::new(ErrorKind::Malformed, message));
        };
        // The crate assumes that no merge is longer than all tokens.
        let longest = vocab.keys().map(String::len).max().unwrap_or(0);
        let merged = merges.iter().map(|(left, right)| left.len() + right.len());
        if let Some(rank) = merged.into_iter().position(|len| len > longest) {
            let message = format!("tokenizer.json: merge {rank} makes no token");
            return Err(Error::new(ErrorKind::Malformed, message));
        }
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .fuse_unk(self.fuse_unk.unwrap_or(false))
            .byte_fallback(self.byte_fallback.unwrap_or(false))
            .ignore_merges(self.ignore_merges.unwrap_or(false));
        if let Some(unk) = self.unk_token.take() {
            builder = builder.unk_token(unk);
        }
        let built = builder.build();
        built.map_err(|e| wrapped(ErrorKind::Malformed, "tokenizer.json", e))
    }
}

/// Vocabulary: the ids of tokens.
#[derive(Default)]
struct Tokens {
    /// Number of tokens in the file; `ids` ends at the limit.
    found: usize,
    /// Ids of the tokens; `None` if it is not an object.
    ids: Option<Vocab>,
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(TokensVisitor)
    }
}

struct TokensVisitor;

impl<'de> Visitor<'de> for TokensVisitor {
    type Value = Tokens;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a vocabulary")
    }

    fn visit_unit<E>(self) -> Result<Tokens, E> {
        Ok(Tokens::default())
    }

    /// Skips the vocabulary of another kind of model, which is refused later.
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Tokens, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Tokens::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
        let (mut found, mut ids) = (0, Vocab::default());
        while found < MAX_TOKENS {
            let Some((token, id)) = map.next_entry()? else {
                break;
            };
            ids.insert(token, id);
            found += 1;
        }
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
            found += 1;
        }
        let ids = Some(ids);
        Ok(Tokens { found, ids })
    }
}

/// Merges in order of priority.
#[derive(Default)]
pub(super) struct MergeList {
    /// Number of merges in the file; `pairs` ends at the limit.
    found: usize,
    /// Merged pairs; `None` if there is no list.
    pairs: Option<Merges>,
}

impl MergeList {
    /// Returns whether the file has a list of them.
    pub(super) fn is_there(&self) -> bool {
        self.pairs.is_some()
    }
}

impl<'de> Deserialize<'de> for MergeList {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(MergeListVisitor)
    }
}

struct MergeListVisitor;

impl<'de> Visitor<'de> for MergeListVisitor {
    type Value = MergeList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_unit<E>(self) -> Result<MergeList, E> {
        Ok(MergeList::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<MergeList, A::Error> {
        let (mut found, mut pairs) = (0, Merges::new());
        let mut form = None;
        while found < MAX_MERGES {
            let Some(merge) = list.next_element()? else {
                break;
            };
            found += 1;
            let (this, pair) = match merge {
                // Old files start with a line of this kind.
                Merge::Text(None) => continue,
                Merge::Text(Some(pair)) => (Form::Text, pair),
                Merge::List(pair) => (Form::List, pair),
            };
            if *form.get_or_insert(this) != this {
                return Err(A::Error::custom("merges of two forms"));
            }
            pairs.push(pair);
        }
        while list.next_element::<IgnoredAny>()?.is_some() {
            found += 1;
        }
        let pairs = Some(pairs);
        Ok(MergeList { found, pairs })
    }
}

/// Notation of merges.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    List,
}

/// Merge `"left right"` or `["left", "right"]`.
enum Merge {
    Text(Option<(String, String)>),
    List((String, String)),
}

impl<'de> Deserialize<'de> for Merge {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(MergeVisitor)
    }
}

struct MergeVisitor;

impl<'de> Visitor<'de> for MergeVisitor {
    type Value = Merge;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("two tokens")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Merge, E> {
        if text.starts_with("#version") {
            return Ok(Merge::Text(None));
        }
        let pair = text
            .split_once(' ')
            .filter(|(_, right)| !right.contains(' '));
        let (left, right) = pair.ok_or_else(|| E::custom("a merge that is not two tokens"))?;
        Ok(Merge::Text(Some((left.to_owned(), right.to_owned()))))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Merge, A::Error> {
        let pair = (list.next_element()?, list.next_element()?);
        match (pair, list.next_element::<IgnoredAny>()?) {
            ((Some(left), Some(right)), None) => Ok(Merge::List((left, right))),
            _ => Err(A::Error::custom("a merge that is not two tokens")),
        }
    }
}

/// Added tokens.
#[derive(Default)]
pub(super) struct Added {
    /// Number of added tokens in the file, and their bytes; `tokens` ends at the limits.
    found: usize,
    bytes: usize,
    pub(super) tokens: Vec<AddedTokenWithId>,
}

/// Added token; all of its fields are required.
#[derive(Deserialize)]
pub(super) struct AddedTokenWithId {
    pub(super) id: u32,
    pub(super) content: String,
    single_word: bool,
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    pub(super) normalized: bool,
    special: bool,
}

impl AddedTokenWithId {
    fn to_added(&self) -> AddedToken {
        AddedToken {
            content: self.content.clone(),
            single_word: self.single_word,
            lstrip: self.lstrip,
            rstrip: self.rstrip,
            normalized: self.normalized,
            special: self.special,
        }
    }
}

impl<'de> Deserialize<'de> for Added {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(AddedVisitor)
    }
}

struct AddedVisitor;

impl<'de> Visitor<'de> for AddedVisitor {
    type Value = Added;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of added tokens")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Added, A::Error> {
        let mut added = Added::default();
        while added.found < MAX_ADDED_TOKENS && added.bytes <= MAX_ADDED_BYTES {
            let Some(token) = list.next_element::<AddedTokenWithId>()? else {
                break;
            };
            added.found += 1;
            added.bytes = added.bytes.saturating_add(token.content.len());
            added.tokens.push(token);
        }
        while list.next_element::<IgnoredAny>()?.is_some() {
            added.found += 1;
        }
        Ok(added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_has_as_many_values_as_allowed_and_no_more() {
        let parsed = |values: usize| {
            let part = format!("[{}0]", "0,".repeat(values - 2));
            let text =
                format!(r#"{{"model":{{"type":"x"}},"normalizer":{part},"decoder":{part}}}"#);
            parse(text.as_bytes()).map(|_| ())
        };
        assert!(parsed(MAX_PART_VALUES).is_ok());
        let e = parsed(MAX_PART_VALUES + 1).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TooLarge, "{e}");
        assert!(e.to_string().contains("more than 16384 values"), "{e}");
    }
}

//! Vocabulary of a GGUF file, and its checks.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};
use std::collections::HashMap;
use upg_kernel::inference::tokenizer::{
    MAX_MERGES, MAX_TOKENS, SpecialIds, check_count, end_tokens,
};
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum token in bytes; real ones have up to 512.
pub(crate) const MAX_TOKEN_BYTES: usize = 4096;

/// Vocabulary as in the metadata of a GGUF file, under `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct GgufVocab {
    /// Kind, `model`: `gpt2` (byte-level BPE) or `llama` (sentencepiece BPE).
    pub model: String,
    /// Name of the pre-tokenizer, `pre`; byte-level BPE only.
    pub pre: Option<String>,
    /// Spelling by id, `tokens`.
    pub tokens: Vec<String>,
    /// Score by id, `scores`; required for `llama` only.
    pub scores: Vec<f32>,
    /// Type by id, `token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined,
    /// 5 unused, 6 byte.
    ///
    /// Empty: all are normal except the begin and end of sequence.
    pub token_types: Vec<i32>,
    /// Merges `left right`, best first, `merges`; required for `gpt2` only.
    pub merges: Vec<String>,
    /// Begin-of-sequence id, `bos_token_id`.
    pub bos: Option<u32>,
    /// End-of-sequence id, `eos_token_id`.
    pub eos: Option<u32>,
    /// Unknown-token id, `unknown_token_id`.
    pub unk: Option<u32>,
    /// Padding id, `padding_token_id`.
    pub pad: Option<u32>,
    /// Setting `add_bos_token`.
    pub add_bos: Option<bool>,
    /// Setting `add_eos_token`.
    pub add_eos: Option<bool>,
    /// Setting `add_space_prefix`, which only affects `llama`.
    pub add_space_prefix: Option<bool>,
    /// Chat template, `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// Type of a token (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

/// Checked vocabulary: tokens are unique, ids in range.
pub(super) struct Vocab<'a> {
    pub(super) raw: &'a GgufVocab,
    pub(super) types: Vec<TokenType>,
    pub(super) ids: HashMap<&'a str, u32>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) add_bos: bool,
    pub(super) add_eos: bool,
}

impl<'a> Vocab<'a> {
    /// Checks a vocabulary.
    ///
    /// `bytelevel_bos` is the default for adding the begin of sequence in byte-level BPE; `None`
    /// means a sentencepiece vocabulary.
    pub(super) fn check(raw: &'a GgufVocab, bytelevel_bos: Option<bool>) -> Result<Self> {
        let n = raw.tokens.len();
        if n == 0 {
            return Err(Error::new(
                ErrorKind::Missing,
                "tokenizer.ggml.tokens is missing or empty",
            ));
        }
        check_count("tokens", n, MAX_TOKENS)?;
        check_count("merges", raw.merges.len(), MAX_MERGES)?;
        for (name, found) in [
            ("scores", raw.scores.len()),
            ("token_type", raw.token_types.len()),
        ] {
            if found != 0 && found != n {
                return Err(invalid(format!(
                    "tokenizer.ggml.{name} has {found} entries, expected one for each of {n} tokens"
                )));
            }
        }
        let mut vocab = Self {
            raw,
            types: token_types(&raw.token_types, n)?,
            ids: ids(&raw.tokens)?,
            bos: raw.bos,
            eos: raw.eos,
            unk: raw.unk,
            add_bos: raw.add_bos.or(bytelevel_bos).unwrap_or(true),
            add_eos: raw.add_eos.unwrap_or(false),
        };
        if bytelevel_bos.is_none() {
            // Defaults of llama.cpp for a sentencepiece vocabulary.
            vocab.unk = vocab.unk.or(Some(0));
            vocab.bos = vocab.bos.or((n > 1).then_some(1));
            vocab.eos = vocab.eos.or((n > 2).then_some(2));
        }
        for (name, id) in vocab.named_ids() {
            if id.is_some_and(|id| id as usize >= n) {
                return Err(invalid(format!(
                    "tokenizer.ggml.{name}_token_id is {}, expected below {n}",
                    id.unwrap_or_default()
                )));
            }
        }
        for (name, wanted, id) in [
            ("bos", vocab.add_bos, vocab.bos),
            ("eos", vocab.add_eos, vocab.eos),
        ] {
            if wanted && id.is_none() {
                return Err(Error::new(
                    ErrorKind::Missing,
                    format!("a {name} token is to be added, but {name}_token_id is missing"),
                ));
            }
        }
        if raw.token_types.is_empty() {
            for id in [vocab.bos, vocab.eos].into_iter().flatten() {
                if let Some(kind) = vocab.types.get_mut(id as usize) {
                    *kind = TokenType::Control;
                }
            }
        }
        Ok(vocab)
    }

    fn named_ids(&self) -> [(&'static str, Option<u32>); 4] {
        [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.raw.pad),
        ]
    }

    /// Returns the spelling of a checked id.
    pub(super) fn token(&self, id: Option<u32>) -> Option<&'a str> {
        let token = self.raw.tokens.get(id? as usize)?;
        Some(token.as_str())
    }

    /// Iterates over (id, spelling, type) of every token.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, TokenType)> {
        (0_u32..)
            .zip(&self.raw.tokens)
            .zip(&self.types)
            .map(|((id, token), &kind)| (id, token.as_str(), kind))
    }

    pub(super) fn special_ids(&self) -> SpecialIds {
        let is_control = |id: &u32| self.types.get(*id as usize) == Some(&TokenType::Control);
        let known = end_tokens(|token| self.ids.get(token).copied().filter(is_control));
        let known = known.into_iter().filter(|id| Some(*id) != self.eos);
        let eos = self.eos.into_iter().chain(known).collect();
        SpecialIds { bos: self.bos, eos }
    }

    /// Returns the post-processor that puts begin and end of sequence around a text, as the model
    /// wants them.
    pub(super) fn post_processor(&self) -> Value {
        let around = |wanted: bool, id: Option<u32>| {
            self.token(id)
                .zip(id)
                .filter(|_| wanted)
                .map(|(token, id)| (json!(token), id))
        };
        let (bos, eos) = (
            around(self.add_bos, self.bos),
            around(self.add_eos, self.eos),
        );
        if bos.is_none() && eos.is_none() {
            return Value::Null;
        }
        let mut table = Map::new();
        for (token, id) in bos.iter().chain(&eos) {
            if let Value::String(name) = token {
                table.insert(
                    name.clone(),
                    json!({"id": token, "ids": [id], "tokens": [token]}),
                );
            }
        }
        let template = |sequence: &str, type_id: u32| {
            let special = |part: &Option<(Value, u32)>| {
                part.as_ref()
                    .map(|(token, _)| json!({"SpecialToken": {"id": token, "type_id": type_id}}))
            };
            let mut items: Vec<Value> = special(&bos).into_iter().collect();
            items.push(json!({"Sequence": {"id": sequence, "type_id": type_id}}));
            items.extend(special(&eos));
            items
        };
        let single = template("A", 0);
        let pair = [single.clone(), template("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": table})
    }

    pub(super) fn tokenizer_config(&self) -> String {
        let mut config = Map::new();
        config.insert(
            "tokenizer_class".to_owned(),
            json!("PreTrainedTokenizerFast"),
        );
        for (name, id) in [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unk),
            ("pad_token", self.raw.pad),
        ] {
            if let Some(token) = self.token(id) {
                config.insert(name.to_owned(), json!(token));
            }
        }
        config.insert("add_bos_token".to_owned(), json!(self.add_bos));
        config.insert("add_eos_token".to_owned(), json!(self.add_eos));
        config.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        if let Some(template) = &self.raw.chat_template {
            config.insert("chat_template".to_owned(), json!(template));
        }
        Value::Object(config).to_string()
    }
}

fn token_types(raw: &[i32], n: usize) -> Result<Vec<TokenType>> {
    if raw.is_empty() {
        return Ok(vec![TokenType::Normal; n]);
    }
    let one = |(id, &code): (usize, &i32)| {
        Ok(match code {
            // Old converters write it for tokens that they did not classify.
            0 | 1 => TokenType::Normal,
            2 => TokenType::Unknown,
            3 => TokenType::Control,
            4 => TokenType::UserDefined,
            5 => TokenType::Unused,
            6 => TokenType::Byte,
            _ => {
                return Err(invalid(format!(
                    "tokenizer.ggml.token_type of token {id} is {code}, expected 1 to 6"
                )));
            }
        })
    };
    raw.iter().enumerate().map(one).collect()
}

fn ids(tokens: &[String]) -> Result<HashMap<&str, u32>> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in (0_u32..).zip(tokens) {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!(
                    "token {id} has {} bytes, the limit is {MAX_TOKEN_BYTES}",
                    token.len()
                ),
            ));
        }
        if let Some(first) = ids.insert(token.as_str(), id) {
            return Err(invalid(format!(
                "token '{}' has the ids {first} and {id}, expected one",
                token.escape_debug()
            )));
        }
    }
    Ok(ids)
}

pub(super) fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
        .hint("convert the GGUF file again, or compress from the Hugging Face directory")
}

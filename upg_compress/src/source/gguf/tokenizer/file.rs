//! Writer of `tokenizer.json` without an intermediate tree of values.
#![forbid(unsafe_code)]

use super::vocab::{TokenType, Vocab};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use std::io::{self, Write};
use upg_kernel::format::check_tokenizer_bytes;
use upg_kernel::{Error, ErrorKind, Result};

/// Components of `tokenizer.json` in which the two kinds of vocabulary differ.
pub(super) struct TokenizerParts {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    pub(super) decoder: Value,
    pub(super) model: Map<String, Value>,
    pub(super) merges: Vec<(u32, u32)>,
}

/// Returns the text for this vocabulary.
///
/// Memory: its bytes. Errors: `TooLarge` above the limit of readers.
pub(super) fn text(vocab: &Vocab<'_>, parts: &TokenizerParts) -> Result<Vec<u8>> {
    let file = File {
        version: "1.0",
        truncation: Value::Null,
        padding: Value::Null,
        added_tokens: Added(vocab),
        normalizer: &parts.normalizer,
        pre_tokenizer: &parts.pre_tokenizer,
        post_processor: vocab.post_processor(),
        decoder: &parts.decoder,
        model: Model { vocab, parts },
    };
    let cannot_write = |e: serde_json::Error| {
        let message = format!("cannot write tokenizer.json: {e}");
        Error::new(ErrorKind::Invalid, message).with_source(e)
    };
    let mut bytes = Count(0);
    serde_json::to_writer(&mut bytes, &file).map_err(cannot_write)?;
    check_tokenizer_bytes(bytes.0)?;
    let mut text = Vec::with_capacity(bytes.0);
    serde_json::to_writer(&mut text, &file).map_err(cannot_write)?;
    Ok(text)
}

/// Writer that counts bytes.
struct Count(usize);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fields of the file, in the usual order.
#[derive(Serialize)]
struct File<'a, 'v> {
    version: &'static str,
    truncation: Value,
    padding: Value,
    added_tokens: Added<'a, 'v>,
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: Value,
    decoder: &'a Value,
    model: Model<'a, 'v>,
}

struct Added<'a, 'v>(&'a Vocab<'v>);

#[derive(Serialize)]
struct AddedToken<'a> {
    id: u32,
    content: &'a str,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

impl Serialize for Added<'_, '_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let tokens = self.0.iter().filter(|(_, token, _)| !token.is_empty());
        to.collect_seq(tokens.filter_map(|(id, content, kind)| {
            let special = match kind {
                TokenType::Control | TokenType::Unknown => true,
                TokenType::UserDefined => false,
                TokenType::Normal | TokenType::Unused | TokenType::Byte => return None,
            };
            Some(AddedToken {
                id,
                content,
                single_word: false,
                lstrip: false,
                rstrip: false,
                normalized: false,
                special,
            })
        }))
    }
}

struct Model<'a, 'v> {
    vocab: &'a Vocab<'v>,
    parts: &'a TokenizerParts,
}

impl Serialize for Model<'_, '_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(None)?;
        for (key, value) in &self.parts.model {
            map.serialize_entry(key, value)?;
        }
        map.serialize_entry("vocab", &Ids(self.vocab))?;
        map.serialize_entry("merges", &Merges(self))?;
        map.end()
    }
}

struct Ids<'a, 'v>(&'a Vocab<'v>);

impl Serialize for Ids<'_, '_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.0.iter().map(|(id, token, _)| (token, id)))
    }
}

struct Merges<'a, 'm, 'v>(&'a Model<'m, 'v>);

impl Serialize for Merges<'_, '_, '_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let token = |id| self.0.vocab.token(Some(id));
        let merges = self.0.parts.merges.iter();
        to.collect_seq(merges.map(|&(left, right)| [token(left), token(right)]))
    }
}

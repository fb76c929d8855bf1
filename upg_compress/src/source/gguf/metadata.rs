//! Typed access to the metadata of a GGUF file, and its tokenizer fields.
#![forbid(unsafe_code)]

use super::header::{Array, Header, Value, malformed};
use super::tokenizer::vocab::{GgufVocab, MAX_TOKEN_BYTES};
use serde_json::Value as Json;
use std::ops::Range;
use upg_kernel::inference::chat_template::MAX_TEMPLATE_BYTES;
use upg_kernel::inference::tokenizer::{MAX_MERGES, MAX_TOKENS};
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum text in bytes, except for the chat template and tokens: names of models,
/// architectures and so on.
const MAX_TEXT: usize = 1 << 16;

/// Key of the vocabulary.
const TOKENS: &str = "tokenizer.ggml.tokens";

/// Checked header, together with the file that its values are places in.
pub(super) struct Metadata<'a> {
    pub(super) header: &'a Header,
    pub(super) file: &'a [u8],
}

impl<'a> Metadata<'a> {
    /// Copies a string: mapped bytes may change after they were found to be UTF-8.
    fn text_at(&self, key: &str, range: Range<usize>, most: usize) -> Result<String> {
        let bytes = self.file.get(range).unwrap_or_default();
        if bytes.len() > most {
            let message = format!("{key} has a text of {} bytes, at most {most}", bytes.len());
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        String::from_utf8(bytes.to_vec()).map_err(|_| malformed(format!("{key} is not UTF-8")))
    }

    fn text_up_to(&self, key: &str, most: usize) -> Result<Option<String>> {
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => self.text_at(key, range.clone(), most).map(Some),
            Some(_) => Err(malformed(format!("{key} is not a string"))),
        }
    }

    /// Reads a string.
    ///
    /// Errors: `Malformed` for a key with another type, `TooLarge` above [`MAX_TEXT`].
    pub(super) fn text(&self, key: &str) -> Result<Option<String>> {
        self.text_up_to(key, MAX_TEXT)
    }

    /// Reads a non-negative integer.
    ///
    /// A list with one number per layer is accepted if they are all equal. Errors: `Malformed`, and
    /// `Unsupported` for a list of different numbers.
    pub(super) fn number(&self, key: &str) -> Result<Option<usize>> {
        let whole = |value: &Value| match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        let wrong = || malformed(format!("{key} is not a whole number of at least 0"));
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => {
                let mut all: Option<usize> = None;
                list.for_each(self.file, |value| {
                    let n = whole(&value).ok_or_else(wrong)?;
                    if *all.get_or_insert(n) == n {
                        return Ok(());
                    }
                    Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("{key} differs between layers"),
                    )
                    .hint("only models whose layers are all alike are supported"))
                })?;
                Ok(all)
            }
            Some(value) => whole(value).map(Some).ok_or_else(wrong),
        }
    }

    /// Reads a required number above 0. Errors: `Missing`, `Malformed`.
    pub(super) fn required(&self, key: &str) -> Result<usize> {
        match self.number(key)? {
            None => Err(Error::new(
                ErrorKind::Missing,
                format!("no metadata key {key}"),
            )),
            Some(0) => Err(malformed(format!("{key} is 0"))),
            Some(n) => Ok(n),
        }
    }

    /// Reads a finite floating-point number. Errors: `Malformed`.
    pub(super) fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) if x.is_finite() => Ok(Some(*x)),
            Some(_) => Err(malformed(format!("{key} is not a finite number"))),
        }
    }

    /// Returns a number that nothing depends on; `None` if there is none.
    pub(super) fn recommended(&self, key: &str) -> Option<Json> {
        match self.header.get(key)? {
            Value::Int(n) => i64::try_from(*n).ok().map(Json::from),
            // As few digits as the f32 needs.
            Value::Float(x) => serde_json::from_str(&(*x as f32).to_string()).ok(),
            _ => None,
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(malformed(format!("{key} is not true or false"))),
        }
    }

    fn array(&self, key: &str) -> Result<Option<&'a Array>> {
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(malformed(format!("{key} is not a list"))),
        }
    }

    /// Returns the number of tokens without reading them; 0 without a vocabulary.
    pub(super) fn token_count(&self) -> Result<usize> {
        Ok(self.array(TOKENS)?.map_or(0, Array::len))
    }

    /// Reads a list of at most `most` elements, each converted by `each`; empty without the key.
    fn list<T>(&self, key: &str, most: usize, each: impl Fn(Value) -> Result<T>) -> Result<Vec<T>> {
        let Some(list) = self.array(key)? else {
            return Ok(Vec::new());
        };
        let count = Array::len(list);
        if count > most {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("{key} has {count} elements, at most {most}"),
            ));
        }
        let mut out = Vec::with_capacity(count);
        list.for_each(self.file, |value| {
            out.push(each(value)?);
            Ok(())
        })?;
        Ok(out)
    }

    fn texts(&self, key: &str, most: usize) -> Result<Vec<String>> {
        self.list(key, most, |value| match value {
            Value::Text(range) => self.text_at(key, range, 2 * MAX_TOKEN_BYTES + 1),
            _ => Err(malformed(format!("{key} is not a list of strings"))),
        })
    }

    /// Reads the id of a special token. Ids without a token (some writers store
    /// -1) count as none.
    pub(super) fn token_id(&self, name: &str, vocab: usize) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = match self.header.get(&key) {
            None => return Ok(None),
            Some(Value::Int(id)) => u32::try_from(*id).ok(),
            Some(_) => return Err(malformed(format!("{key} is not a whole number"))),
        };
        Ok(id.filter(|id| (*id as usize) < vocab))
    }
}

/// Returns `tokens` with the names of llama.cpp for the empty ones, if there are several.
fn with_named_gaps(mut tokens: Vec<String>) -> Vec<String> {
    let is_gap = |token: &String| token.is_empty();
    if tokens.iter().filter(|token| is_gap(token)).count() > 1 {
        for (id, token) in tokens
            .iter_mut()
            .enumerate()
            .filter(|(_, token)| is_gap(token))
        {
            *token = format!("[EMPTY_{id}]");
        }
    }
    tokens
}

/// Collects the tokenizer data of the metadata.
///
/// Errors: `Malformed` (types, lists of different lengths), `TooLarge`.
pub(super) fn read_vocab(metadata: &Metadata<'_>) -> Result<GgufVocab> {
    let text = |key: &str| metadata.text(key);
    let tokens = with_named_gaps(metadata.texts(TOKENS, MAX_TOKENS)?);
    let scores = metadata.list("tokenizer.ggml.scores", MAX_TOKENS, |value| match value {
        Value::Float(x) => Ok(x as f32),
        _ => Err(malformed("tokenizer.ggml.scores is not a list of floats")),
    })?;
    let token_types = metadata.list(
        "tokenizer.ggml.token_type",
        MAX_TOKENS,
        |value| match value {
            Value::Int(n) => {
                i32::try_from(n).map_err(|_| malformed("a token type of over 32 bits"))
            }
            _ => Err(malformed("tokenizer.ggml.token_type is not a list of ints")),
        },
    )?;
    for (name, len) in [("scores", scores.len()), ("token_type", token_types.len())] {
        if len != 0 && len != tokens.len() {
            return Err(malformed(format!(
                "tokenizer.ggml.{name} has {len} elements for {} tokens",
                tokens.len()
            )));
        }
    }
    let chat_template = metadata.text_up_to("tokenizer.chat_template", MAX_TEMPLATE_BYTES)?;
    let id = |name: &str| metadata.token_id(name, tokens.len());
    Ok(GgufVocab {
        model: text("tokenizer.ggml.model")?.unwrap_or_default(),
        pre: text("tokenizer.ggml.pre")?,
        scores,
        token_types,
        merges: metadata.texts("tokenizer.ggml.merges", MAX_MERGES)?,
        bos: id("bos")?,
        eos: id("eos")?,
        unk: id("unknown")?,
        pad: id("padding")?,
        add_bos: metadata.flag("tokenizer.ggml.add_bos_token")?,
        add_eos: metadata.flag("tokenizer.ggml.add_eos_token")?,
        add_space_prefix: metadata.flag("tokenizer.ggml.add_space_prefix")?,
        chat_template,
        tokens,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_tokens_get_names_if_there_are_several() {
        let named = |tokens: &[&str]| {
            with_named_gaps(tokens.iter().map(|token| (*token).to_owned()).collect())
        };
        assert_eq!(
            named(&["a", "", "b", ""]),
            ["a", "[EMPTY_1]", "b", "[EMPTY_3]"]
        );
        assert_eq!(named(&["a", ""]), ["a", ""]);
    }
}

//! Conversion of the vocabulary in GGUF metadata to `tokenizer.json` and
//! `tokenizer_config.json`.
//!
//! GGUF stores tokens, merges or scores, and two names: the kind of tokenizer
//! (`tokenizer.ggml.model`) and the pre-tokenizer (`tokenizer.ggml.pre`). The splitting expressions
//! themselves are in llama.cpp (`src/llama-vocab.cpp`), so a name that is unknown here is an error:
//! another expression would silently give other ids, and worse text.
#![forbid(unsafe_code)]

mod bytelevel;
mod file;
mod sentencepiece;
pub(super) mod vocab;

pub use vocab::GgufVocab;

use upg_kernel::inference::tokenizer::SpecialIds;
use upg_kernel::{Error, ErrorKind, Result};
use vocab::Vocab;

/// Rebuilt tokenizer, as Hugging Face files.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`: the special tokens, `add_bos_token`, `chat_template`.
    pub tokenizer_config_json: String,
    /// Begin-of-sequence id, and every id that ends a text.
    ///
    /// The latter are `eos_token_id` first, then the control tokens that are known to end a turn.
    pub special: SpecialIds,
    /// Chat template, unchanged.
    pub chat_template: Option<String>,
}

impl GgufVocab {
    /// Builds the files; ids are the indices of `tokens`.
    ///
    /// Time and memory are linear in the vocabulary, with up to 64 MiB more for the merges that a
    /// sentencepiece vocabulary implies.
    ///
    /// Splitting expressions are those of the models' own `tokenizer.json`, which llama.cpp quotes
    /// beside its own approximations. They give the same ids except for a few characters (letters
    /// outside ASCII in `gpt-4o` and `tekken`; the long s, U+017F, after an apostrophe).
    ///
    /// # Errors
    /// `Unsupported` for another `model` or `pre`; `Missing` for absent tokens, scores or merges;
    /// `TooLarge` above the limits of a `tokenizer.json` and 4096 bytes per token; `Invalid`
    /// for a duplicate token, an id out of range, an unknown token type, a score that is not a
    /// number, a merge of or into an unknown token, lists of different lengths.
    pub fn to_tokenizer_files(&self) -> Result<TokenizerFiles> {
        let family = match self.model.as_str() {
            "gpt2" => Some(bytelevel::pre_tokenizer(self.pre.as_deref())?),
            "llama" => None,
            other => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "tokenizer model '{}', known are 'gpt2' and 'llama'",
                        other.escape_debug()
                    ),
                )
                .hint("compress from the Hugging Face directory, which has a tokenizer.json"));
            }
        };
        let vocab = Vocab::check(self, family.as_ref().map(|family| family.add_bos))?;
        let parts = match &family {
            Some(family) => bytelevel::parts(&vocab, family)?,
            None => sentencepiece::parts(&vocab)?,
        };
        let special = vocab.special_ids();
        Ok(TokenizerFiles {
            tokenizer_json: file::text(&vocab, &parts)?,
            tokenizer_config_json: vocab.tokenizer_config(),
            special,
            chat_template: self.chat_template.clone(),
        })
    }
}

#[cfg(test)]
mod tests;

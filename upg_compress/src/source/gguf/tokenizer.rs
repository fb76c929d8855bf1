//! Rebuilds a Hugging Face tokenizer (`tokenizer.json`, `tokenizer_config.json`) from the
//! vocabulary that a GGUF file carries in its metadata.
//!
//! GGUF stores tokens, merges or scores, and two names: the kind of tokenizer
//! (`tokenizer.ggml.model`) and how text is cut before merging (`tokenizer.ggml.pre`). The cutting
//! expressions themselves live in llama.cpp (`src/llama-vocab.cpp`), so a name that is not known
//! here is an error: another expression gives other ids, and worse text, without any sign of it.
#![forbid(unsafe_code)]

mod bytelevel;
mod file;
mod sentencepiece;
pub(super) mod vocab;

pub use vocab::GgufVocab;

use upg_kernel::inference::tokenizer::SpecialIds;
use upg_kernel::{Error, ErrorKind, Result};
use vocab::Vocab;

/// The rebuilt tokenizer, in the files that Hugging Face has.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TokenizerFiles {
    /// `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// `tokenizer_config.json`: the special tokens, `add_bos_token`, `chat_template`.
    pub tokenizer_config_json: String,
    /// Begin of sequence, and every id that ends a text: `eos_token_id` first, then the control
    /// tokens that are known to end a turn.
    pub special: SpecialIds,
    /// The chat template, unchanged.
    pub chat_template: Option<String>,
}

impl GgufVocab {
    /// Builds the files. Ids are the indices of `tokens`. Time and memory are linear in the
    /// vocabulary, with up to 64 MiB more for the merges that a vocabulary of sentencepiece
    /// implies.
    ///
    /// Splitting expressions are those of the models' own `tokenizer.json`, which llama.cpp
    /// quotes beside its own approximations: they give the same ids but for a few characters
    /// (letters outside ASCII in `gpt-4o` and `tekken`; the long s, U+017F, after an apostrophe).
    ///
    /// # Errors
    /// `Unsupported` for another `model` or `pre`; `Missing` for absent tokens, scores, merges or
    /// `pre`; `TooLarge` above the caps of a `tokenizer.json` and 4096 bytes a token; `Invalid`
    /// for a token that stands twice, an id out of range, an unknown token type, a score that is
    /// no number, a merge of or into an unknown token, lists of different lengths.
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

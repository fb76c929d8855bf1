//! `gpt2`: byte-level BPE.
//!
//! An expression splits the text, bytes are spelled as printable characters, and the listed merges
//! are applied inside each part.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};
use upg_kernel::{Error, ErrorKind, Result};

use super::file::TokenizerParts;
use super::vocab::{Vocab, invalid};

/// Expressions of llama.cpp for files that name no pre-tokenizer.
const DEFAULT: [&str; 4] = [
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
];

/// Pre-tokenizer: the splitting rule, and the settings that belong to its name in llama.cpp.
pub(super) struct PreTokenizer {
    cut: Cut,
    /// Flag: a part that is a token as a whole is taken without merging.
    ignore_merges: bool,
    /// Flag: the begin of sequence is added by default.
    pub(super) add_bos: bool,
}

enum Cut {
    /// Expression of GPT-2, which `tokenizers` has built in.
    Gpt2,
    /// Every digit separately, then GPT-2.
    DigitsGpt2,
    /// Expression; each match is a part.
    Expression(&'static str),
    /// Expressions, each of which cuts the parts of those before it.
    Expressions(&'static [&'static str]),
}

/// Expression of Llama 3 (also cl100k of tiktoken): digits in groups of three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Expression of Qwen 2: as Llama 3, but single digits.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Expression of GPT-4o (o200k of tiktoken):
/// words also end where upper case follows lower case.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Expression of Mistral's Tekken: as GPT-4o without contractions, and with single digits.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns the pre-tokenizer for a `tokenizer.ggml.pre` (names as in llama.cpp's
/// `llama_vocab::impl::load`).
pub(super) fn pre_tokenizer(pre: Option<&str>) -> Result<PreTokenizer> {
    let (cut, ignore_merges, add_bos) = match pre.unwrap_or_default() {
        "" | "default" => {
            log::warn!(
                "the GGUF file names no pre-tokenizer: text is cut as llama.cpp does by default, \
                 which may differ from the original model"
            );
            (Cut::Expressions(&DEFAULT), false, false)
        }
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b"
        | "mellum2" => (Cut::DigitsGpt2, false, false),
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "exaone4" | "gigachat" | "a.x-4.0"
        | "mellum" | "trillion" | "granite-docling" => (Cut::Gpt2, false, false),
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
        | "lfm2" => (Cut::Expression(LLAMA3), true, true),
        // Phi-4 is converted as `dbrx`.
        "dbrx" | "smaug-bpe" => (Cut::Expression(LLAMA3), false, false),
        "qwen2" | "deepseek-r1-qwen" | "kormo" | "megrez" | "stablelm2" | "hunyuan"
        | "solar-open" | "grok-2" => (Cut::Expression(QWEN2), false, false),
        // Phi-4-mini is converted as `gpt-4o`.
        "gpt-4o" | "llama4" | "kanana2" | "minimax-m2" => (Cut::Expression(GPT4O), false, false),
        "tekken" => (Cut::Expression(TEKKEN), true, true),
        other => {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("pre-tokenizer '{}' is not known", other.escape_debug()),
            )
            .hint("compress from the Hugging Face directory, which has a tokenizer.json"));
        }
    };
    Ok(PreTokenizer {
        cut,
        ignore_merges,
        add_bos,
    })
}

pub(super) fn parts(vocab: &Vocab<'_>, family: &PreTokenizer) -> Result<TokenizerParts> {
    check_spelling(vocab)?;
    let mut model = Map::new();
    for (key, value) in [
        ("type", json!("BPE")),
        ("dropout", Value::Null),
        ("unk_token", Value::Null),
        ("continuing_subword_prefix", Value::Null),
        ("end_of_word_suffix", Value::Null),
        ("fuse_unk", json!(false)),
        ("byte_fallback", json!(false)),
        ("ignore_merges", json!(family.ignore_merges)),
    ] {
        model.insert(key.to_owned(), value);
    }
    Ok(TokenizerParts {
        normalizer: Value::Null,
        pre_tokenizer: family.cut.to_json(),
        decoder: byte_level(true),
        model,
        merges: merges(vocab)?,
    })
}

impl Cut {
    fn to_json(&self) -> Value {
        match self {
            Self::Gpt2 => byte_level(true),
            Self::DigitsGpt2 => json!({
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": true},
                    byte_level(true),
                ],
            }),
            Self::Expression(regex) => by_expressions(&[regex]),
            Self::Expressions(list) => by_expressions(list),
        }
    }
}

fn by_expressions(list: &[&str]) -> Value {
    let split = |regex: &&str| {
        json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated",
               "invert": false})
    };
    let mut steps: Vec<Value> = list.iter().map(split).collect();
    steps.push(byte_level(false));
    json!({"type": "Sequence", "pretokenizers": steps})
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
           "use_regex": use_regex})
}

/// Checks that tokens use the byte alphabet.
///
/// U+FFFD is not in it: a reader has substituted it for bytes that are not UTF-8.
fn check_spelling(vocab: &Vocab<'_>) -> Result<()> {
    match vocab
        .iter()
        .find(|(_, token, _)| token.contains(char::REPLACEMENT_CHARACTER))
    {
        None => Ok(()),
        Some((id, token, _)) => Err(invalid(format!(
            "token {id} '{}' has the character U+FFFD: its bytes were not UTF-8",
            token.escape_debug()
        ))),
    }
}

/// Converts `left right` to a pair of ids. No byte-level token contains a space.
fn merges(vocab: &Vocab<'_>) -> Result<Vec<(u32, u32)>> {
    if vocab.raw.merges.is_empty() {
        return Err(Error::new(
            ErrorKind::Missing,
            "tokenizer.ggml.merges is missing or empty",
        ));
    }
    let find = |rank: usize, token: &str| {
        vocab.ids.get(token).copied().ok_or_else(|| {
            invalid(format!(
                "merge {rank} needs '{}', which is not a token",
                token.escape_debug()
            ))
        })
    };
    let one = |(rank, merge): (usize, &String)| {
        let Some((left, right)) = merge.split_once(' ') else {
            return Err(invalid(format!(
                "merge {rank} is '{}', expected two tokens with a space between",
                merge.escape_debug()
            )));
        };
        let pair = (find(rank, left)?, find(rank, right)?);
        find(rank, &[left, right].concat())?;
        Ok(pair)
    };
    vocab.raw.merges.iter().enumerate().map(one).collect()
}

//! `llama`: sentencepiece BPE. Spaces are spelled `▁`, the text is not cut, and of two neighbours
//! the pair that makes the token with the best score is merged first.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};
use upg_kernel::{Error, ErrorKind, Result};

use super::{MAX_ENTRIES, Parts, TokenType, Vocab, invalid};

const SPACE: &str = "▁";

pub(super) fn parts(vocab: &Vocab<'_>) -> Result<Parts> {
    let prefix = vocab.raw.add_space_prefix.unwrap_or(true);
    let byte_fallback = (0..=u8::MAX).all(|b| vocab.ids.contains_key(byte_token(b).as_str()));
    let mut model = Map::new();
    for (key, value) in [
        ("type", json!("BPE")),
        ("dropout", Value::Null),
        ("unk_token", json!(vocab.token(vocab.unk))),
        ("continuing_subword_prefix", Value::Null),
        ("end_of_word_suffix", Value::Null),
        ("fuse_unk", json!(true)),
        ("byte_fallback", json!(byte_fallback)),
        ("ignore_merges", json!(false)),
    ] {
        model.insert(key.to_owned(), value);
    }
    Ok(Parts {
        normalizer: normalizer(prefix),
        pre_tokenizer: Value::Null,
        decoder: decoder(prefix),
        model,
        merges: merges(vocab)?,
    })
}

fn byte_token(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// The prefix comes before every stretch of text between special tokens, as in llama.cpp.
fn normalizer(prefix: bool) -> Value {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
    if prefix {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]})
    } else {
        replace
    }
}

fn decoder(prefix: bool) -> Value {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// Every way to make a token of two others, the best score first.
///
/// GGUF has scores where `tokenizer.json` has merges. The order among equal scores (longer left
/// part first, then longer right part) is that of transformers' converter; sentencepiece and
/// llama.cpp take the leftmost pair of the text instead, which no list of merges can say. It
/// matters where one token can be made in two ways that overlap.
///
/// Control, unknown and byte tokens are not made by merging: text must not turn into them.
fn merges(vocab: &Vocab<'_>) -> Result<Vec<(u32, u32)>> {
    if vocab.raw.scores.is_empty() {
        return Err(Error::new(
            ErrorKind::Missing,
            "tokenizer.ggml.scores is missing or empty",
        ));
    }
    let mergeable = |kind| {
        matches!(
            kind,
            TokenType::Normal | TokenType::UserDefined | TokenType::Unused
        )
    };
    let part = |text: &str| {
        let id = *vocab.ids.get(text)?;
        vocab
            .types
            .get(id as usize)
            .copied()
            .filter(|&kind| mergeable(kind))
            .map(|_| id)
    };
    let mut found = Vec::new();
    for ((id, token, kind), &score) in vocab.iter().zip(&vocab.raw.scores) {
        if score.is_nan() {
            return Err(invalid(format!("the score of token {id} is not a number")));
        }
        if !mergeable(kind) {
            continue;
        }
        let start = found.len();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(l), Some(r)) = (part(left), part(right)) {
                found.push((
                    score + 0.0,
                    left.chars().count(),
                    right.chars().count(),
                    l,
                    r,
                ));
            }
        }
        if let Some(new) = found.get_mut(start..) {
            new.sort_by_key(|&(_, _, _, l, r)| (l, r));
        }
        if found.len() > MAX_ENTRIES {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("the vocabulary implies more than {MAX_ENTRIES} merges"),
            ));
        }
    }
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    Ok(found.into_iter().map(|(_, _, _, l, r)| (l, r)).collect())
}

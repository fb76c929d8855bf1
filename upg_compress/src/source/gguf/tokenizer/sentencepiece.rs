//! `llama`: sentencepiece BPE.
//!
//! Spaces are spelled `▁` and the text is not split. The adjacent pair that makes the token with
//! the best score is merged first.
#![forbid(unsafe_code)]

use serde_json::{Map, Value, json};
use std::cmp::Ordering;
use upg_kernel::{Error, ErrorKind, Result};

use super::file::TokenizerParts;
use super::vocab::{TokenType, Vocab, invalid};
use upg_kernel::inference::tokenizer::MAX_MERGES;

const SPACE: &str = "▁";

/// Maximum bytes of the implied merges in `tokenizer.json`: those of Gemma take 11 MB.
const MAX_MERGE_BYTES: usize = 32 << 20;

/// Bytes around the two tokens of a merge there.
const AROUND_MERGE: usize = r#"["",""],"#.len();

pub(super) fn parts(vocab: &Vocab<'_>) -> Result<TokenizerParts> {
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
    Ok(TokenizerParts {
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

/// Returns the normalizer. The prefix precedes every stretch of text between special tokens,
/// as in llama.cpp.
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

/// Returns every way to make a token of two others, the best score first.
///
/// GGUF has scores where `tokenizer.json` has merges. The order at a tie (longer left part first,
/// then longer right part) is that of transformers' converter. sentencepiece and llama.cpp take the
/// leftmost pair of the text instead, which no list of merges can express. The difference matters
/// where one token can be made in two ways that overlap.
///
/// Control, unknown and byte tokens are not made by merging: text must not turn into them.
///
/// Time: that of sorting the vocabulary, plus linear in its bytes and in the merges. Memory: 33
/// bytes per merge.
fn merges(vocab: &Vocab<'_>) -> Result<Vec<(u32, u32)>> {
    let scores = &vocab.raw.scores;
    if scores.is_empty() {
        return Err(Error::new(
            ErrorKind::Missing,
            "tokenizer.ggml.scores is missing or empty",
        ));
    }
    if let Some(id) = scores.iter().position(|score| score.is_nan()) {
        return Err(invalid(format!("the score of token {id} is not a number")));
    }
    let (starts, ends) = (Parents::of_starts(vocab), Parents::of_ends(vocab));
    let chars: Vec<u32> = vocab
        .iter()
        .map(|(_, token, _)| token.chars().count() as u32)
        .collect();
    let len = |id: u32| vocab.raw.tokens[id as usize].len();
    let (mut found, mut bytes, mut right) = (Vec::new(), 0, Vec::new());
    for ((id, token, _), &score) in vocab.iter().zip(scores) {
        // From the longest to the shortest; likewise the left parts below,
        // and their right parts in reverse.
        right.clear();
        right.extend(ends.chain(id));
        for l in starts.chain(id) {
            let rest = token.len() - len(l);
            while right.last().is_some_and(|&r| len(r) < rest) {
                right.pop();
            }
            let Some(&r) = right.last().filter(|&&r| len(r) == rest) else {
                continue;
            };
            bytes += token.len() + AROUND_MERGE;
            check_merges(found.len() + 1, bytes)?;
            found.push(Implied {
                score: score + 0.0,
                chars: (chars[l as usize], chars[r as usize]),
                token: id,
                parts: (l, r),
            });
        }
    }
    let order = |a: &Implied, b: &Implied| {
        let by_score = b.score.total_cmp(&a.score).then(b.chars.cmp(&a.chars));
        by_score.then((a.token, a.parts).cmp(&(b.token, b.parts)))
    };
    found.sort_unstable_by(order);
    Ok(found.into_iter().map(|merge| merge.parts).collect())
}

/// Checks the limits.
///
/// Errors (`TooLarge`): more merges than `tokenizer.json` may have, or more bytes of them.
fn check_merges(count: usize, bytes: usize) -> Result<()> {
    if count <= MAX_MERGES && bytes <= MAX_MERGE_BYTES {
        return Ok(());
    }
    let message = format!(
        "the vocabulary implies more than {MAX_MERGES} merges, or {MAX_MERGE_BYTES} bytes of them"
    );
    Err(Error::new(ErrorKind::TooLarge, message)
        .hint("compress from the Hugging Face directory, which has a tokenizer.json"))
}

/// Way to make a token of two others.
struct Implied {
    score: f32,
    /// Number of characters of the left and the right part.
    chars: (u32, u32),
    token: u32,
    parts: (u32, u32),
}

/// For each token the longest other mergeable token that it starts with, or ends with.
struct Parents(Vec<Option<u32>>);

impl Parents {
    fn of_starts(vocab: &Vocab<'_>) -> Self {
        Self::new(
            vocab,
            |a, b| a.cmp(b),
            |token, start| token.starts_with(start),
        )
    }

    fn of_ends(vocab: &Vocab<'_>) -> Self {
        let reversed = |a: &str, b: &str| a.bytes().rev().cmp(b.bytes().rev());
        Self::new(vocab, reversed, |token, end| token.ends_with(end))
    }

    /// Finds the parents.
    ///
    /// `order` sorts every token after those that `begins` finds in it,
    /// with only such tokens between.
    fn new(
        vocab: &Vocab<'_>,
        order: impl Fn(&str, &str) -> Ordering,
        begins: impl Fn(&str, &str) -> bool,
    ) -> Self {
        let mergeable = |kind| {
            matches!(
                kind,
                TokenType::Normal | TokenType::UserDefined | TokenType::Unused
            )
        };
        let tokens = vocab
            .iter()
            .filter(|&(_, token, kind)| mergeable(kind) && !token.is_empty());
        let mut sorted: Vec<(u32, &str)> = tokens.map(|(id, token, _)| (id, token)).collect();
        sorted.sort_unstable_by(|a, b| order(a.1, b.1));
        let mut parents = vec![None; vocab.types.len()];
        let mut open: Vec<(u32, &str)> = Vec::new();
        for (id, token) in sorted {
            while open.last().is_some_and(|(_, outer)| !begins(token, outer)) {
                open.pop();
            }
            parents[id as usize] = open.last().map(|&(outer, _)| outer);
            open.push((id, token));
        }
        Self(parents)
    }

    /// Iterates over the parent of a token, the parent of that, and so on: each is shorter than
    /// the one before.
    fn chain(&self, id: u32) -> impl Iterator<Item = u32> {
        std::iter::successors(self.0[id as usize], |&id| self.0[id as usize])
    }
}

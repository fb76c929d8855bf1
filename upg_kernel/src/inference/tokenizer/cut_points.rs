//! Points at which a long text may be cut without changing its ids.
//!
//! A point between two characters is used only if no component of the tokenizer can see across it.
//! No added token spans it, and the normalizer changes each side separately. Either the
//! pre-tokenizer splits there anyway, or no token of the vocabulary has both characters side by
//! side, so that no merge can join them.
#![forbid(unsafe_code)]

use super::expressions::{Cuts, examine};
use super::file::Parts;
use super::limits::MAX_TEXT_BYTES;
use crate::{Error, ErrorKind, Result};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::OnceLock;

/// Minimum bytes of a piece, which ends at the next point.
const PIECE: usize = 32 << 10;

/// Maximum factor by which the normalizers of published tokenizers lengthen a text.
///
/// They turn a space into three bytes, and add some before a text.
const USUAL_GROWTH: usize = 9;

/// Cut points of one tokenizer.
pub(super) struct CutPoints {
    rule: Rule,
    /// Last characters of added tokens.
    ///
    /// Such a token may take the whitespace after it, and the text after that is normalized as the
    /// start of a text.
    ends: HashSet<char>,
    /// Piece size, [`PIECE`] except in tests.
    pub(super) piece: usize,
    /// Maximum bytes of a piece.
    most: usize,
}

enum Rule {
    /// No points are known.
    None,
    /// Between words, where the pre-tokenizer splits.
    Words {
        /// Flag: only before a space, because other whitespace would be given its own space.
        spaces_only: bool,
        /// Flag: only between ASCII characters, which no normalizer joins.
        ascii: bool,
    },
    /// Between characters that no token has side by side.
    Pairs {
        /// Character that the normalizer substitutes for a space.
        space: char,
        /// Flag: only before a space, as in `Words`.
        spaces_only: bool,
        pairs: OnceLock<Pairs>,
    },
}

/// Characters of a vocabulary.
struct Pairs {
    /// Characters that are tokens by themselves.
    single: HashSet<char>,
    /// Pairs of characters that are adjacent in a token.
    joined: HashSet<(char, char)>,
}

impl CutPoints {
    pub(super) fn new(parts: &Parts, growth: usize, inner: &tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_vocabulary();
        let tokens = added.get_added_tokens_decoder();
        let spellings: Vec<String> = tokens
            .iter()
            .flat_map(|(&id, token)| [Some(token.content.clone()), added.simple_id_to_token(id)])
            .flatten()
            .collect();
        let looks_around = tokens.values().any(|token| token.single_word);
        let rule = match Rule::of(parts) {
            _ if looks_around => Rule::None,
            Rule::Words { .. } if spellings.iter().any(|s| has_space_within(s)) => Rule::None,
            rule => rule,
        };
        Self {
            rule,
            ends: spellings
                .iter()
                .filter_map(|s| s.chars().next_back())
                .collect(),
            piece: PIECE,
            most: MAX_TEXT_BYTES / growth.div_ceil(USUAL_GROWTH).max(1),
        }
    }

    /// Returns the bytes of the first piece of `text`: all of them if it cannot be cut.
    ///
    /// Errors (`TooLarge`): the piece is too long for a normalizer that may lengthen it greatly.
    pub(super) fn first_piece(&self, text: &str, inner: &tokenizers::Tokenizer) -> Result<usize> {
        if text.len() <= self.piece {
            return Ok(text.len());
        }
        let start = text.floor_char_boundary(self.piece);
        let mut before = text[..start].chars().rev();
        let (mut right, mut left) = (before.next(), before.next());
        for (place, next) in text[start..].char_indices() {
            if start + place > self.most {
                break;
            }
            if let (Some(w), Some(x)) = (left, right)
                && !self.ends.contains(&x)
                && !(x.is_whitespace() && self.ends.contains(&w))
                && self.rule.allows([w, x, next], inner)
            {
                return Ok(start + place);
            }
            (left, right) = (right, Some(next));
        }
        if text.len() <= self.most {
            return Ok(text.len());
        }
        let message = format!(
            "the text has over {} bytes that cannot be cut, and the tokenizer's normalizer may make them far longer",
            self.most
        );
        Err(Error::new(ErrorKind::TooLarge, message).hint("use a part of it"))
    }
}

impl Rule {
    fn of(parts: &Parts) -> Self {
        let mut normalizers = Vec::new();
        flatten(&parts.normalizer, "normalizers", &mut normalizers);
        let mut steps = Vec::new();
        flatten(&parts.pre_tokenizer, "pretokenizers", &mut steps);
        // Each space ends a word, in a piece as in the whole.
        if steps.iter().all(|step| splits_after_spaces(step)) {
            steps.clear();
        }
        match steps.as_slice() {
            [] => Self::pairs(&normalizers, ' ', false, parts.ignores_merges()),
            [only] if kind(only) == "Metaspace" && only["split"] == false => Self::pairs(
                &normalizers,
                replacement(only),
                true,
                parts.ignores_merges(),
            ),
            steps => Self::words(&normalizers, steps),
        }
    }

    fn pairs(normalizers: &[&Value], space: char, spaces_only: bool, ignores_merges: bool) -> Self {
        let mut space = space;
        for part in normalizers {
            match kind(part) {
                "Prepend" => {}
                "Replace" if part.pointer("/pattern/String").is_some_and(|p| p == " ") => {
                    let content = part["content"].as_str().unwrap_or_default();
                    let mut content = content.chars();
                    match (content.next(), content.next()) {
                        (Some(c), None) if space == ' ' => space = c,
                        _ => return Self::None,
                    }
                }
                _ => return Self::None,
            }
        }
        // A piece could be a token as a whole, which the text is not.
        match ignores_merges {
            true => Self::None,
            false => Self::Pairs {
                space,
                spaces_only,
                pairs: OnceLock::new(),
            },
        }
    }

    fn words(normalizers: &[&Value], steps: &[&Value]) -> Self {
        let mut ascii = false;
        for part in normalizers {
            match kind(part) {
                "NFC" | "Prepend" => {}
                "NFD" | "NFKC" | "NFKD" | "Lowercase" => ascii = true,
                _ => return Self::None,
            }
        }
        let (mut cuts, mut spaces_only) = (false, false);
        for step in steps {
            match kind(step) {
                "ByteLevel" => {
                    cuts |= step["use_regex"] != false;
                    spaces_only |= step["add_prefix_space"] != false;
                }
                "Metaspace" if step["split"] != false => (cuts, spaces_only) = (true, true),
                "Digits" | "Punctuation" => {}
                "Whitespace" | "WhitespaceSplit" => cuts = true,
                "Split" => match split_cuts(step) {
                    Cuts::BeforeSpaces => cuts = true,
                    Cuts::Within => {}
                    Cuts::Anywhere => return Self::None,
                },
                _ => return Self::None,
            }
        }
        match cuts {
            true => Self::Words { spaces_only, ascii },
            false => Self::None,
        }
    }

    /// Returns whether a text may be cut between the second and the third of these characters.
    fn allows(&self, [w, x, y]: [char; 3], inner: &tokenizers::Tokenizer) -> bool {
        match self {
            Self::None => false,
            Self::Words {
                spaces_only: true,
                ascii,
            } => y == ' ' && !x.is_whitespace() && (!ascii || x.is_ascii()),
            Self::Words {
                spaces_only: false,
                ascii,
            } => {
                if *ascii && !(w.is_ascii() && x.is_ascii() && y.is_ascii()) {
                    return false;
                }
                let is_line_end = |c| matches!(c, '\r' | '\n');
                let ends_word = !x.is_whitespace()
                    && y.is_whitespace()
                    // Line ends belong to the punctuation before them.
                    && (!is_line_end(y) || x.is_ascii_alphanumeric());
                let starts_line = !w.is_whitespace() && x == '\n' && y.is_alphanumeric();
                ends_word || starts_line
            }
            Self::Pairs {
                space,
                spaces_only,
                pairs,
            } => {
                let pairs = pairs.get_or_init(|| Pairs::of(inner, *space));
                let spelled = |c| if c == ' ' { *space } else { c };
                let (left, right) = (spelled(x), spelled(y));
                !x.is_whitespace()
                    && (!spaces_only || y == ' ')
                    && pairs.single.contains(&left)
                    && pairs.single.contains(&right)
                    && !pairs.joined.contains(&(left, right))
            }
        }
    }
}

impl Pairs {
    fn of(inner: &tokenizers::Tokenizer, space: char) -> Self {
        let mut pairs = Self {
            single: HashSet::new(),
            joined: HashSet::new(),
        };
        let mut own: HashSet<String> = inner.get_vocab(false).into_keys().collect();
        for token in &own {
            let mut characters = token.chars();
            if let (Some(c), None) = (characters.next(), characters.next()) {
                pairs.single.insert(c);
            }
        }
        // Added tokens are found before spaces are replaced, or after.
        let added = inner.get_added_vocabulary();
        for (&id, token) in added.get_added_tokens_decoder() {
            own.insert(token.content.replace(' ', space.encode_utf8(&mut [0; 4])));
            own.extend(added.simple_id_to_token(id));
        }
        for token in &own {
            pairs
                .joined
                .extend(token.chars().zip(token.chars().skip(1)));
        }
        pairs
    }
}

/// Appends the components of a component in order, without the sequences that hold them.
fn flatten<'a>(part: &'a Value, items: &str, parts: &mut Vec<&'a Value>) {
    match part.get(items).and_then(Value::as_array) {
        Some(items_of_it) if kind(part) == "Sequence" => {
            items_of_it
                .iter()
                .for_each(|item| flatten(item, items, parts));
        }
        _ if part.is_null() => {}
        _ => parts.push(part),
    }
}

fn kind(part: &Value) -> &str {
    part.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn replacement(metaspace: &Value) -> char {
    let text = metaspace["replacement"].as_str().unwrap_or_default();
    text.chars().next().unwrap_or('▁')
}

/// Returns the cuts of a `Split` that separates its matches from the text between them.
fn split_cuts(step: &Value) -> Cuts {
    let keeps_apart = match step["behavior"].as_str() {
        Some("Isolated") => true,
        Some("Removed") => step["invert"] == true,
        _ => false,
    };
    let expression = step.pointer("/pattern/Regex").and_then(Value::as_str);
    match expression.and_then(examine) {
        Some(cuts) if keeps_apart => cuts,
        _ => Cuts::Anywhere,
    }
}

/// Returns whether this is the `Split` of Gemma, which ends a word with each space.
fn splits_after_spaces(step: &Value) -> bool {
    kind(step) == "Split"
        && step.pointer("/pattern/String").is_some_and(|p| p == " ")
        && step["behavior"] == "MergedWithPrevious"
        && step["invert"] != true
}

/// Returns whether whitespace and another character are adjacent in `content`.
fn has_space_within(content: &str) -> bool {
    let next = content.chars().skip(1);
    content
        .chars()
        .zip(next)
        .any(|(a, b)| a.is_whitespace() != b.is_whitespace())
}

//! Limits of texts and tokenizers.
#![forbid(unsafe_code)]

/// Maximum text of one encode call in bytes.
pub const MAX_TEXT_BYTES: usize = 16 << 20;

/// Maximum run of whitespace, or of characters without any.
///
/// Known splitting expressions backtrack over a run, as `\s+(?!\S)` does over whitespace. Far above
/// this limit the regex engine gives up (after a million steps), and the rest of the text would
/// stay in one piece: other ids, without an error. All other expressions are refused if they may
/// backtrack over more than a few characters.
pub const MAX_RUN_CHARS: usize = 200_000;

/// Maximum tokens of a vocabulary: the largest published ones have 262,144.
pub const MAX_TOKENS: usize = 1 << 19;

/// Maximum merges: Gemma has 580,604.
pub const MAX_MERGES: usize = 1 << 20;

/// Maximum added tokens: speech models have one for each of 65,536 sounds.
pub const MAX_ADDED_TOKENS: usize = 1 << 17;

/// Maximum bytes of all added tokens, which become a table of 16 bytes for each of theirs.
pub const MAX_ADDED_BYTES: usize = 2 << 20;

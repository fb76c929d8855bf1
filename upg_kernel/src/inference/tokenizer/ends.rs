//! Special tokens that are known to end a text or a turn.
#![forbid(unsafe_code)]

/// Spellings of tokens that end a text or a turn in every model that has them.
///
/// This is the list of llama.cpp (`src/llama-vocab.cpp`): configs of chat models often name the end
/// of the document and mean the end of the turn.
const END_TOKENS: &[&str] = &[
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<turn|>",
    "<eos>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
];

/// Returns the ids of the tokens that are known to end a text or a turn, in ascending order.
///
/// `special` gives the id of a special token by its spelling. With the tokens of the Harmony format
/// `<|end|>` ends one message of several, and so no answer.
pub fn end_tokens(special: impl Fn(&str) -> Option<u32>) -> Vec<u32> {
    let has = |token| special(token).is_some();
    let is_harmony = has("<|return|>") && has("<|call|>") || has("<|calls|>") && has("<|flush|>");
    let ends = END_TOKENS
        .iter()
        .filter(|token| !(is_harmony && **token == "<|end|>"));
    let mut ids: Vec<u32> = ends.filter_map(|token| special(token)).collect();
    ids.sort_unstable();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_ends_of_a_vocabulary() {
        let of = |tokens: &[&str]| {
            end_tokens(|token| tokens.iter().position(|t| *t == token).map(|id| id as u32))
        };
        assert_eq!(of(&["<|end|>", "a", "<|im_end|>", "<|im_start|>"]), [0, 2]);
        assert_eq!(of(&["<|end|>", "<|return|>", "<|call|>"]), [1, 2]);
        assert_eq!(of(&["<|end|>", "<|return|>"]), [0, 1]);
        assert!(of(&["<|start|>"]).is_empty());
    }
}

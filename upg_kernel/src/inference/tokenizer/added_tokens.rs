//! Checks of the added tokens of a tokenizer.
#![forbid(unsafe_code)]

use super::contained::{contained, wrapped};
use super::file::AddedTokenWithId;
use crate::{Error, ErrorKind, Result};
use tokenizers::{NormalizedString, Normalizer};

/// Checks that added tokens have the ids of the file and a non-empty text.
///
/// The crate gives an added token the next free id, whatever the file says. An empty text is found
/// everywhere, even within characters. A token that takes the whitespace before it, after one that
/// already took it, has a negative length.
///
/// Errors (`Invalid`, `Unsupported`): there is such a token.
pub(super) fn check_added_tokens(
    inner: &tokenizers::Tokenizer,
    added: &[AddedTokenWithId],
) -> Result<()> {
    let takes_space_after = added.iter().any(|token| token.rstrip);
    for token in added {
        let starts_with_space = token.content.starts_with(char::is_whitespace);
        if is_empty_as_text(inner, token)? || takes_space_after && token.lstrip && starts_with_space
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "tokenizer.json: added token '{}' of id {} cannot be distinguished from other text",
                    token.content.escape_debug(),
                    token.id
                ),
            ));
        }
        let found = inner.token_to_id(&token.content);
        if found != Some(token.id) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "tokenizer.json: added token '{}' should have id {}, found {}",
                    token.content.escape_debug(),
                    token.id,
                    found.map_or("none".to_owned(), |id| id.to_string())
                ),
            ));
        }
    }
    Ok(())
}

/// Returns whether an added token is empty after the normalization of the text
/// that is searched.
fn is_empty_as_text(inner: &tokenizers::Tokenizer, token: &AddedTokenWithId) -> Result<bool> {
    let normalizer = inner.get_normalizer().filter(|_| token.normalized);
    let Some(normalizer) = normalizer.filter(|_| !token.content.is_empty()) else {
        return Ok(token.content.is_empty());
    };
    let mut text = NormalizedString::from(token.content.as_str());
    contained(|| normalizer.normalize(&mut text))?
        .map_err(|e| wrapped(ErrorKind::Invalid, "tokenizer.json", e))?;
    Ok(text.get().is_empty())
}

//! Calls of the `tokenizers` crate.
#![forbid(unsafe_code)]

use crate::{Error, ErrorKind, Result};

/// Runs code of the `tokenizers` crate; a panic in it becomes an error.
///
/// The checks of `allowed` leave none that we know of.
pub(super) fn contained<T>(run: impl FnOnce() -> T) -> Result<T> {
    // Unwind safe: the tokenizer only changes its own cache, which stays consistent.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(|_| {
        Error::new(
            ErrorKind::Invalid,
            "the tokenizer failed: tokenizer.json has a part that it cannot work with",
        )
    })
}

/// Returns an error of the crate as one of ours.
pub(super) fn wrapped(kind: ErrorKind, what: &str, e: tokenizers::Error) -> Error {
    Error::new(kind, format!("{what}: {e}")).with_source(e)
}

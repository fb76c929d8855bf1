//! The file `tokenizer_config.json`.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

/// Returns the template in a parsed `tokenizer_config.json`: a text, or of several named ones
/// `default`.
///
/// Errors: `Malformed` when `chat_template` is neither.
pub(crate) fn default_template(config: &Map<String, Value>) -> Result<Option<&str>> {
    let source = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(named)) => named
            .iter()
            .find(|t| t.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|t| t.get("template")),
        other => other,
    };
    source.and_then(Value::as_str).map(Some).ok_or_else(|| {
        Error::new(
            ErrorKind::Malformed,
            "tokenizer_config.json: chat_template is neither a text nor a list with a 'default'",
        )
    })
}

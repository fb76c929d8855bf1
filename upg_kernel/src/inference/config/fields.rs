//! Typed, bounded access to the keys of an untrusted JSON object; `null` counts as absent.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

/// JSON object with its name in errors.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    pub(super) document: &'a str,
    pub(super) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn error(&self, kind: ErrorKind, message: impl std::fmt::Display) -> Error {
        Error::new(kind, format!("{}: {message}", self.document))
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        self.error(ErrorKind::Missing, format_args!("'{key}' is missing"))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        self.error(
            ErrorKind::Invalid,
            format_args!("'{key}' is {}, expected {expected}", shorten(value)),
        )
    }

    /// Reads the object under `key`.
    pub(super) fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        self.get(key)
            .map(|value| {
                let map = value
                    .as_object()
                    .ok_or_else(|| self.wrong(key, value, "an object"))?;
                Ok(Fields { map, ..*self })
            })
            .transpose()
    }

    /// Reads the string under `key`.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| self.wrong(key, value, "a string"))
            })
            .transpose()
    }

    /// Reads the boolean under `key`.
    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        self.get(key).map_or(Ok(default), |value| {
            value
                .as_bool()
                .ok_or_else(|| self.wrong(key, value, "true or false"))
        })
    }

    /// Reads a count from 1 to `cap`, if the key is there.
    pub(super) fn size(&self, key: &str, cap: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let expected = || format!("a whole number from 1 to {cap}");
        let found = value
            .as_u64()
            .filter(|&n| n > 0)
            .ok_or_else(|| self.wrong(key, value, &expected()))?;
        match usize::try_from(found) {
            Ok(found) if found <= cap => Ok(Some(found)),
            _ => Err(self.error(
                ErrorKind::TooLarge,
                format_args!("'{key}' is {found}, expected {}", expected()),
            )),
        }
    }

    /// Reads a required count from 1 to `cap`.
    pub(super) fn required_size(&self, key: &str, cap: usize) -> Result<usize> {
        self.size(key, cap)?.ok_or_else(|| self.missing(key))
    }

    /// Reads a finite number above zero, if the key is there.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|value| self.positive_value(key, value))
            .transpose()
    }

    fn positive_value(&self, key: &str, value: &Value) -> Result<f64> {
        value
            .as_f64()
            .filter(|n| n.is_finite() && *n > 0.0)
            .ok_or_else(|| self.wrong(key, value, "a finite number above 0"))
    }

    /// Reads a number for which zero means the default, as in transformers; none if it is zero.
    pub(super) fn positive_or_zero(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => self.positive(key),
        }
    }

    /// Reads a required finite number above zero.
    pub(super) fn required_positive(&self, key: &str) -> Result<f64> {
        self.positive(key)?.ok_or_else(|| self.missing(key))
    }

    /// Reads a list of exactly `len` finite numbers above zero.
    pub(super) fn positives(&self, key: &str, len: usize) -> Result<Vec<f64>> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        let list = value
            .as_array()
            .filter(|list| list.len() == len)
            .ok_or_else(|| self.wrong(key, value, &format!("a list of {len} numbers")))?;
        list.iter()
            .map(|value| self.positive_value(key, value))
            .collect()
    }

    /// Reads a token id, or a list of at most `cap` of them; an absent key is an empty list.
    pub(super) fn token_ids(&self, key: &str, cap: usize) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let values = match value {
            Value::Array(list) if list.len() > cap => {
                return Err(self.error(
                    ErrorKind::TooLarge,
                    format_args!(
                        "'{key}' lists {} token ids, expected at most {cap}",
                        list.len()
                    ),
                ));
            }
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        values
            .iter()
            .map(|v| id(v).ok_or_else(|| self.wrong(key, value, "a token id or a list of them")))
            .collect()
    }
}

/// Formats a value as JSON, truncated to fit into one line of an error.
fn shorten(value: &Value) -> String {
    const LONGEST: usize = 60;
    let mut text = value.to_string();
    if let Some((end, _)) = text.char_indices().nth(LONGEST) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}

//! JSON texts of files, read within bounds: caps before memory is taken, and errors of one short
//! line.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::fmt;

/// Most values (objects, lists, texts, numbers) of a text that is kept as a tree, where each takes
/// up to 250 bytes.
///
/// The largest published `config.json`, with lists of what is not quantized, have some thousands.
pub const MAX_VALUES: usize = 1 << 17;

/// Bytes of the message of a JSON error that are shown: it may quote a text of the file.
const MAX_MESSAGE: usize = 200;

/// Parses `text`, which is that of `document`.
///
/// The numbers `NaN`, `Infinity` and `-Infinity` of Python's JSON become texts of these names: a
/// setting that is used refuses them as it refuses every text.
///
/// Time is linear in the text. Memory: the texts in it, and 250 bytes for each value. Errors:
/// `Malformed` for what is no JSON; `TooLarge` for more than [`MAX_VALUES`] values.
pub fn value(document: &str, text: &str) -> Result<Value> {
    let mut values = Values::new(MAX_VALUES);
    parse(&with_python_numbers(text), Tree(&mut values)).map_err(|e| values.refused(document, e))
}

/// The values of `keys` in the object that `text` is; other keys are passed over, and take no
/// memory.
///
/// Cost as for [`value`], without the numbers of Python. Errors: those of [`value`], which counts
/// the object and the values of these keys; `Malformed` for what is no object.
pub fn fields(document: &str, text: &str, keys: &[&str]) -> Result<Map<String, Value>> {
    let mut values = Values::new(MAX_VALUES);
    let picked = Picked {
        keys,
        values: &mut values,
    };
    parse(text, picked).map_err(|e| values.refused(document, e))
}

/// Numbers that Python's `json` writes, and JSON does not have.
const PYTHON_NUMBERS: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

/// Returns `text` with quotes around [`PYTHON_NUMBERS`] outside of texts.
///
/// Time is linear in the text; memory: a copy of a text that has such a number. Behind
/// [`MAX_VALUES`] of them, more than any text may have, nothing changes.
fn with_python_numbers(text: &str) -> Cow<'_, str> {
    if !PYTHON_NUMBERS[..2].iter().any(|name| text.contains(name)) {
        return Cow::Borrowed(text);
    }
    let numbers = PYTHON_NUMBERS[..2]
        .iter()
        .map(|name| text.matches(name).count());
    let mut left = numbers.sum::<usize>().min(MAX_VALUES);
    let mut quoted = String::with_capacity(text.len() + 2 * left);
    let (mut in_text, mut escaped, mut skip) = (false, false, 0_usize);
    for (at, c) in text.char_indices() {
        if at < skip {
            continue;
        }
        let rest = &text[at..];
        let number = PYTHON_NUMBERS.iter().find(|name| rest.starts_with(**name));
        if let Some(name) = number.filter(|_| !in_text && left > 0) {
            left -= 1;
            quoted.extend(["\"", name, "\""]);
            skip = at + name.len();
            continue;
        }
        in_text ^= c == '"' && !escaped;
        escaped = in_text && c == '\\' && !escaped;
        quoted.push(c);
    }
    Cow::Owned(quoted)
}

/// The error (`Malformed`) of a JSON text, cut to a line that can be shown.
pub fn error(document: &str, e: serde_json::Error) -> Error {
    Error::new(ErrorKind::Malformed, message(document, &e)).with_source(e)
}

pub(crate) fn message(document: &str, e: &serde_json::Error) -> String {
    format!("{document}: {}", cut(&e.to_string()))
}

/// The beginning of a text of a file, for a message.
pub(crate) fn cut(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_MESSAGE);
    match end < text.len() {
        true => format!("{} ..", &text[..end]),
        false => text.to_owned(),
    }
}

/// The number of values that a text may have, and what is left of it.
pub(crate) struct Values {
    most: usize,
    left: usize,
    /// There was one more.
    is_exceeded: bool,
}

impl Values {
    pub(crate) fn new(most: usize) -> Self {
        Self {
            most,
            left: most,
            is_exceeded: false,
        }
    }

    /// Counts a value. Fails if it is one too many.
    fn count<E: serde::de::Error>(&mut self) -> Result<(), E> {
        match self.left.checked_sub(1) {
            Some(left) => self.left = left,
            None => {
                self.is_exceeded = true;
                return Err(E::custom(TOO_MANY));
            }
        }
        Ok(())
    }

    /// The error for a text that was read with these.
    fn refused(&self, document: &str, e: serde_json::Error) -> Error {
        if self.is_exceeded {
            let message = format!("{document}: more than {} values", self.most);
            return Error::new(ErrorKind::TooLarge, message);
        }
        error(&format!("{document}: not JSON"), e)
    }
}

/// Beginning of the message of the error for a value too many.
const TOO_MANY: &str = "too many values";

/// Returns whether `e` is the error for a value too many. No text of a file comes first in a
/// message of this crate.
#[cfg(feature = "text")]
pub(crate) fn is_too_many(e: &serde_json::Error) -> bool {
    e.is_data() && e.to_string().starts_with(TOO_MANY)
}

/// Reads all of `text` as `seed` says.
pub(crate) fn parse<'a, S: DeserializeSeed<'a>>(
    text: &'a str,
    seed: S,
) -> serde_json::Result<S::Value> {
    let mut json = serde_json::Deserializer::from_str(text);
    let found = seed.deserialize(&mut json)?;
    json.end().map(|()| found)
}

/// An object of which some keys are kept.
struct Picked<'a> {
    keys: &'a [&'a str],
    values: &'a mut Values,
}

impl<'de> DeserializeSeed<'de> for Picked<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        self.values.count()?;
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Picked<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = Map::new();
        while let Some(key) = map.next_key_seed(OneOf(self.keys))? {
            match key {
                Some(key) => {
                    let value = map.next_value_seed(Tree(&mut *self.values))?;
                    found.insert(key.to_owned(), value);
                }
                None => map.next_value_seed(Checked)?,
            }
        }
        Ok(found)
    }
}

/// A text that is one of these, or any other one; none of them is kept.
pub(crate) struct OneOf<'a>(pub &'a [&'a str]);

impl<'de, 'a> DeserializeSeed<'de> for OneOf<'a> {
    type Value = Option<&'a str>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_str(self)
    }
}

impl<'a> Visitor<'_> for OneOf<'a> {
    type Value = Option<&'a str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(self.0.iter().copied().find(|known| *known == text))
    }
}

/// A value that is checked as a kept one is, and not kept.
///
/// [`serde::de::IgnoredAny`] lets pass what no parser takes as a value: numbers out of range, half
/// of a surrogate pair, lists of any depth.
struct Checked;

impl<'de> DeserializeSeed<'de> for Checked {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Checked)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Checked)?.is_some() {
            map.next_value_seed(Checked)?;
        }
        Ok(())
    }
}

/// A tree of values, which are counted while it grows.
pub(crate) struct Tree<'a>(pub &'a mut Values);

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        self.0.count()?;
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut found = Vec::new();
        while let Some(value) = list.next_element_seed(Tree(&mut *self.0))? {
            found.push(value);
        }
        Ok(found.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut found = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Tree(&mut *self.0))?;
            found.insert(key, value);
        }
        Ok(found.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A list of so many values, itself included.
    fn list(values: usize) -> String {
        format!("[{}0]", "0,".repeat(values - 2))
    }

    #[test]
    fn as_many_values_as_said_are_read_and_no_more() {
        assert!(value("d", &list(MAX_VALUES)).is_ok());
        let object = |values: usize| format!(r#"{{"a":{},"b":[1,2,3]}}"#, list(values - 1));
        assert!(fields("d", &object(MAX_VALUES), &["a"]).is_ok());
        for refused in [
            value("d", &list(MAX_VALUES + 1)).unwrap_err(),
            fields("d", &object(MAX_VALUES + 1), &["a"]).unwrap_err(),
            fields("d", &object(MAX_VALUES), &["a", "b"]).unwrap_err(),
        ] {
            assert_eq!(refused.kind(), ErrorKind::TooLarge);
            assert_eq!(refused.to_string(), "d: more than 131072 values");
        }
    }

    #[test]
    fn what_is_not_kept_has_to_be_json_too() {
        let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
        for bad in ["1e999", "\"\\ud800\"", &"9".repeat(400), &deep, "Nan"] {
            let e = fields("d", &format!(r#"{{"a":1,"b":{bad}}}"#), &["a"]).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Malformed, "{bad}");
        }
        let good = r#"{"a":1,"b":[null,true,-1,2.5,"x",{"c":{}}]}"#;
        assert_eq!(fields("d", good, &["a"]).unwrap().len(), 1);
    }

    /// Python's `json.dumps` writes them; their names in texts stay as they are.
    #[test]
    fn numbers_of_python_are_texts() {
        let text = r#"{"a":[NaN,Infinity,-Infinity],"b":"\"NaN\\","c":{"Infinity":1}}"#;
        let found = value("d", text).unwrap();
        let expected = serde_json::json!({
            "a": ["NaN", "Infinity", "-Infinity"], "b": "\"NaN\\", "c": {"Infinity": 1},
        });
        assert_eq!(found, expected);
        assert!(fields("d", text, &["b"]).is_err());
        for bad in ["NaN 1", "-NaN", "InfinityNaN", "nan", "Inf", "NaN\""] {
            assert!(value("d", bad).is_err(), "{bad}");
        }
    }

    /// The last value that is allowed does not change what is said of a mistake behind it.
    #[test]
    fn what_is_no_json_is_called_so() {
        for text in [list(MAX_VALUES) + "]", "{".into()] {
            let e = value("d", &text).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Malformed);
            assert!(e.to_string().starts_with("d: not JSON: "), "{e}");
        }
    }
}

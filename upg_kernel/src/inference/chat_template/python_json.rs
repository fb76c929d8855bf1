//! `tojson` as transformers defines it: Python's `json.dumps(x, ensure_ascii=False)`.
#![forbid(unsafe_code)]

use std::io::{self, Write};

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Maximum JSON text of one call in bytes.
///
/// Lists that contain the same list many times are small in memory and huge in print.
const MAX_JSON_BYTES: usize = 1 << 20;

/// Maximum `indent`.
const MAX_INDENT: usize = 16;

pub(super) fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    if ascii == Some(true) || indent.is_some_and(|n| n > MAX_INDENT) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson: ensure_ascii and indents above 16 are not supported",
        ));
    }
    let mut out = Limited(Vec::new());
    let written = match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced)),
        Some(n) => {
            let indent = vec![b' '; n];
            let formatter = PrettyFormatter::with_indent(&indent);
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))
        }
    };
    state.consume_fuel(out.0.len() as u64 / 16)?;
    written.map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))?;
    String::from_utf8(out.0)
        .map_err(|e| Error::new(ErrorKind::BadSerialization, format!("tojson: {e}")))
}

/// Formatter with Python's separators `", "` and `": "`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        w.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len().saturating_add(bytes.len()) > MAX_JSON_BYTES {
            return Err(io::Error::other("the JSON text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

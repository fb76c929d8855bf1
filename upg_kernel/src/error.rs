//! Error type of UPG: an opaque value with a small kind, printed in one line.
#![forbid(unsafe_code)]

use crate::text::Shown;
use std::error::Error as StdError;
use std::fmt::{self, Display, Write};
use std::path::{Path, PathBuf};

/// Result of every fallible operation in UPG.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Category of an error, coarse enough to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused (missing file, full disk, no permission).
    Io,
    /// The data is no safetensors, JSON, GGUF or tokenizer file, or is truncated.
    Malformed,
    /// Well-formed data of a version, encoding, type or family that this build does not support.
    Unsupported,
    /// A required tensor, metadata key or file of a directory is missing.
    Missing,
    /// A tensor has an unexpected shape, dtype or length.
    Shape,
    /// A stored value breaks a rule of the format (index out of range, sums, counts).
    Invalid,
    /// The bytes differ from their recorded checksum.
    Checksum,
    /// A declared size exceeds a limit, or overflows memory arithmetic.
    TooLarge,
    /// The caller passed an unusable value (wrong length, unknown name, bad option).
    Argument,
    /// The caller asked to stop.
    Interrupted,
}

/// Maximum bytes of a message, name or hint, so that a file cannot fill a screen or memory.
const LONGEST_PART: usize = 4096;

/// Error with its kind, the file and tensor concerned, and a hint how to fix it.
///
/// `Display` is one line: `FILE: tensor 'NAME': MESSAGE (format rule N); HINT`.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    rule: Option<u8>,
    path: Option<PathBuf>,
    tensor: Option<String>,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Creates an error.
    ///
    /// `message` says what was found and what was expected, in at most 4,096 bytes.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            rule: None,
            path: None,
            tensor: None,
            message: cut(message.into()),
            hint: None,
            source: None,
        }))
    }

    /// Creates the error of a failed system call: doing `what` (for example
    /// `"cannot open"`) to `path`.
    pub fn io(what: &str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Cause;
        let mend = match source.kind() {
            Cause::StorageFull | Cause::QuotaExceeded | Cause::FileTooLarge => "make room for it",
            Cause::PermissionDenied => "check who may read and write it",
            Cause::ReadOnlyFilesystem => "choose another place",
            _ => "",
        };
        let error = Self::new(ErrorKind::Io, format!("{what}: {source}"))
            .at(path)
            .with_source(source);
        match mend {
            "" => error,
            mend => error.hint(mend),
        }
    }

    /// Sets the rule of `upg_format_v2.md` that is broken.
    pub fn rule(mut self, rule: u8) -> Self {
        self.0.rule = Some(rule);
        self
    }

    /// Sets the file, unless an inner call already did.
    pub fn at(mut self, path: impl AsRef<Path>) -> Self {
        self.0
            .path
            .get_or_insert_with(|| path.as_ref().to_path_buf());
        self
    }

    /// Sets the tensor, unless an inner call already did.
    pub fn tensor(mut self, name: impl Into<String>) -> Self {
        self.0.tensor.get_or_insert_with(|| cut(name.into()));
        self
    }

    /// Appends the place in the file to the message.
    pub fn place(mut self, place: impl Display) -> Self {
        let _ = write!(self.0.message, " ({place})");
        self
    }

    /// Sets a hint how to fix the problem.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(cut(hint.into()));
        self
    }

    /// Sets the error that caused this one.
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Returns the kind, for programs that react to it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the number of the broken rule in `upg_format_v2.md`, if any.
    pub fn broken_rule(&self) -> Option<u8> {
        self.0.rule
    }

    /// Returns the name of the tensor concerned, if any.
    pub fn tensor_name(&self) -> Option<&str> {
        self.0.tensor.as_deref()
    }
}

/// Truncates a text that is too long for a line.
fn cut(mut text: String) -> String {
    if text.len() > LONGEST_PART {
        text.truncate(text.floor_char_boundary(LONGEST_PART));
        text.push_str(" ..");
        text.shrink_to_fit();
    }
    text
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(&*self.0).fmt(f)
    }
}

impl Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.display())?;
        }
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor '{}': ", tensor.escape_debug())?;
        }
        f.write_str(&self.message.replace(['\n', '\r'], " "))?;
        if let Some(rule) = self.rule {
            write!(f, " (format rule {rule})")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

#[cfg(feature = "candle")]
impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        Self::new(ErrorKind::Invalid, e.to_string()).with_source(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_every_part() {
        let e = Error::new(ErrorKind::Invalid, "found 3,\nexpected 2")
            .rule(7)
            .tensor("a\nb")
            .at("x.safetensors")
            .hint("compress it again");
        assert_eq!(
            e.to_string(),
            "x.safetensors: tensor 'a\\nb': found 3, expected 2 (format rule 7); compress it again"
        );
        assert_eq!((e.kind(), e.broken_rule()), (ErrorKind::Invalid, Some(7)));
    }

    #[test]
    fn nothing_steers_the_terminal() {
        let e = Error::new(ErrorKind::Invalid, "\u{1b}[2J\u{7}")
            .at("a\u{1b}b")
            .hint("\u{9b}c");
        assert_eq!(e.to_string(), "a\\u{1b}b: \\u{1b}[2J\\u{7}; \\u{9b}c");
        let e = Error::new(ErrorKind::Invalid, "\u{202e}txt").at("\u{2066}\n");
        assert_eq!(e.to_string(), r"\u{2066}\n: \u{202e}txt");
    }

    #[test]
    fn what_a_file_says_is_cut() {
        let long = "é".repeat(1 << 20);
        let e = Error::new(ErrorKind::Invalid, &*long)
            .tensor(&*long)
            .hint(&*long);
        assert!(e.to_string().len() < 4 * LONGEST_PART);
        let name = e.tensor_name().unwrap();
        assert!(name.starts_with("éé") && name.ends_with("é .."), "{name}");
    }

    #[test]
    fn the_innermost_place_wins() {
        let e = Error::new(ErrorKind::Missing, "gone")
            .tensor("inner")
            .tensor("outer");
        assert_eq!(e.tensor_name(), Some("inner"));
    }
}

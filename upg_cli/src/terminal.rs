//! Output, text input and progress bars.
//!
//! Everything printed to a terminal passes through here. A model's answer, and names and texts of
//! files, may hold control characters. These are escaped on a terminal, and unchanged in a file or
//! a pipe.
#![forbid(unsafe_code)]

use crate::wrap::Wrap;
use indicatif::{ProgressBar, ProgressStyle};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::Path;
use std::time::Duration;
use upg_kernel::support::{Shown, steers};
use upg_kernel::{Error, ErrorKind, Result};

/// Writes to standard output and flushes. `main` treats the error
/// of a closed pipe as success.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let text = match out.is_terminal() {
        true => harmless(text),
        false => Cow::Borrowed(text),
    };
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(output_error)
}

/// Writes text like [`print()`], broken between words on a terminal.
pub fn print_prose(text: &str) -> Result<()> {
    print(&wrapped(text, columns()))
}

/// Returns `text` broken between words at `width` columns.
fn wrapped(text: &str, width: Option<usize>) -> String {
    let mut wrap = Wrap::new(width);
    wrap.push(text) + &wrap.finish()
}

/// Returns the error for output that could not be written.
pub fn output_error(e: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("cannot write the output: {e}")).with_source(e)
}

/// Writes a line to standard error, broken between words on a terminal; ignores failures, because
/// nobody can be told.
pub fn note(line: impl std::fmt::Display) {
    let mut out = std::io::stderr().lock();
    let mut line = line.to_string();
    if out.is_terminal() {
        let width = terminal_size::terminal_size_of(&out).map(|(width, _)| usize::from(width.0));
        line = wrapped(&harmless(&line), width);
    }
    let _ = writeln!(out, "{line}");
}

/// Escapes a name from a file for the one-line message of a progress bar.
pub fn label(name: &str) -> String {
    Shown(name).to_string()
}

/// Returns `text` with control characters escaped, as `\u{1b}`. A two-character line end
/// becomes one.
fn harmless(text: &str) -> Cow<'_, str> {
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let text = text.replace("\r\n", "\n");
    // Line ends and tabs stay unescaped.
    let parts = text.split_inclusive(['\n', '\t']).map(|part| {
        let (inner, end) = part.split_at(part.trim_end_matches(['\n', '\t']).len());
        format!("{}{end}", Shown(inner))
    });
    parts.collect::<String>().into()
}

/// Reads the text in a file of at most `most` bytes,
/// which may be a pipe or an endless device.
///
/// Errors: `Io`; `TooLarge`; `Malformed` if it is not UTF-8.
pub fn read_text(path: &Path, most: usize) -> Result<String> {
    let io = |e| Error::io("cannot read", path, e);
    let bytes = read_bounded(File::open(path).map_err(io)?, most).map_err(io)?;
    text_of(bytes, most).map_err(|e| e.at(path))
}

/// Reads standard input to its end. Errors: as [`read_text`].
pub fn read_input(most: usize) -> Result<String> {
    let bytes = read_bounded(std::io::stdin().lock(), most).map_err(input_error)?;
    text_of(bytes, most)
}

/// Reads a line of `input` without its line end; `None` at the end of input. Errors: as
/// [`read_text`].
pub fn read_line(input: &mut impl BufRead, most: usize) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let limit = most as u64 + 1;
    input
        .take(limit)
        .read_until(b'\n', &mut bytes)
        .map_err(input_error)?;
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    text_of(bytes, most).map(Some)
}

/// Reads at most `most` bytes, plus one that shows that there are more.
fn read_bounded(source: impl Read, most: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    source.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn text_of(bytes: Vec<u8>, most: usize) -> Result<String> {
    if bytes.len() > most {
        let message = format!("a text of over {most} bytes");
        return Err(Error::new(ErrorKind::TooLarge, message).hint("use a part of it"));
    }
    String::from_utf8(bytes).map_err(|e| {
        Error::new(ErrorKind::Malformed, format!("not UTF-8 text: {e}")).with_source(e)
    })
}

fn input_error(e: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("cannot read standard input: {e}")).with_source(e)
}

/// Returns whether `e` means that the reader of our output is gone.
pub fn is_broken_pipe(e: &Error) -> bool {
    std::error::Error::source(e)
        .and_then(|e| e.downcast_ref::<std::io::Error>())
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Creates a progress bar on standard error; invisible if that is not a terminal.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    // Ticks come from a separate thread; the library panics if it cannot be started.
    let can_tick = || std::thread::Builder::new().spawn(|| ()).is_ok();
    if std::io::stderr().is_terminal() && can_tick() {
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}

/// Returns the columns of the terminal; `None` if the output goes elsewhere.
pub fn columns() -> Option<usize> {
    let is_terminal = std::io::stdout().is_terminal();
    let size = terminal_size::terminal_size().filter(|_| is_terminal);
    size.map(|(width, _)| usize::from(width.0))
}

/// Formats bytes as `12.3 MB` and the like, in powers of 1,000.
pub fn bytes(n: u64) -> String {
    indicatif::DecimalBytes(n).to_string()
}

/// Formats a duration as `45 s`, `12 min` or `3.5 h`.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn what_steers_a_terminal_is_spelled_out() {
        for (text, shown) in [
            ("\u{1b}[31mred\u{7}", r"\u{1b}[31mred\u{7}"),
            ("\u{9b}2J\u{7f}\0\u{8}", r"\u{9b}2J\u{7f}\u{0}\u{8}"),
            ("a\rb", r"a\u{d}b"),
            ("a\r\nb\n\tc", "a\nb\n\tc"),
            ("x\r\n\u{1b}", "x\n\\u{1b}"),
            (
                "\u{202e}txt\u{2069}\u{200f}\u{61c}",
                r"\u{202e}txt\u{2069}\u{200f}\u{61c}",
            ),
            ("\u{2028}\u{feff}\u{e0041}", r"\u{2028}\u{feff}\u{e0041}"),
        ] {
            assert_eq!(harmless(text), shown);
        }
        for text in [
            "",
            "plain\n\ttext",
            "日本語 é ñ e\u{301}",
            "👩\u{200d}👩\u{200d}👧 ❤\u{fe0f} 🇩🇪",
            "می\u{200c}خواهم",
            "\u{a0}\u{ad}",
        ] {
            assert!(
                matches!(harmless(text), Cow::Borrowed(same) if same == text),
                "{text}"
            );
        }
        assert_eq!(label("a\nb\u{1b}c"), r"a\nb\u{1b}c");
    }

    #[test]
    fn lines_and_texts_are_bounded() {
        let mut input: &[u8] = b"one\n\nlonger\nno end";
        let mut next = |most| read_line(&mut input, most);
        assert_eq!(next(5).unwrap().as_deref(), Some("one"));
        assert_eq!(next(5).unwrap().as_deref(), Some(""));
        assert_eq!(next(6).unwrap().as_deref(), Some("longer"));
        assert_eq!(next(6).unwrap().as_deref(), Some("no end"));
        assert_eq!(next(6).unwrap(), None);
        let kind = |bytes: &[u8]| read_line(&mut &bytes[..], 5).unwrap_err().kind();
        assert_eq!(kind(b"longer"), ErrorKind::TooLarge);
        assert_eq!(kind(b"\xff\n"), ErrorKind::Malformed);
        assert_eq!(read_bounded(std::io::repeat(0), 9).unwrap().len(), 10);
    }
}

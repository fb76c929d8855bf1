//! Text shown to people: names, paths and messages may hold characters that steer a terminal.
#![forbid(unsafe_code)]

use std::fmt::{self, Display, Write};

/// Returns whether a terminal interprets `c` as a command,
/// or displays other text because of it.
///
/// These are all control characters except line end and tab; characters that change the direction
/// of a line; line ends that only some terminals know; and tags and the byte order mark, which hide
/// text from readers and copies. Joiners and variation selectors are not among them: emoji and many
/// scripts need them.
pub fn steers(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
            true
        }
        '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}' => true,
        c => c.is_control(),
    }
}

/// Text displayed in one line.
///
/// Characters that [`steers`] reports are escaped as `\u{1b}`, line ends and tabs as `\n` and `\t`.
#[derive(Debug, Clone, Copy)]
pub struct Shown<T>(pub T);

impl<T: Display> Display for Shown<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(OneLine(f), "{}", self.0)
    }
}

/// Writer that escapes its input.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| match c {
            '\n' => self.0.write_str("\\n"),
            '\t' => self.0.write_str("\\t"),
            c if steers(c) => write!(self.0, "{}", c.escape_unicode()),
            c => self.0.write_char(c),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_of_which_nothing_steers() {
        let text = "a\nb\tc\r\0\u{1b}[2J\u{9b}\u{202e}\u{2028}\u{feff}\u{e0041}";
        let shown = Shown(text).to_string();
        assert_eq!(
            shown,
            r"a\nb\tc\u{d}\u{0}\u{1b}[2J\u{9b}\u{202e}\u{2028}\u{feff}\u{e0041}"
        );
        assert!(!shown.contains(|c: char| c.is_control() || steers(c)));
        let plain = "日本語 e\u{301} 👩\u{200d}👩 ❤\u{fe0f} می\u{200c}خواهم \\ \"";
        assert_eq!(Shown(plain).to_string(), plain);
    }
}

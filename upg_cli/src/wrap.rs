//! Word wrap of a text that arrives in pieces.
#![forbid(unsafe_code)]

use unicode_width::UnicodeWidthStr;

/// Breaks lines between words at the width of a terminal.
///
/// Lines of code stay as they are: those between two ``` lines, and those that start with four
/// spaces or a tab.
pub struct Wrap {
    /// Columns of the terminal; `None`: nothing is broken.
    width: Option<usize>,
    /// Columns of the current line that are written.
    column: usize,
    /// Word that is not complete, with the space before it.
    space: String,
    word: String,
    /// Start of the current line, for recognizing code.
    line: String,
    is_fenced: bool,
}

/// Start of a line that is kept for recognizing code.
const LINE_START: usize = 8;

/// Word that is written before its end: it cannot be kept together.
const LONG_WORD: usize = 200;

impl Wrap {
    pub fn new(width: Option<usize>) -> Self {
        Self {
            width,
            column: 0,
            space: String::new(),
            word: String::new(),
            line: String::new(),
            is_fenced: false,
        }
    }

    /// Takes a piece; returns what can be written.
    pub fn push(&mut self, piece: &str) -> String {
        if self.width.is_none() {
            return piece.to_owned();
        }
        let mut out = String::new();
        for c in piece.chars() {
            if self.line.len() < LINE_START && c != '\n' {
                self.line.push(c);
            }
            match c {
                '\n' => {
                    self.end_word(&mut out);
                    self.space.clear();
                    out.push('\n');
                    self.column = 0;
                    self.is_fenced ^= self.line.trim_start().starts_with("```");
                    self.line.clear();
                }
                ' ' | '\t' => {
                    self.end_word(&mut out);
                    self.space.push(c);
                }
                c => {
                    self.word.push(c);
                    if self.word.len() > LONG_WORD {
                        self.end_word(&mut out);
                    }
                }
            }
        }
        out
    }

    /// Returns the rest, after the last piece.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        self.end_word(&mut out);
        out + &std::mem::take(&mut self.space)
    }

    /// Writes the word, on a new line if it does not fit here.
    fn end_word(&mut self, out: &mut String) {
        if self.word.is_empty() {
            return;
        }
        let (space, word) = (
            std::mem::take(&mut self.space),
            std::mem::take(&mut self.word),
        );
        let [spaces, columns] = [&space, &word].map(|text| text.width());
        let is_code = self.is_fenced
            || self.line.starts_with("```")
            || self.line.starts_with("    ")
            || self.line.starts_with('\t');
        let fits = self
            .width
            .is_none_or(|width| self.column + spaces + columns <= width);
        if fits || is_code || self.column == 0 {
            out.push_str(&space);
            self.column += spaces;
        } else {
            out.push('\n');
            self.column = 0;
        }
        out.push_str(&word);
        self.column += columns;
    }
}

#[cfg(test)]
mod tests {
    use super::Wrap;

    /// Wraps a text that arrives in pieces of `size` characters.
    fn wrapped(text: &str, width: usize, size: usize) -> String {
        let mut wrap = Wrap::new(Some(width));
        let chars: Vec<char> = text.chars().collect();
        let pieces = chars.chunks(size).map(String::from_iter);
        let mut out: String = pieces.map(|piece| wrap.push(&piece)).collect();
        out += &wrap.finish();
        out
    }

    #[test]
    fn lines_break_between_words_whatever_the_pieces() {
        for (text, expected) in [
            ("one two three four", "one two\nthree\nfour"),
            ("one two\nthree four five", "one two\nthree\nfour\nfive"),
            ("a  b\n\n  c", "a  b\n\n  c"),
            ("incomprehensibilities no", "incomprehensibilities\nno"),
            ("日本語 日本語 x", "日本語\n日本語 x"),
            (
                "```\nlet long = line;\n```\na b c d e f",
                "```\nlet long = line;\n```\na b c d\ne f",
            ),
            (
                "    let long = line;\na b c d e f",
                "    let long = line;\na b c d\ne f",
            ),
            ("end ", "end "),
            ("", ""),
        ] {
            for size in [1, 2, 3, 100] {
                assert_eq!(wrapped(text, 8, size), expected, "pieces of {size}");
            }
        }
        assert_eq!(Wrap::new(None).push("one two three"), "one two three");
    }
}

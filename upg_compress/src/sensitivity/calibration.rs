//! Calibration texts: the built-in one, and those in files.
#![forbid(unsafe_code)]

use crate::source::Source;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use upg_kernel::format::json;
use upg_kernel::{Error, ErrorKind, Result};

/// Built-in text; `data/README.md` describes its content and sources.
const BUILT_IN: &str = include_str!("../../data/calibration.txt");

/// Default number of tokens of the built-in text; the work is proportional to it.
pub const BUILT_IN_TOKENS: usize = 1 << 15;

/// Tokens per sequence, unless the context of the model is shorter.
const WINDOW: usize = 512;

/// Maximum tokens of a calibration: their hidden states stay in memory.
const MAX_TOKENS: usize = 1 << 18;

/// Bytes of the digest that identifies the tokens.
const DIGEST_BYTES: usize = 16;

/// Calibration text: independent sequences of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calibration {
    tokens: Vec<u32>,
    window: usize,
    /// Flag: this is the built-in text.
    built_in: bool,
}

impl Calibration {
    /// Divides `tokens` into sequences of `window` tokens; a remainder is unused.
    ///
    /// Errors: `Argument` if there is not one whole sequence; `TooLarge` above 262,144 tokens,
    /// whose hidden states would take too much memory.
    pub fn new(mut tokens: Vec<u32>, window: usize) -> Result<Self> {
        if window == 0 || tokens.len() < window {
            let message = format!(
                "the calibration text has {} tokens, fewer than a sequence of {window}",
                tokens.len()
            );
            return Err(Error::new(ErrorKind::Argument, message).hint("use a longer text"));
        }
        if tokens.len() > MAX_TOKENS {
            let message = format!(
                "the calibration text has {} tokens, the limit is {MAX_TOKENS}",
                tokens.len()
            );
            return Err(Error::new(ErrorKind::TooLarge, message).hint("use a shorter text"));
        }
        tokens.truncate(tokens.len() / window * window);
        Ok(Self {
            tokens,
            window,
            built_in: false,
        })
    }

    /// Returns its first `sequences` sequences.
    pub(crate) fn first(&self, sequences: usize) -> Self {
        let mut first = self.clone();
        first.tokens.truncate(sequences * self.window);
        first
    }

    /// Returns all tokens, one sequence after the other.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Returns the number of tokens of a sequence.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Tokenizes the built-in text, at most `most` tokens of it.
    ///
    /// It has prose, dialogue, articles, letters, code, markup, tables, and some paragraphs in
    /// other languages than English, 250 kB in all. Each prefix has some of most of it.
    ///
    /// Errors: as [`Calibration::of_documents`].
    pub fn built_in(source: &dyn Source, most: usize) -> Result<Self> {
        Ok(Self {
            built_in: true,
            ..Self::of_text(source, BUILT_IN, most)?
        })
    }

    /// Tokenizes a text as one document. Errors: as [`Calibration::of_documents`].
    pub fn of_text(source: &dyn Source, text: &str, most: usize) -> Result<Self> {
        Self::of_documents(source, &[text], most)
    }

    /// Tokenizes documents separately, joins their tokens and divides them into sequences.
    ///
    /// A sequence has 512 tokens, or the context of the model if that is shorter. Of all tokens the
    /// first `most` are used.
    ///
    /// Errors: those of the tokenizer and of [`Calibration::new`];
    /// `Missing` if the source has no tokenizer.
    pub fn of_documents(
        source: &dyn Source,
        documents: &[impl AsRef<str>],
        most: usize,
    ) -> Result<Self> {
        let files = source.files();
        let (config, tokenizer) = (files.config()?, files.tokenizer()?);
        let mut tokens = Vec::new();
        for document in documents {
            tokens.extend(tokenizer.encode(document.as_ref(), true)?);
        }
        let window = WINDOW.min(config.context);
        if most < window {
            let message =
                format!("at most {most} tokens to calibrate on, of which a sequence has {window}");
            return Err(Error::new(ErrorKind::Argument, message).hint("allow more tokens"));
        }
        tokens.truncate(most);
        Self::new(tokens, window)
    }

    /// Returns whether this is the text of [`Calibration::built_in`].
    pub fn is_built_in(&self) -> bool {
        self.built_in
    }

    /// Returns a description of the text for the metadata of a file.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "text": if self.is_built_in() { "built-in" } else { "given" },
            "checksum": self.checksum(),
            "tokens": self.tokens().len(),
            "window": self.window(),
        })
    }

    /// Returns the first 16 bytes of the SHA-256 of all tokens, in hexadecimal.
    ///
    /// Tokens are hashed as little-endian 32-bit numbers.
    pub fn checksum(&self) -> String {
        let mut hash = Sha256::new();
        self.tokens
            .iter()
            .for_each(|t| hash.update(t.to_le_bytes()));
        let digest = hash.finalize();
        digest[..DIGEST_BYTES]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Returns the documents of JSON lines: the string `text` of each line.
/// Empty lines are skipped.
///
/// Errors (`Malformed`): a line is not an object with a string `text`; the message has its number.
pub fn json_lines(lines: &str) -> Result<Vec<String>> {
    let numbered = (1..).zip(lines.lines());
    numbered
        .filter(|(_, line)| !line.trim().is_empty())
        .map(
            |(number, line)| match json::fields("line", line, &["text"]) {
                Ok(mut object) => match object.remove("text") {
                    Some(Value::String(text)) => Ok(text),
                    _ => Err(not_a_document(number)),
                },
                Err(e) => Err(not_a_document(number).with_source(e)),
            },
        )
        .collect()
}

fn not_a_document(line: usize) -> Error {
    let message = format!("line {line} is not a JSON object with a string 'text'");
    Error::new(ErrorKind::Malformed, message).hint("one document per line: {\"text\": \"...\"}")
}

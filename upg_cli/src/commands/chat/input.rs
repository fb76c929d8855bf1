//! The questions: lines of a terminal with editing and history, or of a pipe.
#![forbid(unsafe_code)]

use super::commands::NAMES;
use crate::terminal;
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::hint::{Hint, Hinter};
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper, Highlighter};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::{Error, ErrorKind, Result};

/// Questions that the history keeps.
const MAX_HISTORY: usize = 1000;

/// Marks at the begin and the end of a question of several lines.
const QUOTES: &str = "\"\"\"";

/// Source of the questions.
pub enum Lines {
    Terminal(Box<Prompt>),
    /// File or pipe, whose lines may be unbounded.
    Piped,
}

/// Line editor with a history.
pub struct Prompt {
    editor: Editor<Words, FileHistory>,
    /// File of the history; `None`: none is kept.
    history: Option<PathBuf>,
}

impl Lines {
    /// Opens standard input. A history that cannot be read starts empty.
    pub fn new(keeps_history: bool) -> Result<Self> {
        if !std::io::stdin().is_terminal() {
            return Ok(Self::Piped);
        }
        let config = Config::builder().max_history_size(MAX_HISTORY);
        let config = config.map_err(|e| input_error(&e))?.build();
        let mut editor = Editor::with_config(config).map_err(|e| input_error(&e))?;
        editor.set_helper(Some(Words));
        let history = history_file().filter(|_| keeps_history);
        if let Some(path) = &history {
            // There is none the first time.
            let _ = editor.load_history(path);
        }
        Ok(Self::Terminal(Box::new(Prompt { editor, history })))
    }

    /// Returns the next question; `None` at the end of input, and after Ctrl-C twice in a row: the
    /// first may have been meant for an answer that has just ended.
    ///
    /// A line that ends with a backslash goes on in the next one, and so does everything between
    /// two `"""`.
    pub fn next(&mut self) -> Result<Option<String>> {
        let Self::Terminal(prompt) = self else {
            return next_of_input();
        };
        // The line editor would lose what was typed during the answer, but for the first line.
        if is_typed_ahead() {
            let line = next_of_input()?;
            terminal::print(&format!("> {}\n", line.as_deref().unwrap_or_default()))?;
            return Ok(line);
        }
        let mut was_interrupted = false;
        loop {
            match prompt.editor.readline("> ") {
                Ok(line) => return Ok(Some(joined(&line))),
                Err(ReadlineError::Interrupted) if !was_interrupted => {
                    was_interrupted = true;
                    terminal::note("upg: Ctrl-D or /bye ends the chat, and so does Ctrl-C again");
                }
                Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(None),
                Err(e) => return Err(input_error(&e)),
            }
        }
    }

    /// Adds a question to the history. A failure is no reason to stop.
    pub fn keep(&mut self, question: &str) {
        if let Self::Terminal(prompt) = self {
            let _ = prompt.editor.add_history_entry(question);
            if let Some(path) = &prompt.history
                && prepare(path).is_ok()
            {
                let _ = prompt.editor.append_history(path);
            }
        }
    }
}

/// Reads the next question from standard input, without line editor.
fn next_of_input() -> Result<Option<String>> {
    let mut input = std::io::stdin().lock();
    let mut text = String::new();
    loop {
        let most = MAX_TEXT_BYTES.saturating_sub(text.len());
        match terminal::read_line(&mut input, most)? {
            None if text.is_empty() => return Ok(None),
            None => return Ok(Some(joined(&text))),
            Some(line) => text += &line,
        }
        if is_complete(&text) {
            return Ok(Some(joined(&text)));
        }
        text.push('\n');
    }
}

/// Returns whether the terminal has a whole line that nobody has read.
#[cfg(unix)]
fn is_typed_ahead() -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;

    let input = std::io::stdin();
    let mut line = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    poll(&mut line, PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

#[cfg(not(unix))]
fn is_typed_ahead() -> bool {
    false
}

/// Returns the file of the history, if the environment says where files of a user are.
fn history_file() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let state = match (folder("XDG_STATE_HOME"), folder("HOME")) {
        (Some(state), _) => PathBuf::from(state),
        (None, Some(home)) => Path::new(&home).join(".local/state"),
        (None, None) => PathBuf::from(folder("LOCALAPPDATA")?),
    };
    Some(state.join("upg").join("history"))
}

/// Creates the history, which only its owner may read.
fn prepare(path: &Path) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).map(drop)
}

/// Returns whether a question ends here.
fn is_complete(text: &str) -> bool {
    match text.trim_start().strip_prefix(QUOTES) {
        Some(rest) => rest.contains(QUOTES),
        None => !text.ends_with('\\'),
    }
}

/// Returns a question without the marks of several lines.
fn joined(text: &str) -> String {
    if let Some(rest) = text.trim_start().strip_prefix(QUOTES) {
        let (quoted, after) = rest.split_once(QUOTES).unwrap_or((rest, ""));
        return format!("{}{after}", quoted.trim_matches('\n'));
    }
    text.replace("\\\n", "\n")
}

fn input_error(e: &ReadlineError) -> Error {
    Error::new(ErrorKind::Io, format!("cannot read the terminal: {e}"))
}

/// Answers to the questions of the line editor about a line.
#[derive(Helper, Highlighter)]
struct Words;

/// Words behind the cursor that are no part of the line.
struct Reminder(&'static str);

impl Hint for Reminder {
    fn display(&self) -> &str {
        self.0
    }

    fn completion(&self) -> Option<&str> {
        None
    }
}

impl Hinter for Words {
    type Hint = Reminder;

    fn hint(&self, line: &str, position: usize, _: &Context<'_>) -> Option<Reminder> {
        let is_open = position == line.len() && line.contains('\n') && !is_complete(line);
        let is_quoted = line.trim_start().starts_with(QUOTES);
        (is_open && is_quoted).then_some(Reminder("  (\"\"\" ends the question, Ctrl-C drops it)"))
    }
}

impl Validator for Words {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match is_complete(context.input()) {
            true => ValidationResult::Valid(None),
            false => ValidationResult::Incomplete,
        })
    }
}

impl Completer for Words {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let start = line.get(..position).unwrap_or_default();
        let fitting = |name: &&&str| start.starts_with('/') && name.starts_with(start);
        let names = NAMES.iter().filter(fitting);
        Ok((0, names.map(|name| (*name).to_owned()).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_of_several_lines_end_where_they_say() {
        for (text, expected) in [
            ("hi", Some("hi")),
            ("a\\", None),
            ("a\\\nb", Some("a\nb")),
            ("\"\"\"a", None),
            ("\"\"\"\na\nb\n\"\"\"", Some("a\nb")),
            ("\"\"\"a\"\"\" and b", Some("a and b")),
            ("  \"\"\"x\\\ny\"\"\"", Some("x\\\ny")),
        ] {
            let found = is_complete(text).then(|| joined(text));
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }
}

//! The commands of a conversation: lines that begin with a slash.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use upg_kernel::inference::SamplingOptions;
use upg_kernel::{Error, ErrorKind, Result};

/// Names of the commands, for completion.
pub const NAMES: [&str; 11] = [
    "/help", "/set", "/system", "/show", "/save", "/load", "/regen", "/undo", "/clear", "/bye",
    "/exit",
];

pub const HELP: &str = "\
/set NAME VALUE   change an option of the answers; /show lists them
/system TEXT      change the system message; without TEXT there is none
/show             the model, the options and how full the context is
/save FILE        write the conversation to a JSON file
/load FILE        continue a conversation that was saved
/regen            answer the last question again
/undo             forget the last question and its answer
/clear            start again
/bye              end (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one, and
so does what stands between two \"\"\". A question that begins with a slash gets
two: //etc.
";

/// Meaning of a line.
#[derive(Debug, PartialEq)]
pub enum Line {
    Nothing,
    Question(String),
    Help,
    Set(String, String),
    System(Option<String>),
    Show,
    Save(PathBuf),
    Load(PathBuf),
    Again,
    Undo,
    Clear,
    End,
}

impl Line {
    /// Reads a line. Errors (`Argument`): an unknown command, or one without its argument.
    pub fn parse(line: &str) -> Result<Self> {
        let line = line.trim();
        if let Some(question) = line.strip_prefix("//") {
            return Ok(Self::Question(format!("/{question}")));
        }
        if !line.starts_with('/') {
            return Ok(match line {
                "" => Self::Nothing,
                question => Self::Question(question.to_owned()),
            });
        }
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        let needed = |usage: &str| match rest {
            "" => Err(usage_error(usage)),
            rest => Ok(rest),
        };
        Ok(match name {
            "/help" | "/?" => Self::Help,
            "/set" => {
                let usage = "/set NAME VALUE, for example /set temperature 0.7";
                let pair = needed(usage)?.split_once(|c: char| c == '=' || c.is_whitespace());
                let (name, value) = pair.ok_or_else(|| usage_error(usage))?;
                Self::Set(name.to_owned(), value.trim().to_owned())
            }
            "/system" => Self::System((!rest.is_empty()).then(|| rest.to_owned())),
            "/show" => Self::Show,
            "/save" => Self::Save(path(needed("/save FILE")?)),
            "/load" => Self::Load(path(needed("/load FILE")?)),
            "/regen" | "/retry" => Self::Again,
            "/undo" => Self::Undo,
            "/clear" => Self::Clear,
            "/bye" | "/exit" | "/quit" => Self::End,
            unknown => {
                let message = format!("no command '{unknown}'");
                let hint = format!("/help lists them; //{} sends the text", &unknown[1..]);
                return Err(Error::new(ErrorKind::Argument, message).hint(hint));
            }
        })
    }
}

/// Returns a path in which `~/` stands for the home folder.
fn path(text: &str) -> PathBuf {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    match (text.strip_prefix("~/"), home) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => text.into(),
    }
}

fn usage_error(usage: &str) -> Error {
    Error::new(ErrorKind::Argument, format!("usage: {usage}"))
}

/// Options that `/set` changes, in the order of `/show`.
const OPTIONS: [&str; 9] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "max_tokens",
];

/// Options of the answers.
#[derive(Debug, Clone)]
pub struct Options {
    pub sampling: SamplingOptions,
    /// `None`: until the answer ends.
    pub max_tokens: Option<usize>,
}

impl Options {
    /// Changes an option. Errors (`Argument`): an unknown name, or a value that it cannot have.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let name = name.replace('-', "_");
        let wrong = || {
            let message = format!("'{value}' is no value of {name}");
            Error::new(ErrorKind::Argument, message)
        };
        let number = || value.parse::<f32>().map_err(|_| wrong());
        let mut changed = self.clone();
        let sampling = &mut changed.sampling;
        match name.as_str() {
            "temperature" | "temp" => sampling.temperature = number()?,
            "top_k" => sampling.top_k = value.parse().map_err(|_| wrong())?,
            "top_p" => sampling.top_p = number()?,
            "min_p" => sampling.min_p = number()?,
            "repetition_penalty" | "repeat_penalty" => sampling.repetition_penalty = number()?,
            "frequency_penalty" => sampling.frequency_penalty = number()?,
            "presence_penalty" => sampling.presence_penalty = number()?,
            "seed" => sampling.seed = value.parse().map_err(|_| wrong())?,
            "max_tokens" => {
                changed.max_tokens = match value {
                    "none" => None,
                    value => {
                        let most = value.parse().ok().filter(|n| *n > 0);
                        Some(most.ok_or_else(wrong)?)
                    }
                }
            }
            _ => {
                let message = format!("no option '{name}'");
                let hint = format!("options: {}", OPTIONS.join(" "));
                return Err(Error::new(ErrorKind::Argument, message).hint(hint));
            }
        }
        changed.sampling.check()?;
        *self = changed;
        Ok(())
    }

    /// Returns a line for each option.
    pub fn show(&self) -> String {
        let s = &self.sampling;
        let max_tokens = self.max_tokens.map_or("none".into(), |n| n.to_string());
        let values = [
            s.temperature.to_string(),
            s.top_k.to_string(),
            s.top_p.to_string(),
            s.min_p.to_string(),
            s.repetition_penalty.to_string(),
            s.frequency_penalty.to_string(),
            s.presence_penalty.to_string(),
            s.seed.to_string(),
            max_tokens,
        ];
        let lines = OPTIONS.iter().zip(values);
        lines
            .map(|(name, value)| format!("  {name:18} {value}\n"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn lines_are_questions_or_commands() {
        let question = |text: &str| Line::Question(text.into());
        for (line, expected) in [
            ("", Line::Nothing),
            ("  hi there ", question("hi there")),
            ("//etc/passwd has what?", question("/etc/passwd has what?")),
            ("/help", Line::Help),
            ("/set top-k  20", Line::Set("top-k".into(), "20".into())),
            ("/system Be brief. ", Line::System(Some("Be brief.".into()))),
            ("/system", Line::System(None)),
            ("/save a b.json", Line::Save("a b.json".into())),
            ("/quit", Line::End),
        ] {
            assert_eq!(Line::parse(line).unwrap(), expected, "{line}");
        }
        for line in ["/etc/passwd", "/set", "/set top_k", "/save", "/load  "] {
            let e = Line::parse(line).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Argument, "{line}");
        }
        for name in NAMES {
            let known = Line::parse(&format!("{name} a b"));
            assert!(known.is_ok(), "{name}");
        }
    }

    #[test]
    fn options_are_set_within_their_range() {
        let mut options = Options {
            sampling: SamplingOptions::chat(),
            max_tokens: None,
        };
        for name in OPTIONS {
            options.set(name, "1").unwrap();
            assert!(options.set(name, "x").is_err(), "{name}");
        }
        assert!(options.show().lines().all(|line| line.ends_with(" 1")));
        options.set("max_tokens", "none").unwrap();
        assert_eq!(options.max_tokens, None);
        assert!(options.set("top_p", "7").is_err());
        assert_eq!(options.sampling.top_p, 1.0);
        assert!(options.set("colour", "1").is_err());
    }
}

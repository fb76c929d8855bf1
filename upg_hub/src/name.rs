//! Names of models: `user/model`, `user/model@revision`, `user/model:Q4_K_M`.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use upg_kernel::{Error, ErrorKind, Result};

/// Revision without one in the name.
pub(crate) const DEFAULT_REVISION: &str = "main";

/// Maximum bytes of `user/model`, as on the Hub.
const MAX_REPOSITORY: usize = 96;

/// Maximum bytes of a revision and of a quantization.
const MAX_PART: usize = 128;

/// Name of a model on the Hub. A value is safe as part of a path and of an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ModelName {
    repository: String,
    quantization: Option<String>,
    revision: Option<String>,
}

impl ModelName {
    /// Returns `user/model`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the branch, tag or commit; `main` by default.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// Returns the part after the colon, which chooses a GGUF file, as `Q4_K_M`.
    pub fn quantization(&self) -> Option<&str> {
        self.quantization.as_deref()
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(quantization) = &self.quantization {
            write!(f, ":{quantization}")?;
        }
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ModelName {
    type Err = Error;

    /// Parses a name. Errors: `Argument`, which shows what a name looks like.
    fn from_str(text: &str) -> Result<Self> {
        parse(text).ok_or_else(|| {
            Error::new(
                ErrorKind::Argument,
                format!("'{text}' is not a name of a model"),
            )
            .hint(
                "names look like user/model, user/model@revision or user/model:Q4_K_M, as on \
                 https://huggingface.co",
            )
        })
    }
}

fn parse(text: &str) -> Option<ModelName> {
    let (text, revision) = match text.split_once('@') {
        Some((text, revision)) => (text, Some(revision)),
        None => (text, None),
    };
    let (repository, quantization) = match text.split_once(':') {
        Some((repository, quantization)) => (repository, Some(quantization)),
        None => (text, None),
    };
    let (user, model) = repository.split_once('/')?;
    let is_sound = repository.len() <= MAX_REPOSITORY
        && is_component(user)
        && is_component(model)
        && revision.is_none_or(is_revision)
        && quantization.is_none_or(|q| q.len() <= MAX_PART && is_component(q));
    is_sound.then(|| ModelName {
        repository: repository.to_owned(),
        quantization: quantization.map(str::to_owned),
        // The default is not part of a name, so that both spellings are the same one.
        revision: revision
            .filter(|r| *r != DEFAULT_REVISION)
            .map(str::to_owned),
    })
}

/// Returns whether `text` is a user, a model or a quantization, by the rules of the Hub.
///
/// `--` separates components in the names of cache folders.
fn is_component(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_edge = |c: char| matches!(c, '-' | '.');
    !text.is_empty()
        && text.chars().all(is_allowed)
        && !text.starts_with(is_edge)
        && !text.ends_with(is_edge)
        && !text.contains("--")
        && !text.contains("..")
        && !text.ends_with(".git")
}

/// Returns whether `text` can be a branch, tag or commit, such as `refs/pr/1`.
fn is_revision(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+');
    text.len() <= MAX_PART
        && text.split('/').all(|part| {
            !part.is_empty()
                && part.chars().all(is_allowed)
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
        })
}

/// Returns whether `text` is the full hash of a commit.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Returns whether `text`, sent by a server, is the path of a file inside of its repository.
pub(crate) fn is_file(text: &str) -> bool {
    let is_bad = |c: char| c.is_control() || matches!(c, '\\' | ':');
    text.len() <= 1024
        && !text.contains(is_bad)
        && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn names_have_their_parts() {
        let name: ModelName = "HuggingFaceTB/SmolLM2-135M-Instruct".parse().unwrap();
        assert_eq!(name.repository(), "HuggingFaceTB/SmolLM2-135M-Instruct");
        assert_eq!((name.revision(), name.quantization()), ("main", None));
        let full = "a_b/c.d-e:Q4_K_M@refs/pr/1";
        let name: ModelName = full.parse().unwrap();
        assert_eq!(name.repository(), "a_b/c.d-e");
        assert_eq!(name.revision(), "refs/pr/1");
        assert_eq!(name.quantization(), Some("Q4_K_M"));
        assert_eq!(name.to_string(), full);
    }

    #[test]
    fn no_name_leaves_its_folder() {
        for text in [
            "",
            "model",
            "/model",
            "user/",
            "a/b/c",
            "../model",
            "user/..",
            "./model",
            "user/.",
            "user/.hidden",
            "user/mo del",
            "user/mo..del",
            "user/a--b",
            "user/-b",
            "user/b-",
            "user\\model/x",
            "user/model.git",
            "user/model@",
            "user/model@../x",
            "user/model@a/../b",
            "user/model@/etc",
            "user/model@a//b",
            "user/model@-x",
            "user/model@a?b",
            "user/model:",
            "user/model:../q",
            "user/model:a/b",
            "user/m\u{0}",
            "user/m\u{e9}",
            "C:/model",
            "~/model",
        ] {
            let e = text.parse::<ModelName>().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Argument, "{text}");
            assert!(e.to_string().contains("user/model@revision"), "{e}");
        }
        assert!(
            format!("u/{}", "m".repeat(95))
                .parse::<ModelName>()
                .is_err()
        );
    }

    #[test]
    fn files_of_servers_stay_inside() {
        for good in ["config.json", "Q4/a-00001-of-00002.gguf", "a b.gguf", "..a"] {
            assert!(is_file(good), "{good}");
        }
        for bad in [
            "", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "C:a", "a\nb",
        ] {
            assert!(!is_file(bad), "{bad}");
        }
        assert!(is_commit(&"0f".repeat(20)));
        assert!(!is_commit("main") && !is_commit(&"0F".repeat(20)));
    }
}

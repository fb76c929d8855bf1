//! Texts of a model directory: config, tokenizer and chat template.
#![forbid(unsafe_code)]

use super::ModelConfig;
#[cfg(feature = "text")]
use super::chat_template::{ChatTemplate, MAX_TEMPLATE_BYTES};
#[cfg(feature = "text")]
use super::tokenizer::{SpecialIds, Tokenizer};
use super::tokenizer_config::default_template;
use crate::error::{Error, ErrorKind, Result};
use crate::files;
#[cfg(feature = "text")]
use crate::format::check_tokenizer_bytes;
use crate::format::{MAX_TOKENIZER_BYTES, TOKENIZER, json};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::ErrorKind as IoKind;
use std::path::Path;

/// Maximum bytes of a text other than the tokenizer; real ones stay under 1 MB.
const MAX_TEXT: u64 = 16 << 20;

/// Files of a directory that are not weights.
pub const TEXTS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// Texts that accompany the weights, with their names in transformers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelFiles {
    /// `config.json`, a JSON object; rebuilt from the metadata for GGUF. Without it a model
    /// cannot run.
    pub config_json: Option<String>,
    /// `generation_config.json`.
    pub generation_config_json: Option<String>,
    /// `tokenizer.json`.
    pub tokenizer_json: Option<Vec<u8>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config_json: Option<String>,
    /// `special_tokens_map.json`.
    pub special_tokens_map_json: Option<String>,
    /// Jinja text of the default chat template.
    pub chat_template: Option<String>,
}

impl ModelFiles {
    /// Reads the texts of a directory.
    ///
    /// The chat template may be in the config of the tokenizer. Errors: `Io`; `Malformed` if a text
    /// is not UTF-8, or not JSON where required; `TooLarge` above [`MAX_TOKENIZER_BYTES`], or 16
    /// MiB for all texts except the tokenizer.
    pub fn read(dir: &Path) -> Result<Self> {
        let text = |name: &str| read_text(&dir.join(name), MAX_TEXT);
        let tokenizer_config_json = text("tokenizer_config.json")?;
        let mut chat_template = text("chat_template.jinja")?;
        if let (None, Some(json)) = (&chat_template, &tokenizer_config_json) {
            const NAME: &str = "tokenizer_config.json";
            let config = json::fields(NAME, json, &["chat_template"]);
            let config = config.map_err(|e| e.at(dir.join(NAME)))?;
            chat_template = default_template(&config)?.map(str::to_owned);
        }
        Ok(Self {
            config_json: text("config.json")?,
            generation_config_json: text("generation_config.json")?,
            tokenizer_json: read_capped(&dir.join(TOKENIZER), MAX_TOKENIZER_BYTES as u64)?,
            tokenizer_config_json,
            special_tokens_map_json: text("special_tokens_map.json")?,
            chat_template,
        })
    }

    /// Returns the texts that are metadata of a UPG file, by their keys.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let texts = [
            ("config.json", &self.config_json),
            ("generation_config.json", &self.generation_config_json),
            ("tokenizer_config.json", &self.tokenizer_config_json),
            ("special_tokens_map.json", &self.special_tokens_map_json),
            ("chat_template", &self.chat_template),
        ];
        let there = texts.into_iter();
        there
            .filter_map(|(key, text)| Some((key.to_owned(), text.clone()?)))
            .collect()
    }

    /// Returns the validated configuration.
    ///
    /// Errors: `Missing` if there is none; those of [`ModelConfig::from_json`].
    pub fn config(&self) -> Result<ModelConfig> {
        let config_json = self.config_json.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Missing, "the model has no config.json")
                .hint("put it beside the weights")
        })?;
        ModelConfig::from_json(config_json, self.generation_config_json.as_deref())
    }
}

#[cfg(feature = "text")]
impl ModelFiles {
    /// Returns the tokenizer.
    ///
    /// Errors: `Missing` if there is none; those of [`Tokenizer::from_json`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let json = self.tokenizer_json.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Missing, "the model has no tokenizer")
                .hint("text input needs one: put tokenizer.json beside the weights")
        })?;
        let special = SpecialIds::from(&self.config()?);
        Tokenizer::from_json(json, self.tokenizer_config_json.as_deref(), special)
    }

    /// Checks the texts for everything that a reader of the finished file would refuse.
    ///
    /// A model without config is only weights; then only the size of the tokenizer is checked.
    ///
    /// Ignored settings are warnings in the log. So is an invalid template, because the model works
    /// without.
    ///
    /// Cost: loads the tokenizer. Errors: those of [`ModelFiles::config`] and
    /// [`Tokenizer::from_json`]; `Invalid` if the begin or end of a text has no embedding;
    /// `TooLarge` for a chat template above [`MAX_TEMPLATE_BYTES`].
    pub fn check(&self) -> Result<()> {
        let template = self.chat_template.as_deref();
        if let Some(len) = template.map(str::len).filter(|&n| n > MAX_TEMPLATE_BYTES) {
            let message =
                format!("the chat template has {len} bytes, at most {MAX_TEMPLATE_BYTES}");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        match (&self.config_json, &self.tokenizer_json) {
            (Some(_), tokenizer_json) => {
                let config = self.config()?;
                config.notes.iter().for_each(|note| log::warn!("{note}"));
                if tokenizer_json.is_some() {
                    let tokenizer = self.tokenizer().map_err(no_tokenizer)?;
                    check_ids(&tokenizer, config.vocab_size)?;
                }
            }
            (None, Some(json)) => check_tokenizer_bytes(json.len())?,
            (None, None) => {}
        }
        if let Some(Err(e)) = template.map(|text| ChatTemplate::new(text, None, None)) {
            log::warn!(
                "chat is not available with this model: its chat template cannot be read: {e}"
            );
        }
        Ok(())
    }
}

/// Checks that the embeddings, of `rows` rows, have the ids that every text gets.
///
/// Tokens without a row are a warning in the log, because few texts have them. Errors (`Invalid`):
/// the begin or end of a text has no row.
#[cfg(feature = "text")]
pub(super) fn check_ids(tokenizer: &Tokenizer, rows: usize) -> Result<()> {
    let around = tokenizer.encode("", true)?;
    if let Some(id) = around.iter().find(|id| **id as usize >= rows) {
        let message = format!("the tokenizer adds id {id} to every text, 'vocab_size' is {rows}");
        return Err(Error::new(ErrorKind::Invalid, message)
            .hint("pass the tokenizer and the config that belong to the weights"));
    }
    if tokenizer.vocab_size() > rows {
        let tokens = tokenizer.vocab_size();
        log::warn!("the tokenizer has {tokens} tokens, the model {rows}: texts with the rest fail");
    }
    Ok(())
}

/// Adds to the error `e` of a tokenizer how to compress the model without it.
#[cfg(feature = "text")]
fn no_tokenizer(e: Error) -> Error {
    Error::new(e.kind(), e.to_string())
        .with_source(e)
        .hint("the weights alone can be compressed: pass a copy of the model's directory without tokenizer.json")
}

/// Parses `text`, the content of `path`, as a JSON object.
///
/// Errors: those of [`json::value`]; `Malformed` if it is not an object.
pub fn parse_object(text: &str, path: &Path) -> Result<Value> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let value = json::value(&name, text).map_err(|e| e.at(path))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(Error::new(ErrorKind::Malformed, "not a JSON object").at(path)),
    }
}

/// Reads a UTF-8 file of at most `cap` bytes; `None` if there is none.
///
/// Errors: `Io`; `TooLarge`; `Malformed` if it is not UTF-8.
pub fn read_text(path: &Path, cap: u64) -> Result<Option<String>> {
    let Some(bytes) = read_capped(path, cap)? else {
        return Ok(None);
    };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| Error::new(ErrorKind::Malformed, "not UTF-8 text").at(path))
}

/// Reads a whole file of at most `cap` bytes; `None` if there is none.
fn read_capped(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    let io = |e| Error::io("cannot read", path, e);
    let (file, metadata) = match files::open_regular(path) {
        Err(e) if e.kind() == IoKind::NotFound => {
            check_link(path)?;
            return Ok(None);
        }
        opened => opened.map_err(io)?,
    };
    match files::read_at_most(file, metadata.len(), cap).map_err(io)? {
        Some(bytes) => {
            check_stand_in(path, &bytes)?;
            Ok(Some(bytes))
        }
        None => Err(Error::new(ErrorKind::TooLarge, format!("more than {cap} bytes")).at(path)),
    }
}

/// Checks that `path` is not a link to a missing file. Errors (`Missing`): it is.
pub fn check_link(path: &Path) -> Result<()> {
    match std::fs::read_link(path) {
        Ok(target) if std::fs::metadata(path).is_err() => Err(Error::new(
            ErrorKind::Missing,
            format!("this link points to {}, which is missing", target.display()),
        )
        .at(path)
        .hint("download the model again, or copy it with what its links point to (cp -rL)")),
        _ => Ok(()),
    }
}

/// Longest file that is taken for a stand-in of another one, in bytes.
pub const MAX_STAND_IN: usize = 1024;

/// Checks that `bytes`, those of the file `path`, are not a stand-in for the real file.
///
/// Errors (`Malformed`): they are a git-lfs pointer, the path of a link, or a web page.
pub fn check_stand_in(path: &Path, bytes: &[u8]) -> Result<()> {
    let start = &bytes[..bytes.len().min(MAX_STAND_IN)];
    let start = match std::str::from_utf8(start) {
        Ok(start) => start,
        Err(e) => std::str::from_utf8(&start[..e.valid_up_to()]).unwrap_or_default(),
    };
    let line = start.trim();
    let is_whole = bytes.len() <= MAX_STAND_IN;
    let is_path = is_whole && (line.starts_with("../") || line.starts_with("./"));
    let (found, hint) = if is_whole && line.starts_with("version https://git-lfs") {
        (
            "a git-lfs pointer, not the file itself".to_owned(),
            "fetch the file: git lfs pull",
        )
    } else if is_path && !line.contains(char::is_control) {
        let target = json::cut(line).escape_debug().to_string();
        (
            format!("the text of a link to '{target}', not the file itself"),
            "download the model again: a copy without links has lost the file",
        )
    } else if line
        .get(..9)
        .is_some_and(|s| s.eq_ignore_ascii_case("<!doctype"))
        || line
            .get(..5)
            .is_some_and(|s| s.eq_ignore_ascii_case("<html"))
    {
        (
            "a web page, not the file itself".to_owned(),
            "download the file again; the page may say why it was not sent",
        )
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::Malformed, format!("this is {found}"))
        .at(path)
        .hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n";

    #[test]
    fn stand_ins_are_named() {
        let check = |text: &str| check_stand_in(Path::new("m/tokenizer.json"), text.as_bytes());
        for (text, cause, mend) in [
            (POINTER, "a git-lfs pointer", "git lfs pull"),
            (
                "../../blobs/0f\n",
                "a link to '../../blobs/0f'",
                "download the model again",
            ),
            (
                "\n<!DOCTYPE html><p>",
                "a web page",
                "download the file again",
            ),
            ("<html><p>", "a web page", "download the file again"),
        ] {
            let e = check(text).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Malformed);
            let e = e.to_string();
            assert!(e.starts_with("m/tokenizer.json: this is "), "{e}");
            assert!(e.contains(cause) && e.contains(mend), "{e}");
        }
        let long = format!("../{}", "x".repeat(MAX_STAND_IN));
        for text in ["{}", "", "..", "../a\n{% if x %}", &long, "\u{1f600}\0"] {
            check(text).unwrap();
        }
        check_stand_in(Path::new("m"), &[0xff; 2000]).unwrap();
    }

    #[cfg(feature = "text")]
    #[test]
    fn the_begin_of_a_text_has_an_embedding() {
        let check = |vocab_size: usize, tokenizer_config: &str| {
            let config = serde_json::json!({
                "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 8,
                "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                "max_position_embeddings": 8,
            });
            let tokenizer = br#"{"version": "1.0", "added_tokens": [{"id": 1, "content": "<s>",
                "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true}],
                "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1}, "merges": []}}"#;
            let files = ModelFiles {
                config_json: Some(config.to_string()),
                tokenizer_json: Some(tokenizer.to_vec()),
                tokenizer_config_json: Some(tokenizer_config.to_owned()),
                ..ModelFiles::default()
            };
            files.check()
        };
        let begins = r#"{"bos_token": "<s>", "add_bos_token": true}"#;
        check(2, begins).unwrap();
        check(1, r#"{"bos_token": "<s>", "add_bos_token": false}"#).unwrap();
        let e = check(1, begins).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Invalid);
        assert!(
            e.to_string()
                .contains("adds id 1 to every text, 'vocab_size' is 1"),
            "{e}"
        );
    }

    #[test]
    fn texts_of_a_directory_are_the_files_themselves() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            let path = dir.path().join(name);
            std::fs::write(&path, POINTER).unwrap();
            let e = ModelFiles::read(dir.path()).unwrap_err().to_string();
            assert!(e.contains(name) && e.contains("git lfs pull"), "{e}");
            std::fs::remove_file(&path).unwrap();
            #[cfg(unix)]
            {
                std::os::unix::fs::symlink("../none", &path).unwrap();
                let e = ModelFiles::read(dir.path()).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Missing);
                assert!(
                    e.to_string()
                        .contains("points to ../none, which is missing"),
                    "{e}"
                );
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
}

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
    /// Cost: loads the tokenizer. Errors: those of [`ModelFiles::config`] and
    /// [`Tokenizer::from_json`]; `TooLarge` for a chat template above [`MAX_TEMPLATE_BYTES`]. An
    /// invalid template is a warning in the log, because the model works without.
    pub fn check(&self) -> Result<()> {
        let template = self.chat_template.as_deref();
        if let Some(len) = template.map(str::len).filter(|&n| n > MAX_TEMPLATE_BYTES) {
            let message =
                format!("the chat template has {len} bytes, at most {MAX_TEMPLATE_BYTES}");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        match (&self.config_json, &self.tokenizer_json) {
            (Some(_), tokenizer_json) => {
                self.config()?;
                if tokenizer_json.is_some() {
                    self.tokenizer().map_err(no_tokenizer)?;
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
        Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
        opened => opened.map_err(io)?,
    };
    match files::read_at_most(file, metadata.len(), cap).map_err(io)? {
        Some(bytes) => Ok(Some(bytes)),
        None => Err(Error::new(ErrorKind::TooLarge, format!("more than {cap} bytes")).at(path)),
    }
}

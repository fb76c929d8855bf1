//! Settings from the environment variables of `huggingface_hub`.
#![forbid(unsafe_code)]

use std::env;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use upg_kernel::inference::model_dir::read_text;
use upg_kernel::{Error, ErrorKind, Result};

/// Server without `HF_ENDPOINT`.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Maximum bytes of a file with a token; a real one has 37.
const MAX_TOKEN: u64 = 4096;

/// Places, server and limits of a [`Hub`](crate::Hub).
#[derive(Clone)]
#[non_exhaustive]
pub struct Settings {
    /// Folder of the cache, which has the layout of `huggingface_hub`.
    pub cache: PathBuf,
    /// Address of the server, without a slash at its end.
    pub endpoint: String,
    /// Token, which is sent to `endpoint` only.
    pub token: Option<String>,
    /// Uses what is in the cache and no network.
    pub offline: bool,
    /// Maximum time without a byte from the server.
    pub timeout: Duration,
    /// Maximum number of attempts in sequence without a new byte.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub backoff: Duration,
    /// Flag that ends a download, which can be resumed.
    pub interrupt: Option<Arc<AtomicBool>>,
}

impl Settings {
    /// Creates settings for the default server, without a token.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self {
            cache: cache.into(),
            endpoint: DEFAULT_ENDPOINT.to_owned(),
            token: None,
            offline: false,
            timeout: Duration::from_secs(20),
            attempts: 5,
            backoff: Duration::from_millis(500),
            interrupt: None,
        }
    }

    /// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`, with the meaning that they have in `huggingface_hub`.
    ///
    /// Errors: `Argument` if there is no home folder, or a token has characters that no token has;
    /// `Io` if the file of the token cannot be read.
    pub fn from_env() -> Result<Self> {
        let home = match variable("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => user_cache()?.join("huggingface"),
        };
        let cache = variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let mut settings = Self::new(cache);
        if let Some(endpoint) = variable("HF_ENDPOINT") {
            endpoint
                .trim_end_matches('/')
                .clone_into(&mut settings.endpoint);
        }
        settings.token = token(&home)?;
        settings.offline = variable("HF_HUB_OFFLINE").is_some_and(|v| is_true(&v));
        Ok(settings)
    }
}

/// Returns the folder of the caches of this user: `$XDG_CACHE_HOME` or `~/.cache`.
///
/// Errors (`Argument`): there is no home folder.
pub(crate) fn user_cache() -> Result<PathBuf> {
    if let Some(folder) = variable("XDG_CACHE_HOME") {
        return Ok(folder.into());
    }
    let home = env::home_dir().filter(|home| !home.as_os_str().is_empty());
    home.map(|home| home.join(".cache")).ok_or_else(|| {
        Error::new(
            ErrorKind::Argument,
            "no home folder for the cache of models",
        )
        .hint("name one in HF_HOME and UPG_CACHE")
    })
}

/// Returns an environment variable that is set and not empty.
pub(crate) fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

fn is_true(value: &str) -> bool {
    matches!(
        value.trim().to_uppercase().as_str(),
        "1" | "ON" | "YES" | "TRUE"
    )
}

fn token(home: &Path) -> Result<Option<String>> {
    let token = match variable("HF_TOKEN") {
        Some(token) => Some(token),
        None => {
            let path = variable("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            read_text(&path, MAX_TOKEN)?
        }
    };
    let token = token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty());
    match token {
        // The message does not repeat a secret.
        Some(token) if !token.bytes().all(|b| b.is_ascii_graphic()) => Err(Error::new(
            ErrorKind::Argument,
            "the token of Hugging Face has characters that no token has",
        )
        .hint("set HF_TOKEN to one from https://huggingface.co/settings/tokens")),
        token => Ok(token),
    }
}

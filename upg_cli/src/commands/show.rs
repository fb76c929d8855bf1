//! `upg show`.
#![forbid(unsafe_code)]

use super::list;
use crate::cli::ShowArgs;
use crate::terminal;
use upg_hub::{CompressedCache, Hub};
use upg_kernel::{Error, ErrorKind, Result};

pub fn run(args: &ShowArgs) -> Result<()> {
    let entries = list::all(&Hub::from_env()?, &CompressedCache::from_env()?)?;
    let found = entries.iter().filter(|e| e.is_called(&args.name));
    let text: String = found.map(list::Entry::details).collect();
    match text.is_empty() {
        true => Err(not_cached(&args.name)),
        false => terminal::print(&text),
    }
}

/// Returns the error for a model that is in no cache.
pub fn not_cached(name: &str) -> Error {
    let message = format!("'{name}' is in no cache");
    Error::new(ErrorKind::Missing, message).hint("`upg list` shows what is")
}

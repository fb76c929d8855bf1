//! `upg rm`.
#![forbid(unsafe_code)]

use super::list::{self, Entry, Found};
use super::originals::confirm;
use super::show::not_cached;
use crate::cli::RmArgs;
use crate::terminal;
use std::io::IsTerminal;
use upg_hub::{CompressedCache, Hub};
use upg_kernel::{Error, ErrorKind, Result};

pub fn run(args: &RmArgs) -> Result<()> {
    let (hub, cache) = (Hub::from_env()?, CompressedCache::from_env()?);
    let entries = list::all(&hub, &cache)?;
    let is_removed = |e: &&Entry| !args.keep_original || matches!(e.found, Found::Compressed(_));
    // Everything is checked before anything is removed.
    for name in &args.names {
        let mut found = entries
            .iter()
            .filter(|e| e.is_called(name))
            .filter(is_removed);
        if found.next().is_none() {
            return Err(not_cached(name));
        }
    }
    let is_named = |e: &&Entry| args.names.iter().any(|name| e.is_called(name));
    let found: Vec<_> = entries.iter().filter(is_named).filter(is_removed).collect();
    for entry in &found {
        if let Found::Original(_) = entry.found {
            ask(entry, args.yes)?;
        }
    }
    for entry in found {
        match &entry.found {
            Found::Original(repository) => drop(hub.cache().remove(&repository.name)?),
            Found::Compressed(file) => cache.remove(file)?,
        }
        let freed = terminal::bytes(entry.bytes());
        terminal::print(&format!("{}: removed, {freed}\n", entry.path().display()))?;
    }
    Ok(())
}

/// Asks before an original is removed, which other programs may use.
fn ask(entry: &Entry, yes: bool) -> Result<()> {
    let size = terminal::bytes(entry.bytes());
    if yes {
        return Ok(());
    }
    if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() {
        let question = format!(
            "remove the original {} ({size}), which other programs may use",
            entry.name()
        );
        return confirm(&question, false);
    }
    let message = format!(
        "{} ({size}) is an original, which other programs may use",
        entry.name()
    );
    Err(Error::new(ErrorKind::Argument, message).hint("add --yes or --keep-original"))
}

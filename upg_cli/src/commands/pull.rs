//! `upg pull`, and downloads for other commands.
#![forbid(unsafe_code)]

use crate::cli::PullArgs;
use crate::{signals, terminal};
use indicatif::ProgressBar;
use upg_hub::{CachedModel, Hub, Listing, ModelName, Progress, Settings};
use upg_kernel::{Error, Result};

pub fn run(args: &PullArgs) -> Result<()> {
    let names: Vec<ModelName> = args
        .names
        .iter()
        .map(|n| n.parse())
        .collect::<Result<_>>()?;
    let hub = hub(settings(args.offline)?)?;
    for name in names {
        let model = match hub.cached(&name)? {
            Some(model) if hub.settings().offline => model,
            // Also if it is in the cache: its branch may have another commit now.
            _ => pull(&hub, &hub.look_up(&name)?)?,
        };
        terminal::print(&format!("{}\n", model.path.display()))?;
    }
    Ok(())
}

/// Returns the settings of the environment. Errors: those of [`Settings::from_env`].
pub fn settings(offline: bool) -> Result<Settings> {
    let mut settings = Settings::from_env()?;
    settings.offline |= offline;
    Ok(settings)
}

/// Returns the Hub; from then on a signal ends a download cleanly. Errors: those of [`Hub::new`].
pub fn hub(mut settings: Settings) -> Result<Hub> {
    settings.interrupt = Some(signals::interrupt_flag()?);
    Hub::new(settings)
}

/// Downloads what is missing, with a bar. Errors: those of [`Hub::pull`].
pub fn pull(hub: &Hub, listing: &Listing) -> Result<CachedModel> {
    let template =
        "{bar:30} {percent:>3}%  {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left  {msg}";
    let progress = Bar(terminal::bar(0, template));
    let pulled = hub.pull(listing, &progress);
    progress.0.finish_and_clear();
    pulled
}

struct Bar(ProgressBar);

impl Progress for Bar {
    fn start(&self, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            self.0.set_length(bytes);
        }
    }

    fn file(&self, name: &str) {
        self.0.set_message(terminal::label(name));
    }

    fn position(&self, bytes: u64) {
        self.0.set_position(bytes);
    }

    fn retry(&self, why: &Error) {
        self.0
            .suspend(|| terminal::note(format_args!("upg: {why}; trying again")));
    }

    fn wait(&self, name: &str) {
        self.0.suspend(|| {
            terminal::note(format_args!(
                "upg: another process downloads {name}; waiting"
            ));
        });
    }
}

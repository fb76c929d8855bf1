//! Time to open a file and to compute its first token.
#![forbid(unsafe_code)]

use super::figure::{Figure, repeat, seconds};
use super::machine::{drop_page_cache, pages_from_disk};
use crate::cli::MeasureArgs;
use std::path::Path;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::SessionOptions;
use upg_kernel::{ErrorKind, OpenOptions, Result, UPGModel};

/// Load times in seconds, up to the loaded model and up to the logits of one token.
///
/// If the file is not a runnable model, the load time ends with the open file.
pub struct Loads {
    /// Load time with no page of the file in the page cache, or why it cannot be measured.
    pub cold: std::result::Result<Figure, String>,
    pub warm: Figure,
    /// Time to the first token, measured once with a cold cache.
    ///
    /// `None` if `cold` is an error or the file is not a runnable model.
    pub first_token_cold: Option<f64>,
    pub first_token_warm: Option<Figure>,
}

/// Loads the model of a file, or returns why it cannot run.
///
/// A file cannot run if its config or a tensor is missing or of an unsupported kind. Errors: the
/// file is not a valid UPG file.
pub fn model(
    path: &Path,
    open: OpenOptions,
) -> Result<std::result::Result<UPGModel, upg_kernel::Error>> {
    // An error of the file itself is returned as such.
    drop(UpgFile::open_with(path, open)?);
    match UPGModel::from_file_with(path, open) {
        Ok(model) => Ok(Ok(model)),
        Err(e) if matches!(e.kind(), ErrorKind::Missing | ErrorKind::Unsupported) => Ok(Err(e)),
        Err(e) => Err(e),
    }
}

impl Loads {
    /// Measures the load times.
    ///
    /// `runs`: the file is a runnable model. Nobody may have the file mapped.
    pub fn measure(args: &MeasureArgs, options: OpenOptions, runs: bool) -> Result<Self> {
        let path = &args.file;
        let open = || match runs {
            true => UPGModel::from_file_with(path, options).map(drop),
            false => UpgFile::open_with(path, options).map(drop),
        };
        let first_token = || -> Result<()> {
            let model = UPGModel::from_file_with(path, options)?;
            let mut session = model.session(&SessionOptions::default())?;
            session.step(0).map(drop)
        };
        let warm = repeat(args.repetitions, open)?;
        let cold_times: std::result::Result<Vec<f64>, String> = (0..args.repetitions.get())
            .map(|_| cold(path, open))
            .collect::<Result<_>>()?;
        let first_token_cold = match cold_times.is_ok() && runs {
            true => cold(path, first_token)?.ok(),
            false => None,
        };
        let first_token_warm = runs
            .then(|| repeat(args.repetitions, first_token))
            .transpose()?;
        Ok(Self {
            cold: cold_times.map(Figure::of),
            warm,
            first_token_cold,
            first_token_warm,
        })
    }
}

/// Returns the seconds of `work` on the file when none of its pages is cached, or why this
/// cannot be measured.
fn cold(
    path: &Path,
    work: impl FnOnce() -> Result<()>,
) -> Result<std::result::Result<f64, String>> {
    if let Err(why) = drop_page_cache(path) {
        return Ok(Err(why));
    }
    let before = pages_from_disk();
    let took = seconds(work)?;
    // A file in a memory file system, or one that others have mapped, stays in memory.
    match before.zip(pages_from_disk()) {
        Some((before, after)) if after > before => Ok(Ok(took)),
        _ => Ok(Err("the pages of the file stayed in the page cache".into())),
    }
}

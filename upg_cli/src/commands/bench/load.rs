//! How long it takes to open a file, and until it gives a token.
#![forbid(unsafe_code)]

use super::figure::{Figure, repeat, seconds};
use super::machine::{drop_page_cache, pages_from_disk};
use crate::cli::MeasureArgs;
use std::path::Path;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::SessionOptions;
use upg_kernel::{ErrorKind, OpenOptions, Result, UPGModel};

/// Seconds from nothing to a model (or, where the file is none that runs, to the open file), and to the
/// logits of one token.
pub struct Loads {
    /// With nothing of the file in the page cache. Or why that cannot be measured.
    pub cold: std::result::Result<Figure, String>,
    pub warm: Figure,
    /// Once; `None` where `cold` is, or the file is no model that runs.
    pub first_token_cold: Option<f64>,
    pub first_token_warm: Option<Figure>,
}

/// The model of a file, or why it is none that runs: its config, or a tensor, is missing or not of a
/// kind that is implemented. Errors: the file is no sound UPG file.
pub fn model(
    path: &Path,
    open: OpenOptions,
) -> Result<std::result::Result<UPGModel, upg_kernel::Error>> {
    // What is wrong with the file itself is not wrong with the model only.
    drop(UpgFile::open_with(path, open)?);
    match UPGModel::from_file_with(path, open) {
        Ok(model) => Ok(Ok(model)),
        Err(e) if matches!(e.kind(), ErrorKind::Missing | ErrorKind::Unsupported) => Ok(Err(e)),
        Err(e) => Err(e),
    }
}

impl Loads {
    /// `runs`: the file is a model that runs. Nobody may have the file mapped.
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

/// The seconds of `work` on the file when no page of it is cached, or why there is no such figure.
fn cold(
    path: &Path,
    work: impl FnOnce() -> Result<()>,
) -> Result<std::result::Result<f64, String>> {
    if let Err(why) = drop_page_cache(path) {
        return Ok(Err(why));
    }
    let before = pages_from_disk();
    let took = seconds(work)?;
    // A file in memory only, or one that others have mapped, stays where it is.
    match before.zip(pages_from_disk()) {
        Some((before, after)) if after > before => Ok(Ok(took)),
        _ => Ok(Err("the pages of the file did not leave the cache".into())),
    }
}

//! `upg tune`.
#![forbid(unsafe_code)]

use super::compress::calibration;
use super::model_file;
use crate::cli::TuneArgs;
use crate::progress::WeightsBar;
use crate::terminal::{self, bytes, duration};
use std::num::NonZeroUsize;
use upg_compress::{TuneOptions, TuneReport, source, tune};
use upg_kernel::support::refuse_to_overwrite;
use upg_kernel::{ErrorKind, OpenOptions, Result};

pub fn run(args: &TuneArgs, open: OpenOptions) -> Result<()> {
    refuse_to_overwrite(&args.output, &args.text)?;
    let file = model_file::open_current(&args.file, open)?;
    let source = source::open_with(&args.original, open)?;
    let most = args.tokens.map(NonZeroUsize::get);
    let calibration = calibration(source.as_ref(), args.text.as_deref(), most)?;
    let options = TuneOptions::new(args.passes, args.rate);
    let progress = WeightsBar::new(None)?;
    let tuned = tune(
        source.as_ref(),
        &file,
        &calibration,
        options,
        &args.output,
        &progress,
    );
    // Errors about the UPG file name it already.
    let report = tuned.map_err(|e| match e.kind() {
        ErrorKind::Interrupted => e,
        _ => e.at(&args.original),
    })?;
    drop(progress);
    terminal::print_prose(&summary(args, &report))
}

fn summary(args: &TuneArgs, report: &TuneReport) -> String {
    let passes = report.passes.iter().map(|d| format!("{d:.4}"));
    let (before, after) = report.divergence;
    format!(
        "{}: {}, {:.3} bits per weight; {} scales and gains tuned in {}\n\
         divergence from the original {before:.4} before and {after:.4} after; during training, per pass: {}\n",
        args.output.display(),
        bytes(report.file_bytes),
        8.0 * report.file_bytes as f64 / report.weights as f64,
        report.parameters,
        duration(report.seconds),
        passes.collect::<Vec<_>>().join(", "),
    )
}

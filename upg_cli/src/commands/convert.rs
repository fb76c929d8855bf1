//! `upg convert`.
#![forbid(unsafe_code)]

use super::compress::summary;
use crate::cli::ConvertArgs;
use crate::progress::WeightsBar;
use crate::terminal::{self, bytes};
use std::path::{Path, PathBuf};
use upg_compress::source::V1Source;
use upg_compress::{Choice, CompressOptions, Preflight, Progress, compress_checked};
use upg_kernel::format::Encoding;
use upg_kernel::inference::model_dir::{ModelFiles, TEXTS};
use upg_kernel::support::refuse_to_overwrite;
use upg_kernel::v1::{Converted, V1File, is_pickle};
use upg_kernel::{Error, ErrorKind, Result};

pub fn run(args: &ConvertArgs) -> Result<()> {
    // The command line guarantees one of the two.
    let output = args.output.as_deref().or(args.to_path.as_deref());
    let output = output.unwrap_or(Path::new(""));
    if !is_pickle(&args.file) {
        std::fs::metadata(&args.file).map_err(|e| Error::io("cannot open", &args.file, e))?;
        let message = "not a version 1 UPG file: that is a pickle of protocol 2 to 5";
        return Err(Error::new(ErrorKind::Unsupported, message)
            .at(&args.file)
            .hint("a file of version 2 needs no conversion; `upg compress` reads other models"));
    }
    let texts = args.model.iter();
    let texts = texts.flat_map(|dir| TEXTS.map(|name| dir.join(name)));
    refuse_to_overwrite(output, texts.collect::<Vec<PathBuf>>())?;
    if let Some(dir) = args
        .model
        .as_ref()
        .filter(|dir| !dir.join("config.json").is_file())
    {
        let message = "no config.json in this directory";
        return Err(Error::new(ErrorKind::Missing, message).at(dir));
    }
    match args.to {
        None | Some(Choice::Encode(Encoding::MdCsr)) => convert(args, output),
        Some(choice) => encode(args, output, choice),
    }
}

fn convert(args: &ConvertArgs, output: &Path) -> Result<()> {
    let file = V1File::open(&args.file, &args.buffers)?;
    let texts = args.model.as_deref().map(ModelFiles::read);
    let texts = texts.transpose()?.unwrap_or_default();
    let progress = WeightsBar::new(None)?;
    // Sizes are not validated yet.
    let sizes = file.catalogue().tensors.iter().map(|tensor| &tensor.shape);
    let weights = sizes.map(|shape| shape.iter().fold(1u64, |n, &d| n.saturating_mul(d)));
    progress.start(weights.fold(0, u64::saturating_add));
    let mut before = 0;
    let converted = file.convert(output, &texts, &mut |name, weights| {
        progress.check_interrupt()?;
        progress.advance(std::mem::replace(&mut before, weights));
        progress.tensor(name);
        Ok(())
    })?;
    drop(progress);
    terminal::print_prose(&summary_of(output, &converted, texts.config_json.is_some()))
}

fn summary_of(output: &Path, converted: &Converted, can_run: bool) -> String {
    let mut text = format!(
        "{}: {}, {} matrices as mdcsr and {} vectors, {:.1} % of their weights are not zero\n",
        output.display(),
        bytes(converted.file_bytes),
        converted.matrices,
        converted.vectors,
        100.0 * converted.entries as f64 / converted.weights as f64,
    );
    if !can_run {
        text += "without config and tokenizer: it cannot be run; --model DIR takes them from the model's directory\n";
    }
    text
}

fn encode(args: &ConvertArgs, output: &Path, choice: Choice) -> Result<()> {
    let source = V1Source::open(&args.file, &args.buffers, args.model.as_deref())?;
    let options = CompressOptions::new(choice);
    let preflight = Preflight::new(&source, output, &options).map_err(|e| e.at(&args.file))?;
    preflight.check()?;
    let progress = WeightsBar::new(None)?;
    let report = compress_checked(&source, output, &options, &progress);
    let report = report.map_err(|e| e.at(&args.file))?;
    drop(progress);
    terminal::print_prose(&summary(output, &source, &report))
}

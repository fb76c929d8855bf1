//! `upg compress`.
#![forbid(unsafe_code)]

use crate::cli::CompressArgs;
use crate::terminal::{self, WeightsBar, bytes};
use std::time::Instant;
use upg_compress::calibration::Calibration;
use upg_compress::compress::compress;
use upg_compress::plan::CompressOptions;
use upg_compress::source;
use upg_kernel::{Error, ErrorKind, Result};

pub fn run(args: &CompressArgs) -> Result<()> {
    if args.output.is_dir() {
        return Err(Error::new(ErrorKind::Argument, "the output is a directory")
            .at(&args.output)
            .hint("name a file, for example model.safetensors"));
    }
    let source = source::open(&args.source)?;
    let mut options = CompressOptions::new(args.encoding);
    options.embedding = args.embedding;
    options.group = args.group;
    options.overrides = args.overrides.clone();
    options.seed = args.seed;
    options.sparse = args.sparse;
    options.prune = args.prune;
    if let Some(path) = &args.calibrate {
        let text = terminal::read_text(path)?;
        options.calibration = Some(Calibration::of_text(source.as_ref(), &text)?);
    }
    let started = Instant::now();
    let progress = WeightsBar::new()?;
    let report = compress(source.as_ref(), &args.output, &options, &progress)
        .map_err(|e| e.at(&args.source))?;
    drop(progress);

    let worst = report
        .layers
        .iter()
        .max_by(|a, b| a.error.unwrap_or(0.0).total_cmp(&b.error.unwrap_or(0.0)));
    let mut text = format!(
        "{}: {}, {:.3} bits per weight ({:.1} % of F32), in {:.1} s\n",
        args.output.display(),
        bytes(report.file_bytes),
        report.bits_per_weight(),
        100.0 * report.bits_per_weight() / 32.0,
        started.elapsed().as_secs_f64(),
    );
    if let Some((layer, error)) = worst.and_then(|l| Some((l, l.error?))) {
        text += &format!(
            "largest relative error {:.3} % ({}, {})\n",
            100.0 * error,
            layer.name,
            layer.encoding_name()
        );
    }
    if let Some(zeros) = report.zeros {
        text += &format!(
            "{} matrices stored by their zeros, {:.1} % of their weights\n",
            zeros.matrices,
            100.0 * zeros.share()
        );
    }
    if let Some(first) = source.skipped().first() {
        text += &format!(
            "{} tensors left out, the first of them {}: {}\n",
            source.skipped().len(),
            first.name.escape_debug(),
            first.reason
        );
    }
    terminal::print(&text)
}

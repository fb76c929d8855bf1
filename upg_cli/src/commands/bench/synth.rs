//! `upg bench synth`.
#![forbid(unsafe_code)]

use crate::cli::SynthArgs;
use crate::progress::WeightsBar;
use crate::terminal::{self, bytes};
use std::time::Instant;
use upg_compress::source::SyntheticSource;
use upg_compress::{CompressOptions, compress_random};
use upg_kernel::Result;

pub fn run(args: &SynthArgs) -> Result<()> {
    let source = SyntheticSource::published(&args.arch, args.seed)?;
    let mut options = CompressOptions::new(args.encoding.into());
    options.embedding = args.embedding.map(Into::into);
    options.seed = args.seed;
    let started = Instant::now();
    let progress = WeightsBar::new(None)?;
    let report = compress_random(&source, &args.output, &options, &progress)?;
    drop(progress);
    terminal::print(&format!(
        "{}: {} random weights in the shapes of {}, {}, {:.3} bits per weight, in {:.1} s\n",
        args.output.display(),
        report.weights,
        args.arch,
        bytes(report.file_bytes),
        report.bits_per_weight(),
        started.elapsed().as_secs_f64(),
    ))
}

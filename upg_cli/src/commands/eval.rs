//! `upg eval`.
#![forbid(unsafe_code)]

use crate::cli::EvalArgs;
use crate::terminal;
use serde_json::json;
use std::num::NonZeroUsize;
use upg_kernel::inference::{EvaluationOptions, evaluate};
use upg_kernel::{Result, UPGModel};

pub fn run(args: &EvalArgs) -> Result<()> {
    let text = terminal::read_text(&args.text)?;
    let model = UPGModel::from_file(&args.file)?;
    let reference = args.against.as_ref().map(UPGModel::from_file).transpose()?;
    let bar = terminal::bar(0, "{bar:30} {percent:>3}%  {pos}/{len} windows, {eta} left");
    let progress = |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    };
    let default = EvaluationOptions::default();
    let options = EvaluationOptions {
        window: args.window,
        limit: args.windows.map_or(default.limit, NonZeroUsize::get),
        chunk: args.chunk.unwrap_or(default.chunk),
        cache_type: args.cache_type.into(),
    };
    let result = evaluate(&model, &text, &options, reference.as_ref(), &progress);
    bar.finish_and_clear();
    let result = result?;
    let (bits, block_bits) = (
        model.file().bits_per_weight(),
        model.file().bits_per_weight_blocks(),
    );
    let comparison = result.comparison.as_ref();

    if args.json {
        let json = json!({
            "perplexity": result.perplexity,
            "perplexity_error": result.perplexity_error,
            "positions": result.positions,
            "window": args.window,
            "bits_per_weight": bits,
            "bits_per_weight_blocks": block_bits,
            "file_bytes": model.file().file_len(),
            "reference_perplexity": comparison.map(|c| c.reference_perplexity),
            "kl_mean": comparison.map(|c| c.kl_mean),
            "kl_error": comparison.map(|c| c.kl_error),
            "top1_agreement": comparison.map(|c| c.top1_agreement),
        });
        return terminal::print(&format!("{json:#}\n"));
    }
    let mut out = format!(
        "perplexity {:.4} +- {:.4} ({} positions, windows of {})\nbits per weight {:.3}, blocks {:.3}\n",
        result.perplexity, result.perplexity_error, result.positions, args.window, bits, block_bits
    );
    if let Some(c) = comparison {
        out += &format!(
            "reference perplexity {:.4} (x{:.4})\nKL divergence {:.5} +- {:.5}, same first choice {:.2} %\n",
            c.reference_perplexity,
            result.perplexity / c.reference_perplexity,
            c.kl_mean,
            c.kl_error,
            100.0 * c.top1_agreement
        );
    }
    terminal::print(&out)
}

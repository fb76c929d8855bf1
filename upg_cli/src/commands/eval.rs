//! `upg eval`.
#![forbid(unsafe_code)]

mod reference;

use super::model_file;
use crate::cli::EvalArgs;
use crate::{signals, terminal};
use reference::Against;
use serde_json::json;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use upg_kernel::inference::evaluate::{
    Computed, EvaluationOptions, LogitFile, Reference, Windows, evaluate,
};
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::inference::{Evaluation, Model};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

pub fn run(args: &EvalArgs, open: OpenOptions) -> Result<()> {
    let text = terminal::read_text(&args.text, MAX_TEXT_BYTES)?;
    let model = model_file::load(&args.file, open)?;
    let limit = args.windows.map_or(usize::MAX, NonZeroUsize::get);
    let windows = Windows::of_text(model.tokenizer()?, &text, args.window, limit)?;
    let options = EvaluationOptions {
        chunk: args.chunk.unwrap_or(EvaluationOptions::default().chunk),
        cache_type: args.cache_type.into(),
    };
    let evaluation = Evaluated {
        model: model.model(),
        options,
        windows: &windows,
    };
    let never = AtomicBool::new(false);
    let result = match &args.against {
        None => evaluation.measure(None, &never)?,
        Some(path) => {
            let mut against = Against::open(path, options, open)?;
            against.check(&text, &windows).map_err(|e| e.at(path))?;
            match &args.logits {
                None => evaluation.measure(Some(&mut against), &never)?,
                Some(logits) => evaluation.against_file(logits, &mut against, args)?,
            }
        }
    };
    report(args, &model, &result)
}

/// Model and text to evaluate.
struct Evaluated<'a> {
    model: &'a Arc<Model>,
    options: EvaluationOptions,
    windows: &'a Windows,
}

impl Evaluated<'_> {
    /// Evaluates against the logits in the file `path`, which is written first if it has others.
    fn against_file(
        &self,
        path: &Path,
        reference: &mut Against,
        args: &EvalArgs,
    ) -> Result<Evaluation> {
        let identity = reference.identity()?;
        let mut inputs = reference.files();
        inputs.extend([args.file.clone(), args.text.clone()]);
        let vocab = self.model.config().vocab_size;
        let mut logits = LogitFile::open(path, self.windows, vocab, &identity, &inputs, reference)?;
        let verb = if logits.is_filled() {
            "Using"
        } else {
            "Writing"
        };
        let (path, size) = (path.display(), terminal::bytes(logits.bytes()));
        terminal::note(format_args!(
            "{verb} the logits of the reference: {path}, {size}"
        ));
        // Without this, Ctrl-C would leave a partial file behind.
        let interrupted = signals::interrupt_flag()?;
        let result = self.measure(Some(&mut logits), &interrupted)?;
        logits.finish()?;
        Ok(result)
    }

    fn measure(
        &self,
        reference: Option<&mut dyn Reference>,
        interrupted: &AtomicBool,
    ) -> Result<Evaluation> {
        let bar = terminal::bar(0, "{bar:30} {percent:>3}%  {pos}/{len} windows, {eta} left");
        let progress = |done, all| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            match interrupted.load(Ordering::Relaxed) {
                false => Ok(()),
                true => Err(Error::new(ErrorKind::Interrupted, "interrupted")),
            }
        };
        let mut model = Computed {
            model: Arc::clone(self.model),
            options: self.options,
        };
        let result = evaluate(&mut model, self.windows, reference, &progress);
        bar.finish_and_clear();
        result
    }
}

fn report(args: &EvalArgs, model: &UPGModel, result: &Evaluation) -> Result<()> {
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
            "reference_perplexity_error": comparison.map(|c| c.reference_perplexity_error),
            "perplexity_ratio": comparison.map(|c| c.perplexity_ratio),
            "perplexity_ratio_error": comparison.map(|c| c.perplexity_ratio_error),
            "kl_mean": comparison.map(|c| c.kl_mean),
            "kl_error": comparison.map(|c| c.kl_error),
            "kl_median": comparison.map(|c| c.kl_quantiles[0]),
            "kl_90": comparison.map(|c| c.kl_quantiles[1]),
            "kl_99": comparison.map(|c| c.kl_quantiles[2]),
            "kl_max": comparison.map(|c| c.kl_quantiles[3]),
            "top1_agreement": comparison.map(|c| c.top1_agreement),
            "top1_error": comparison.map(|c| c.top1_error),
        });
        return terminal::print(&format!("{json:#}\n"));
    }
    let mut out = format!(
        "perplexity {:.4} +- {:.4} ({} positions, windows of {})\nbits per weight {:.3}, blocks {:.3}\n",
        result.perplexity, result.perplexity_error, result.positions, args.window, bits, block_bits
    );
    if let Some(c) = comparison {
        let [median, most, nearly_all, maximum] = c.kl_quantiles;
        out += &format!(
            "reference perplexity {:.4} +- {:.4} (x{:.4} +- {:.4})\n\
             KL divergence {:.5} +- {:.5}, median {:.5}, 90 % {:.5}, 99 % {:.5}, maximum {:.5}\n\
             top-1 agreement {:.2} +- {:.2} %\n",
            c.reference_perplexity,
            c.reference_perplexity_error,
            c.perplexity_ratio,
            c.perplexity_ratio_error,
            c.kl_mean,
            c.kl_error,
            median,
            most,
            nearly_all,
            maximum,
            100.0 * c.top1_agreement,
            100.0 * c.top1_error
        );
    }
    terminal::print_prose(&out)
}

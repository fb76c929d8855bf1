//! Common parts of `run` and `chat`: options of an answer, and what is said at its end.
#![forbid(unsafe_code)]

use crate::cli::SamplingArgs;
use crate::terminal;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use upg_kernel::inference::chat_template::ChatTemplate;
use upg_kernel::inference::{FinishReason, SamplingOptions, SessionOptions, TextStream};
use upg_kernel::{Result, UPGModel};

/// Temperature above which an answer is noise with every model.
const HOT: f32 = 2.0;

/// Tokens of a prompt that are computed without a progress bar.
const SHORT_PROMPT: usize = 256;

/// Returns the options of the command line; the others are those that the model recommends.
pub fn sampling_options(args: &SamplingArgs, model: &UPGModel) -> Result<SamplingOptions> {
    let recommended = model.sampling_options()?;
    let options = SamplingOptions {
        temperature: args.temperature.unwrap_or(recommended.temperature),
        top_k: args.top_k.unwrap_or(recommended.top_k),
        top_p: args.top_p.unwrap_or(recommended.top_p),
        min_p: args.min_p.unwrap_or(recommended.min_p),
        repetition_penalty: args
            .repetition_penalty
            .unwrap_or(recommended.repetition_penalty),
        frequency_penalty: args.frequency_penalty.unwrap_or_default(),
        presence_penalty: args.presence_penalty.unwrap_or_default(),
        seed: args
            .seed
            .and_then(|seed| seed.0)
            .unwrap_or_else(random_seed),
        ..recommended
    };
    warn_if_hot(options.temperature);
    Ok(options)
}

/// Says so if a temperature makes noise.
pub fn warn_if_hot(temperature: f32) {
    if temperature > HOT {
        terminal::note(format_args!(
            "upg: temperature {temperature}: above {HOT} most models write noise"
        ));
    }
}

/// Returns a seed that people can copy: below 2^32, other in each process.
fn random_seed() -> u64 {
    // The keys of the hash are random.
    RandomState::new().hash_one(0) >> 32
}

pub fn session_options(args: &SamplingArgs, interrupt: Arc<AtomicBool>) -> SessionOptions {
    SessionOptions {
        context: args.context,
        cache_type: args.cache_type.into(),
        interrupt: Some(interrupt),
        ..SessionOptions::default()
    }
}

/// Returns the template of the model with the names of the command line.
pub fn template(args: &SamplingArgs, model: &UPGModel) -> Result<ChatTemplate> {
    let template = model.chat_template()?;
    for (name, _) in &args.template_args {
        if !template.reads(name) {
            terminal::note(format_args!(
                "upg: the chat template of this model does not use '{name}'"
            ));
        }
    }
    template.with_arguments(args.template_args.iter().cloned().collect())
}

/// Computes the prompt of an answer, with a progress bar if that may take a while.
pub fn compute_prompt(stream: &mut TextStream<'_>) {
    let mut bar = None;
    stream.compute_prompt(|done, all| {
        if bar.is_none() && all - done > SHORT_PROMPT {
            let template = "reading the prompt {bar:24} {pos} of {len} tokens";
            bar = Some(terminal::bar(all as u64, template));
        }
        if let Some(bar) = &bar {
            bar.set_position(done as u64);
        }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
}

/// Says why an answer was cut, if it was.
pub fn note_cut(reason: Option<FinishReason>, max_tokens: Option<usize>) {
    match (reason, max_tokens) {
        (Some(FinishReason::MaxTokens), Some(n)) => {
            terminal::note(format_args!("upg: cut after {n} tokens (--max-tokens)"));
        }
        (Some(FinishReason::ContextFull), _) => terminal::note(
            "upg: cut: the context is full; --context sets its size, up to that of the model",
        ),
        _ => {}
    }
}

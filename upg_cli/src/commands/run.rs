//! `upg run`.
#![forbid(unsafe_code)]

use super::model_file;
use crate::cli::{RunArgs, SamplingArgs};
use crate::{signals, terminal};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;
use upg_kernel::inference::chat_template::Message;
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::inference::{FinishReason, Sampler, SamplingOptions, Session, SessionOptions};
use upg_kernel::support::{AtomicFile, peak_memory};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

pub fn run(args: &RunArgs, open: OpenOptions) -> Result<()> {
    let started = Instant::now();
    let model = model_file::load(&args.file, open)?;
    let loaded = started.elapsed();
    let options = |interrupt| session_options(&args.sampling, interrupt);
    if let (Some(tokens), Some(out)) = (&args.tokens, &args.logits) {
        let session = model.session(&options(signals::interrupt_flag()?))?;
        return write_logits(&model, session, tokens, out);
    }
    let text = prompt_text(&model, args)?;
    let prompt = model.tokenizer()?.encode(&text, !args.chat)?;
    let mut request = model.request(prompt, args.max_tokens);
    request.sampler = Sampler::new(sampling_options(&args.sampling))?;
    request.stop_strings.clone_from(&args.sampling.stop);
    let mut scheduler = model.scheduler(1, &options(signals::interrupt_flag()?))?;
    let mut stream = scheduler.stream(request)?;
    if !args.chat {
        terminal::print(&text)?;
    }
    // An interrupted answer still ends its line and prints its figures; a failed one prints why.
    let finished = stream
        .by_ref()
        .try_for_each(|piece| terminal::print(&piece?));
    terminal::print("\n")?;
    let interrupted = |e: &Error| e.kind() == ErrorKind::Interrupted;
    if !args.quiet && finished.as_ref().err().is_none_or(interrupted) {
        let peak = peak_memory().map_or_else(|| "unknown".into(), terminal::bytes);
        terminal::note(format_args!(
            "[loaded in {:.2} s; {}; {} tokens; peak memory {peak}]",
            loaded.as_secs_f64(),
            stream.timings(),
            stream.timings().generated_tokens,
        ));
    }
    note_end(stream.finish_reason());
    finished
}

/// Prints why an answer was cut off.
pub fn note_end(reason: Option<FinishReason>) {
    if reason == Some(FinishReason::ContextFull) {
        terminal::note(
            "upg: the context is full; --context sets its size, up to that of the model",
        );
    }
}

pub fn sampling_options(args: &SamplingArgs) -> SamplingOptions {
    SamplingOptions {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        frequency_penalty: args.frequency_penalty,
        presence_penalty: args.presence_penalty,
        seed: args.seed,
        ..SamplingOptions::default()
    }
}

pub fn session_options(args: &SamplingArgs, interrupt: Arc<AtomicBool>) -> SessionOptions {
    SessionOptions {
        context: args.context,
        cache_type: args.cache_type.into(),
        interrupt: Some(interrupt),
        ..SessionOptions::default()
    }
}

fn prompt_text(model: &UPGModel, args: &RunArgs) -> Result<String> {
    let prompt = match args.prompt.as_deref() {
        Some("-") => terminal::read_input(MAX_TEXT_BYTES)?,
        other => other.unwrap_or_default().to_owned(),
    };
    if !args.chat {
        return Ok(prompt);
    }
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.chain([Message::new("user", prompt)]).collect();
    model.chat_template()?.render(&messages, true)
}

fn write_logits(model: &UPGModel, mut session: Session, tokens: &[u32], out: &Path) -> Result<()> {
    let logits = session.forward(tokens)?;
    let (positions, vocab) = (tokens.len(), logits.len() / tokens.len());
    let values: Vec<u8> = logits.into_iter().flat_map(f32::to_le_bytes).collect();
    let malformed = |e: SafeTensorError| Error::new(ErrorKind::Invalid, e.to_string());
    let view = TensorView::new(Dtype::F32, vec![positions, vocab], &values).map_err(malformed)?;
    let bytes = safetensors::serialize([("logits", view)], None).map_err(malformed)?;
    let mut file = AtomicFile::create_from(out, [model.file().path()])?;
    file.write_all(&bytes)
        .map_err(|e| Error::io("cannot write", out, e))?;
    file.commit()?;
    terminal::print(&format!(
        "{}: logits F32 [{positions}, {vocab}]\n",
        out.display()
    ))
}

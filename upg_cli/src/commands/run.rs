//! `upg run`.
#![forbid(unsafe_code)]

use super::generation::{compute_prompt, note_cut, sampling_options, session_options, template};
use super::model_file;
use crate::cli::RunArgs;
use crate::wrap::Wrap;
use crate::{signals, terminal};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use upg_kernel::inference::chat_template::Message;
use upg_kernel::inference::tokenizer::MAX_TEXT_BYTES;
use upg_kernel::inference::{FinishReason, Sampler, Session, Timings};
use upg_kernel::support::{AtomicFile, peak_memory};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

pub fn run(args: &RunArgs, open: OpenOptions) -> Result<()> {
    let started = Instant::now();
    if let (Some(tokens), Some(out)) = (&args.tokens, &args.logits) {
        let model = model_file::load(&args.file, open)?;
        let options = session_options(&args.sampling, signals::interrupt_flag()?);
        return write_logits(&model, model.session(&options)?, tokens, out);
    }
    let given = args.text.as_deref().or(args.prompt.as_deref());
    // Told before a large model is loaded.
    if given.is_none() && args.prompt_file.is_none() && std::io::stdin().is_terminal() {
        return Err(no_prompt("no prompt"));
    }
    let model = model_file::load(&args.file, open)?;
    let loaded = started.elapsed();
    let text = prompt_text(given, args.prompt_file.as_deref())?;
    if text.trim().is_empty() && !args.raw {
        return Err(no_prompt("no prompt: the text is empty"));
    }
    let (framed, is_raw) = frame(&model, args, &text)?;
    let prompt = model.tokenizer()?.encode(&framed, is_raw)?;
    let max_tokens = args.sampling.max_tokens;
    let mut request = model.request(prompt, max_tokens.unwrap_or(usize::MAX));
    let sampling = sampling_options(&args.sampling, &model)?;
    let seed = sampling.seed;
    request.sampler = Sampler::new(sampling)?;
    model.stop_at(&mut request, &args.sampling.stop);
    let options = session_options(&args.sampling, signals::interrupt_flag()?);
    let mut scheduler = model.scheduler(1, &options)?;
    let mut stream = scheduler.stream(request)?;
    if !args.quiet {
        compute_prompt(&mut stream);
    }
    let mut answer = String::new();
    let mut wrap = Wrap::new(terminal::columns().filter(|_| !is_raw));
    if is_raw && !args.json {
        terminal::print(&text)?;
    }
    // An interrupted answer still ends its line and prints its figures; a failed one prints why.
    let finished = stream.by_ref().try_for_each(|piece| {
        let piece = piece?;
        match args.json {
            true => answer.push_str(&piece),
            false => terminal::print(&wrap.push(&piece))?,
        }
        Ok(())
    });
    let interrupted = |e: &Error| e.kind() == ErrorKind::Interrupted;
    let is_whole = finished.as_ref().err().is_none_or(interrupted);
    let (timings, reason) = (stream.timings(), stream.finish_reason());
    if args.json && is_whole {
        let end = End {
            loaded,
            timings,
            reason,
            seed,
        };
        terminal::print(&format!("{:#}\n", end.to_json(&args.file, &answer)))?;
    } else if !args.json {
        terminal::print(&(wrap.finish() + "\n"))?;
        if !args.quiet && is_whole && (args.stats || std::io::stderr().is_terminal()) {
            terminal::note(End {
                loaded,
                timings,
                reason,
                seed,
            });
        }
        if !args.quiet {
            note_cut(reason, max_tokens);
        }
    }
    finished
}

/// Figures of an answer.
struct End {
    loaded: Duration,
    timings: Timings,
    reason: Option<FinishReason>,
    seed: u64,
}

impl End {
    fn to_json(&self, model: &Path, text: &str) -> serde_json::Value {
        let timings = &self.timings;
        json!({
            "model": model.display().to_string(),
            "text": text,
            "finish_reason": match self.reason {
                Some(FinishReason::StopToken(_) | FinishReason::StopString(_)) => "stop",
                Some(FinishReason::MaxTokens) => "length",
                Some(FinishReason::ContextFull) => "context",
                _ => "interrupted",
            },
            "prompt_tokens": timings.prompt_tokens,
            "generated_tokens": timings.generated_tokens,
            "load_seconds": self.loaded.as_secs_f64(),
            "prompt_seconds": timings.prompt_time.as_secs_f64(),
            "generate_seconds": timings.step_time.as_secs_f64(),
            "prompt_tokens_per_second": timings.prompt_rate(),
            "generated_tokens_per_second": timings.step_rate(),
            "peak_memory_bytes": peak_memory(),
            "seed": self.seed,
        })
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.timings.generated_tokens == 0 && self.reason.is_none() {
            return f.write_str("[stopped before the first token]");
        }
        let peak = peak_memory().map_or_else(|| "unknown".into(), terminal::bytes);
        write!(
            f,
            "[loaded in {:.2} s; {}; {} tokens; seed {}; peak memory {peak}]",
            self.loaded.as_secs_f64(),
            self.timings,
            self.timings.generated_tokens,
            self.seed,
        )
    }
}

/// Returns the prompt from the command line, a file or standard input.
fn prompt_text(given: Option<&str>, file: Option<&Path>) -> Result<String> {
    let input = || terminal::read_input(MAX_TEXT_BYTES).map(without_line_end);
    let mut text = match (given, file) {
        (None, None) | (Some("-"), _) => input()?,
        (Some(text), _) => text.to_owned(),
        (None, Some(_)) => String::new(),
    };
    if let Some(path) = file {
        if !text.is_empty() {
            text += "\n\n";
        }
        text += &match path.to_str() {
            Some("-") => input()?,
            _ => without_line_end(terminal::read_text(path, MAX_TEXT_BYTES)?),
        };
    }
    Ok(text)
}

fn no_prompt(message: &str) -> Error {
    let e = Error::new(ErrorKind::Argument, message);
    e.hint("give a TEXT or -f FILE; for a conversation: upg chat MODEL")
}

/// Removes the last line end, which belongs to a file and not to its text.
fn without_line_end(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    text
}

/// Returns the text to continue, and whether it is the prompt as it is.
fn frame(model: &UPGModel, args: &RunArgs, text: &str) -> Result<(String, bool)> {
    if args.raw {
        return Ok((text.to_owned(), true));
    }
    let template = match template(&args.sampling, model) {
        Ok(template) => template,
        Err(e) if e.kind() == ErrorKind::Missing && args.system.is_none() => {
            return Ok((text.to_owned(), true));
        }
        Err(e) => return Err(e.hint("--raw continues the text without the template")),
    };
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.chain([Message::new("user", text)]).collect();
    Ok((template.render(&messages, true)?, false))
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

//! `upg run`.
#![forbid(unsafe_code)]

use crate::cli::{RunArgs, SamplingArgs};
use crate::terminal;
use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::time::Instant;
use upg_kernel::inference::chat_template::Message;
use upg_kernel::inference::{Sampler, SamplingOptions, SessionOptions};
use upg_kernel::{Error, ErrorKind, Result, UPGModel};

/// Longest prompt that is read from standard input, in bytes.
const LONGEST_INPUT: u64 = 16 << 20;

pub fn run(args: &RunArgs) -> Result<()> {
    let started = Instant::now();
    let model = UPGModel::from_file(&args.file)?;
    let loaded = started.elapsed();
    if let (Some(tokens), Some(out)) = (&args.tokens, &args.logits) {
        return write_logits(&model, tokens, out);
    }
    let text = prompt_text(&model, args)?;
    let prompt = model.tokenizer()?.encode(&text, !args.chat)?;
    let interrupted = terminal::interrupt_flag()?;
    let mut session = model.session(&session_options(&args.sampling))?;
    let mut sampler = Sampler::new(sampling_options(&args.sampling))?;
    let started = Instant::now();
    let stop = args.sampling.stop.clone();
    let mut stream = model.stream(&mut session, &mut sampler, &prompt, args.max_tokens, stop)?;
    let first_token = started.elapsed();
    if !args.chat {
        terminal::print(&text)?;
    }
    let started = Instant::now();
    for piece in stream.by_ref() {
        terminal::print(&piece?)?;
        if interrupted.load(std::sync::atomic::Ordering::Relaxed) {
            break;
        }
    }
    terminal::print("\n")?;
    if !args.quiet {
        let figures = Figures {
            load_seconds: loaded.as_secs_f64(),
            prompt_tokens: prompt.len(),
            prompt_seconds: first_token.as_secs_f64(),
            tokens: stream.generated(),
            seconds: started.elapsed().as_secs_f64(),
        };
        eprintln!("{figures}");
    }
    Ok(())
}

/// What a run took.
struct Figures {
    load_seconds: f64,
    prompt_tokens: usize,
    prompt_seconds: f64,
    tokens: usize,
    seconds: f64,
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "[loaded in {:.2} s; {} prompt tokens in {:.2} s ({:.1} tokens/s); {} tokens at {:.1} tokens/s",
            self.load_seconds,
            self.prompt_tokens,
            self.prompt_seconds,
            self.prompt_tokens as f64 / self.prompt_seconds.max(1e-9),
            self.tokens,
            self.tokens as f64 / self.seconds.max(1e-9),
        )?;
        if let Some(peak) = terminal::peak_memory() {
            write!(f, "; peak memory {}", terminal::bytes(peak))?;
        }
        f.write_str("]")
    }
}

pub fn sampling_options(args: &SamplingArgs) -> SamplingOptions {
    SamplingOptions {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
        ..SamplingOptions::default()
    }
}

pub fn session_options(args: &SamplingArgs) -> SessionOptions {
    SessionOptions {
        context: args.context,
        ..SessionOptions::default()
    }
}

fn prompt_text(model: &UPGModel, args: &RunArgs) -> Result<String> {
    let prompt = match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            let mut input = std::io::stdin().lock().take(LONGEST_INPUT + 1);
            input.read_to_string(&mut text).map_err(|e| {
                Error::new(ErrorKind::Io, format!("cannot read standard input: {e}")).with_source(e)
            })?;
            if text.len() as u64 > LONGEST_INPUT {
                let message = format!("a prompt of over {LONGEST_INPUT} bytes");
                return Err(Error::new(ErrorKind::TooLarge, message));
            }
            text
        }
        other => other.unwrap_or_default().to_owned(),
    };
    if !args.chat {
        return Ok(prompt);
    }
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<_> = system.chain([Message::new("user", prompt)]).collect();
    model.chat_template()?.render(&messages, true)
}

fn write_logits(model: &UPGModel, tokens: &[u32], out: &Path) -> Result<()> {
    let logits = model.forward(tokens)?;
    let (positions, vocab) = logits.dims2()?;
    candle_core::safetensors::save(&HashMap::from([("logits", logits)]), out).map_err(|e| {
        Error::new(ErrorKind::Io, format!("cannot write: {e}"))
            .at(out)
            .with_source(e)
    })?;
    terminal::print(&format!(
        "{}: logits F32 [{positions}, {vocab}]\n",
        out.display()
    ))
}

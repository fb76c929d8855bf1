//! Loads a UPG file of any family, continues a prompt, and prints time and memory.
//!
//! ```text
//! cargo run --release --example phi4_generate            # the model of quickstart.sh
//! cargo run --release --example phi4_generate -- phi4.safetensors 'Write a haiku.' 200
//! ```
//!
//! A model with a chat template answers the prompt; one without continues the text. Sampling is
//! greedy, so that two runs can be compared.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;
use upg_kernel::inference::SessionOptions;
use upg_kernel::inference::chat_template::Message;
use upg_kernel::support::peak_memory;
use upg_kernel::{Error, ErrorKind, Result, UPGModel};

const USAGE: &str = "usage: phi4_generate [FILE [PROMPT [MAX_TOKENS]]]";

fn main() {
    if let Err(e) = run() {
        eprintln!("phi4_generate: {e}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args
        .next()
        .map_or_else(quickstart_model, |a| Ok(a.into()))?;
    let prompt = args
        .next()
        .unwrap_or_else(|| "Explain in two sentences why the sky is blue.".into());
    let max_tokens = args.next().map_or(Ok(100), |n| {
        n.parse().map_err(|e| {
            Error::new(ErrorKind::Argument, format!("MAX_TOKENS '{n}': {e}")).hint(USAGE)
        })
    })?;

    let started = Instant::now();
    let model = UPGModel::from_file(&path)?;
    let loaded = started.elapsed();

    let prompt = match model.chat_template() {
        Ok(template) => {
            let text = template.render(&[Message::new("user", prompt)], true)?;
            model.tokenizer()?.encode(&text, false)?
        }
        Err(e) if e.kind() == ErrorKind::Missing => model.tokenizer()?.encode(&prompt, true)?,
        Err(e) => return Err(e),
    };
    let mut scheduler = model.scheduler(1, &SessionOptions::default())?;
    let mut stream = scheduler.stream(model.request(prompt, max_tokens))?;
    for piece in stream.by_ref() {
        print!("{}", piece?);
        std::io::stdout()
            .flush()
            .map_err(|e| Error::io("cannot write", "standard output", e))?;
    }

    let timings = stream.timings();
    let mb = |bytes: u64| bytes as f64 / 1e6;
    println!("\n");
    println!(
        "file                 {:>9.1} MB",
        mb(model.file().file_len())
    );
    println!("load                 {:>9.3} s", loaded.as_secs_f64());
    println!(
        "time to first token  {:>9.3} s",
        timings.prompt_time.as_secs_f64()
    );
    println!(
        "prompt               {:>9.1} tokens/s ({} tokens)",
        timings.prompt_rate(),
        timings.prompt_tokens
    );
    println!(
        "generation           {:>9.1} tokens/s ({} tokens)",
        timings.step_rate(),
        timings.generated_tokens
    );
    match peak_memory() {
        Some(bytes) => println!("peak memory          {:>9.1} MB", mb(bytes)),
        None => println!("peak memory            unknown"),
    }
    Ok(())
}

/// Returns the file that `quickstart.sh` writes, independent of the working directory.
fn quickstart_model() -> Result<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/smollm2.safetensors");
    path.canonicalize().map_err(|e| {
        Error::io("cannot open", path, e).hint(format!(
            "run ./quickstart.sh first, or name a file; {USAGE}"
        ))
    })
}

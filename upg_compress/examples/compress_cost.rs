//! Estimates the cost of compressing a published model on this machine, without its weights.
//!
//!     cargo run --release --example compress_cost -- phi-4 t3 17408
//!
//! The last argument is the number of calibration tokens, in sequences of 512; without it there is
//! no calibration. Random weights of the same shapes replace those of the model. See `Preflight`
//! for what is measured and what is counted.
#![forbid(unsafe_code)]

use std::error::Error;
use upg_compress::source::SyntheticSource;
use upg_compress::{Calibration, Choice, CompressOptions, Preflight, Source};

/// Tokens per sequence.
const WINDOW: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, encoding, tokens @ ..] = &args[..] else {
        return Err("pass a model, an encoding and, to calibrate, a number of tokens".into());
    };
    let source = SyntheticSource::published(model, 0)?;
    let encoding: Choice = encoding.parse()?;
    let mut options = CompressOptions::new(encoding);
    if let [tokens] = tokens {
        options.calibration = Some(Calibration::new(vec![0; tokens.parse()?], WINDOW)?);
    }
    let preflight = Preflight::new(&source, "model.safetensors", &options)?;
    println!(
        "{model}, {} weights: {:.2} GB, memory up to {:.1} GB, {:.2} h with {} threads",
        source.total_weights(),
        preflight.file_bytes as f64 / 1e9,
        preflight.memory.own as f64 / 1e9,
        preflight.seconds / 3600.0,
        rayon::current_num_threads(),
    );
    Ok(())
}

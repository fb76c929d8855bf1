//! Measures threads that generate at once with one model: each has a scheduler of its own.
//!
//! ```text
//! cargo run --release --example callers -- models/smollm2.safetensors 2 128
//! ```

use std::sync::Barrier;
use std::time::Instant;
use upg_kernel::inference::{Event, SessionOptions};
use upg_kernel::{Cpu, Error, ErrorKind, Result, UPGModel};

const USAGE: &str = "usage: callers FILE CALLERS TOKENS";

fn main() {
    if let Err(e) = run() {
        eprintln!("callers: {e}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    let usage = || Error::new(ErrorKind::Argument, USAGE);
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, callers, tokens] = args.as_slice() else {
        return Err(usage());
    };
    let number = |text: &str| text.parse().ok().filter(|&n| n > 0).ok_or_else(usage);
    let (most, tokens) = (number(callers)?, number(tokens)?);
    let model = UPGModel::from_file(file)?;
    println!("{} threads", Cpu::shared()?.threads());
    for callers in 1..=most {
        let start = Barrier::new(callers);
        let rates = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..callers)
                .map(|_| scope.spawn(|| rate(&model, tokens, &start)))
                .collect();
            let results = threads
                .into_iter()
                .map(|thread| thread.join().expect("a caller ends by itself"));
            results.collect::<Result<Vec<f64>>>()
        })?;
        let list: Vec<String> = rates.iter().map(|rate| format!("{rate:.1}")).collect();
        let sum: f64 = rates.iter().sum();
        println!(
            "{callers} callers: {} = {sum:.1} tokens/s",
            list.join(" + ")
        );
    }
    Ok(())
}

/// Generates `tokens` tokens; returns how many in a second.
fn rate(model: &UPGModel, tokens: usize, start: &Barrier) -> Result<f64> {
    let mut scheduler = model.scheduler(1, &SessionOptions::default())?;
    let mut request = model.request(vec![1, 2, 3], tokens);
    request.stop_ids.clear();
    start.wait();
    let started = Instant::now();
    scheduler.submit(request)?;
    while !scheduler.is_idle() {
        for (_, event) in scheduler.step() {
            if let Event::Failed(error, _) = event {
                return Err(error);
            }
        }
    }
    Ok(tokens as f64 / started.elapsed().as_secs_f64())
}

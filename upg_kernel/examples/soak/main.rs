//! Soak test: uses one model from four threads for an hour, and checks that memory and
//! threads stay constant.
//!
//! ```text
//! cargo run --release --example soak -- smollm2-q4.safetensors 60
//! ```
//!
//! `tools/soak.sh` runs it. Every ten seconds all threads release what they hold. Memory then
//! consists of the model and its caches, so that the allocated bytes show any leak exactly. The
//! resident size also includes freed memory that the allocator keeps.

#[path = "../../tests/common/counting.rs"]
mod counting;
mod samples;
mod work;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use samples::{Limits, Sample};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use upg_kernel::{Error, ErrorKind, Result, UPGModel};
use work::{KINDS, Worker};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

const USAGE: &str = "usage: soak FILE [MINUTES [SEED]]";
const THREADS: u64 = 4;
const EVERY: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("soak: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether everything stayed within the limits.
fn run() -> Result<bool> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage =
        |e: &dyn std::fmt::Display| Error::new(ErrorKind::Argument, e.to_string()).hint(USAGE);
    let path = args.first().ok_or_else(|| usage(&"no file"))?;
    let number = |index: usize, default: f64| match args.get(index) {
        Some(text) => text.parse().map_err(|e| usage(&format!("'{text}': {e}"))),
        None => Ok(default),
    };
    let (minutes, seed) = (number(1, 60.0)?, number(2, 1.0)? as u64);
    if !(0.1..=100_000.0).contains(&minutes) {
        return Err(usage(&format!("{minutes} minutes, expected 0.1 to 100000")));
    }
    let model = Arc::new(UPGModel::from_file(path)?);
    let shared = Shared::default();
    let samples = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let random =
                    ChaCha8Rng::seed_from_u64(seed.wrapping_mul(THREADS).wrapping_add(thread));
                let worker = Worker::new(Arc::clone(&model), random);
                let shared = &shared;
                scope.spawn(move || shared.work(worker))
            })
            .collect();
        let is_over = || threads.iter().any(|thread| thread.is_finished());
        let samples = shared.watch(Duration::from_secs_f64(60.0 * minutes), is_over);
        shared.ends.store(true, Ordering::Relaxed);
        let ended = threads.into_iter().map(|thread| thread.join());
        let ended: Vec<_> = ended
            .map(|end| end.unwrap_or_else(|_| Err(panicked())))
            .collect();
        ended
            .into_iter()
            .collect::<Result<Vec<()>>>()
            .map(|_| samples)
    })?;
    for (kind, done) in KINDS.iter().zip(&shared.done) {
        println!("{:>9} x {kind}", done.load(Ordering::Relaxed));
    }
    Ok(samples::judge(&samples, &Limits::default()))
}

fn panicked() -> Error {
    Error::new(ErrorKind::Invalid, "a thread panicked: see above")
}

/// State shared by the threads.
#[derive(Default)]
struct Shared {
    ends: AtomicBool,
    /// Lock that a thread holds shared while it works, and the sampler exclusively.
    quiet: RwLock<()>,
    done: [AtomicU64; KINDS.len()],
}

impl Shared {
    fn work(&self, mut worker: Worker) -> Result<()> {
        worker.fill_caches()?;
        while !self.ends.load(Ordering::Relaxed) {
            let _working = self.quiet.read().map_err(|_| panicked())?;
            let kind = worker.run()?;
            self.done[kind].fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Takes a sample every ten seconds, until the time is over or a thread has ended with an
    /// error or a panic.
    fn watch(&self, time: Duration, is_over: impl Fn() -> bool) -> Vec<Sample> {
        let started = Instant::now();
        let (mut samples, mut next) = (Vec::new(), EVERY);
        println!("{}", samples::HEADER);
        while started.elapsed() < time && !is_over() {
            std::thread::sleep(Duration::from_millis(50));
            if started.elapsed() < next {
                continue;
            }
            next += EVERY;
            // Every thread is between two pieces of work and holds nothing.
            let Ok(_quiet) = self.quiet.write() else {
                break;
            };
            let done = self.done.iter().map(|n| n.load(Ordering::Relaxed)).sum();
            let sample = Sample::take(started.elapsed(), done);
            println!("{sample}");
            samples.push(sample);
        }
        samples
    }
}

//! Progress bar over the weights of a model, with the remaining time.
#![forbid(unsafe_code)]

use crate::signals;
use crate::terminal::{self, duration};
use indicatif::ProgressBar;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use upg_compress::Progress;
use upg_kernel::Result;

/// Interval between lines where no bar can be drawn.
const LINES_EVERY: Duration = Duration::from_secs(60);

/// Divisor of the weights: this fraction must be done before a remaining time is shown.
const LEAST_PART: u64 = 20;

/// Progress bar over weights that also checks for Ctrl-C.
///
/// Prints one line per minute if standard error is not a terminal.
pub struct WeightsBar {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
    started: Instant,
    /// Seconds that the work was estimated to take before it began.
    estimate: Option<f64>,
    speed: Mutex<Speed>,
}

/// Speed of the layers; the phase before them may be much faster.
struct Speed {
    /// Start of the first layer of this run, and the weights done by then.
    first: Option<(Instant, u64)>,
    /// Time of the last printed line.
    told: Instant,
}

impl WeightsBar {
    /// Creates the bar of a work that takes about `estimate` seconds; `None`: nobody knows.
    pub fn new(estimate: Option<f64>) -> Result<Self> {
        Ok(Self {
            bar: terminal::bar(0, "{bar:24} {percent:>3}%  {wide_msg}"),
            interrupted: signals::interrupt_flag()?,
            started: Instant::now(),
            estimate,
            speed: Mutex::new(Speed {
                first: None,
                told: Instant::now(),
            }),
        })
    }

    /// Estimates the remaining seconds: from the layers so far, and before there are some, from
    /// the estimate before the work.
    fn left(&self, speed: &Speed) -> Option<f64> {
        let of_estimate = || {
            self.estimate
                .map(|all| all - self.started.elapsed().as_secs_f64())
        };
        self.measured(speed)
            .or_else(|| of_estimate().filter(|left| *left > 1.0))
    }

    /// Estimates the remaining seconds from the layers so far; `None` while there are too few.
    fn measured(&self, speed: &Speed) -> Option<f64> {
        let (started, before) = speed.first?;
        let position = self.bar.position();
        let all = self.bar.length()?;
        let done = position.checked_sub(before)?;
        if done == 0 || done < all / LEAST_PART {
            return None;
        }
        let weights = all.saturating_sub(position);
        Some(started.elapsed().as_secs_f64() * weights as f64 / done as f64)
    }
}

impl Progress for WeightsBar {
    fn start(&self, weights: u64) {
        self.bar.set_length(weights);
        // The phase before is not the measured work.
        let mut speed = self.speed.lock().unwrap_or_else(|e| e.into_inner());
        speed.first = None;
    }

    fn tensor(&self, name: &str) {
        let mut speed = self.speed.lock().unwrap_or_else(|e| e.into_inner());
        if name.starts_with("model.layers.") {
            speed
                .first
                .get_or_insert((Instant::now(), self.bar.position()));
        }
        let left = self.left(&speed);
        let left = left.map_or(String::new(), |s| format!("{} left, ", duration(s)));
        if self.bar.is_hidden() && speed.told.elapsed() >= LINES_EVERY {
            speed.told = Instant::now();
            let done = match self.bar.length() {
                // The phase before the first tensor is not counted.
                None | Some(0) => String::new(),
                Some(all) => format!("{:.1} %, ", 100.0 * self.bar.position() as f64 / all as f64),
            };
            terminal::note(format_args!("upg: {done}{left}{name}"));
        }
        self.bar
            .set_message(format!("{left}{}", terminal::label(name)));
    }

    fn advance(&self, weights: u64) {
        self.bar.inc(weights);
    }

    fn is_cancelled(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

impl Drop for WeightsBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

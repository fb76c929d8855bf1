//! Progress over the weights of a model, with the time that is left.
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

/// How often a line is written where no bar can be drawn.
const LINES_EVERY: Duration = Duration::from_secs(60);

/// What has to be done before the time that is left is told, as one part of so many of the weights.
const LEAST_PART: u64 = 100;

/// Bar over weights, with Ctrl-C. Where standard error is no terminal, a line a minute.
pub struct WeightsBar {
    bar: ProgressBar,
    interrupted: Arc<AtomicBool>,
    speed: Mutex<Speed>,
}

/// How fast the layers go by: what comes before them may be much faster.
struct Speed {
    /// When the first layer of this run began, and how many weights were done then.
    first: Option<(Instant, u64)>,
    /// When the last line was written.
    told: Instant,
}

impl WeightsBar {
    pub fn new() -> Result<Self> {
        Ok(Self {
            bar: terminal::bar(
                0,
                "{bar:30} {percent:>3}%  {human_pos}/{human_len} weights  {msg}",
            ),
            interrupted: signals::interrupt_flag()?,
            speed: Mutex::new(Speed {
                first: None,
                told: Instant::now(),
            }),
        })
    }

    /// Seconds until the end, by the layers so far; `None` while that would be a guess.
    fn left(&self, speed: &Speed) -> Option<f64> {
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
        // What came before is not the work that is counted.
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
                // What comes before the first tensor is not counted.
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

//! How long work is watched, and stopped.
#![forbid(unsafe_code)]

use upg_kernel::{Error, ErrorKind, Result};

/// Hears of the work as it goes on; every method may do nothing.
pub trait Progress: Sync {
    /// Before the first tensor: how many weights there are in all.
    fn start(&self, _weights: u64) {}
    /// Before each tensor, some of which are done side by side: called from any thread.
    fn tensor(&self, _name: &str) {}
    /// After each part of the work: the weights it had. Called from any thread.
    fn advance(&self, _weights: u64) {}
    /// Weights that an earlier run has done already: as [`Progress::advance`], but they took no time.
    fn restored(&self, weights: u64) {
        self.advance(weights);
    }
    /// Asked before each part; `true` ends the work with an error of kind `Interrupted`.
    fn is_cancelled(&self) -> bool {
        false
    }
    /// That error, once cancelled.
    fn check_interrupt(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped before the end")),
            false => Ok(()),
        }
    }
}

/// No progress report.
impl Progress for () {}

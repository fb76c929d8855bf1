//! Progress of long work, and its interruption.
#![forbid(unsafe_code)]

use upg_kernel::{Error, ErrorKind, Result};

/// Receives reports of the work as it proceeds; every method may do nothing.
pub trait Progress: Sync {
    /// Reports the number of weights in all, before the first tensor.
    fn start(&self, _weights: u64) {}
    /// Reports a tensor before it is processed. Called from any thread.
    fn tensor(&self, _name: &str) {}
    /// Reports the weights of a finished part of the work. Called from any thread.
    fn advance(&self, _weights: u64) {}
    /// Reports weights that an earlier run has finished.
    ///
    /// Does what [`Progress::advance`] does, for weights that took no time.
    fn restored(&self, weights: u64) {
        self.advance(weights);
    }
    /// Returns whether the work shall end with an error of kind `Interrupted`. Asked before each
    /// part.
    fn is_cancelled(&self) -> bool {
        false
    }
    /// Fails with kind `Interrupted` once the work is cancelled.
    fn check_interrupt(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped before the end")),
            false => Ok(()),
        }
    }
}

/// No progress report.
impl Progress for () {}

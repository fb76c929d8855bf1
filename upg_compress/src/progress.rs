//! Progress of long work, and its interruption.
#![forbid(unsafe_code)]

use upg_kernel::{Error, ErrorKind, Result};

/// Receiver of progress reports; every method may do nothing.
pub trait Progress: Sync {
    /// Reports the total number of weights, before the first tensor.
    fn start(&self, _weights: u64) {}
    /// Reports a tensor before it is processed. Called from any thread.
    fn tensor(&self, _name: &str) {}
    /// Reports the weights of a finished part of the work. Called from any thread.
    fn advance(&self, _weights: u64) {}
    /// Reports weights that an earlier run has finished.
    ///
    /// Like [`Progress::advance`], for weights that took no time.
    fn restored(&self, weights: u64) {
        self.advance(weights);
    }
    /// Returns whether the work should end with an error of kind `Interrupted`. Called before
    /// each part.
    fn is_cancelled(&self) -> bool {
        false
    }
    /// Returns an error of kind `Interrupted` once the work is cancelled.
    fn check_interrupt(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped before the end")),
            false => Ok(()),
        }
    }
}

/// Ignores all progress.
impl Progress for () {}

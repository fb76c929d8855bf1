//! Fuzz targets.
//!
//! Each takes arbitrary bytes as untrusted input, and must neither panic, nor touch memory outside
//! its own, nor take long. `fuzz/run.sh` runs them. [`targets`] defines what they do with an input.
//! A test of the library compiles it too, to run every stored input.
#![forbid(unsafe_code)]

pub mod targets;

/// Allows panics that the library contains: libFuzzer's hook would end the process at the
/// panic itself.
///
/// A panic that leaves a target still ends it.
pub fn init() {
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
}

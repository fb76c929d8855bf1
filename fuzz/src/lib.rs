//! Fuzz targets: each takes any bytes as an input that nobody trusts, and must neither panic, nor touch memory outside of
//! its own, nor take long.
//!
//! `fuzz/run.sh` runs them. What they do with an input is in [`targets`], which a test of the library compiles too, to run
//! every stored input.
#![forbid(unsafe_code)]

pub mod targets;

/// Lets panics that the library contains pass: libFuzzer's hook would end the process at the panic itself.
///
/// A panic that leaves a target still ends it.
pub fn init() {
    std::panic::set_hook(Box::new(|info| eprintln!("{info}")));
}

//! Models for the tests of the crates above: copies of tiny ones, and a real one.

use super::data::data;
use std::path::{Path, PathBuf};

/// Copies the config and the weights of two tiny models into a new folder.
pub(crate) fn copy_model(config: &str, weights: &str, to: &Path) {
    std::fs::create_dir(to).expect("a new folder");
    for (from, file) in [(config, "config.json"), (weights, "model.safetensors")] {
        let from = data("tiny-models").join(from).join(file);
        std::fs::copy(from, to.join(file)).expect("a file of a tiny model");
    }
}

/// Returns the path of SmolLM2-135M-Instruct as GGUF.
pub(crate) fn smollm2_gguf() -> PathBuf {
    let path = std::env::var_os("UPG_TEST_GGUF").expect(
        "UPG_TEST_GGUF is not set: run ./test.sh, which downloads SmolLM2-135M-Instruct and sets it",
    );
    path.into()
}

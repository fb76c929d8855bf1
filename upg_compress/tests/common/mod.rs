//! Helpers of several test programs.

use std::path::PathBuf;

/// Returns the path of SmolLM2-135M-Instruct as GGUF.
pub(crate) fn smollm2_gguf() -> PathBuf {
    let path = std::env::var_os("UPG_TEST_GGUF").expect(
        "UPG_TEST_GGUF is not set: run ./test.sh, which downloads SmolLM2-135M-Instruct and sets it",
    );
    path.into()
}

//! Place of the test data.

use std::path::{Path, PathBuf};

/// Returns a file or folder of the test data of `upg_kernel`, for tests of any crate.
pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../upg_kernel/tests/data")
        .join(path)
}

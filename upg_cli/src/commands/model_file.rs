//! UPG files to run or decompress, including version 1.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::{OpenOptions, Result, UPGModel, v1};

/// Opens a UPG file.
///
/// A version 1 file is converted into a temporary file, with a warning.
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<UpgFile>> {
    v1::open_any_with(path, options).map(Arc::new)
}

/// Loads the model of a file that [`open`] accepts.
pub fn load(path: &Path, options: OpenOptions) -> Result<UPGModel> {
    UPGModel::new(open(path, options)?)
}

//! UPG files to run or decompress, of version 1 too.
#![forbid(unsafe_code)]

use std::path::Path;
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::{OpenOptions, Result, UPGModel, v1};

/// Opens a UPG file. One of version 1 is converted into a temporary file, with a warning.
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<UpgFile>> {
    v1::open_any_with(path, options).map(Arc::new)
}

/// Loads the model of a file that [`open`] takes.
pub fn load(path: &Path, options: OpenOptions) -> Result<UPGModel> {
    UPGModel::new(open(path, options)?)
}

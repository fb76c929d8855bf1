//! UPG files to run or decompress, including version 1.
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::model_dir::{MAX_STAND_IN, check_link, check_stand_in};
use upg_kernel::support::open_regular;
use upg_kernel::{Error, OpenOptions, Result, UPGModel, v1};

/// Opens a UPG file.
///
/// A version 1 file is converted into a temporary file, with a warning.
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<UpgFile>> {
    let file = v1::open_any_with(path, options);
    file.map(Arc::new).map_err(|e| explained(path, e))
}

/// Opens a UPG file of the current version. Errors: also those for stand-ins of the file.
pub fn open_current(path: &Path, options: OpenOptions) -> Result<Arc<UpgFile>> {
    let file = UpgFile::open_with(path, options);
    file.map(Arc::new).map_err(|e| explained(path, e))
}

/// Returns the error of opening `path`, or what stands there in place of a model: a link to
/// nothing, a git-lfs pointer, a web page.
fn explained(path: &Path, error: Error) -> Error {
    let check = || -> Result<()> {
        check_link(path)?;
        let mut start = Vec::new();
        // What cannot be read has an error already.
        if let Ok((file, _)) = open_regular(path) {
            let _ = file.take(MAX_STAND_IN as u64 + 1).read_to_end(&mut start);
        }
        check_stand_in(path, &start)
    };
    check().err().unwrap_or(error)
}

/// Loads the model of a file that [`open`] accepts.
pub fn load(path: &Path, options: OpenOptions) -> Result<UPGModel> {
    UPGModel::new(open(path, options)?)
}

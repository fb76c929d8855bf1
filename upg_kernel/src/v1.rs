//! Version 1 files, Python pickles: reading and converting them without executing them.
//!
//! `docs/migrating-from-v1.md` has the schema. A pickle is a program, which Python's `pickle` runs
//! together with everything it imports. Here a restricted machine ([`V1File::open`]) knows only the
//! opcodes and the globals of numpy and scipy that such a file needs. It interprets a call as the
//! description of an array. The first unknown opcode or global is an error. Arrays are never in
//! memory as a whole: they stay in the file until they are converted.
//!
//! `convert_pickle_to_safetensors.py` does the same in Python, byte for byte.
#![forbid(unsafe_code)]

mod bytes;
mod catalogue;
mod convert;
mod globals;
mod lists;
mod numbers;
mod numpy;
mod objects;
mod pickle;
mod rows;

pub use catalogue::{Catalogue, CatalogueEntry};
pub use convert::Converted;

use crate::error::{Error, Result};
use crate::files::{self, folder_of};
use crate::format::{UpgFile, begins_as_pickle};
use crate::inference::model_dir::ModelFiles;
use crate::mapped::{MappedFile, OpenOptions};
use bytes::Files;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Version 1 file: its catalogue and the location of its arrays.
pub struct V1File {
    path: PathBuf,
    files: Files,
    catalogue: Catalogue,
}

/// Returns whether `path` starts like a pickle of protocol 2 to 5; also `false` if it cannot
/// be read.
pub fn is_pickle(path: &Path) -> bool {
    let start = || -> Option<Vec<u8>> {
        let mut start = Vec::new();
        let (file, _) = files::open_regular(path).ok()?;
        file.take(16).read_to_end(&mut start).ok()?;
        Some(start)
    };
    start().is_some_and(|start| begins_as_pickle(&start))
}

impl V1File {
    /// Reads the catalogue of a file.
    ///
    /// `buffers` are the files of its out-of-band buffers (protocol 5), in the order in which they
    /// were written; most files have none.
    ///
    /// Cost: the opcodes of the pickle; arrays, and the numbers of long lists, are skipped. Memory:
    /// at most about 200 MB for any file. Errors: `Io`; `Malformed` for an incomplete pickle;
    /// `Unsupported` for an opcode or a global that no version 1 file has; `TooLarge` for more than
    /// 524,288 objects or 2,097,152 opcodes; `Missing`, `Invalid`, `Shape` or `Unsupported` for
    /// deviations from the schema.
    pub fn open(path: impl AsRef<Path>, buffers: &[PathBuf]) -> Result<Self> {
        let path = path.as_ref();
        let read = || {
            let files = Files::open(path, buffers)?;
            let (objects, top) = pickle::read(&files)?;
            let catalogue = Catalogue::read(&objects, top)?;
            Ok(Self {
                path: path.to_path_buf(),
                files,
                catalogue,
            })
        };
        read().map_err(|e: Error| e.at(path))
    }

    /// Returns the catalogue of the file.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Returns the path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Opens a UPG file of version 1 or 2.
///
/// A version 1 file is converted into an unnamed temporary file, with a warning to `log`. The texts
/// of the model (`config.json` and so on) come from its folder.
///
/// Cost for version 1: that of [`V1File::convert`], and space in the folder for temporary files.
/// Nothing is left there however the process ends. Errors: those of [`UpgFile::open`],
/// [`V1File::open`], [`V1File::convert`] and [`ModelFiles::read`].
pub fn open_any(path: impl AsRef<Path>) -> Result<UpgFile> {
    open_any_with(path, OpenOptions::default())
}

/// Runs [`open_any`] with options. Errors: also those of [`UpgFile::open_with`].
pub fn open_any_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<UpgFile> {
    let path = path.as_ref();
    if !is_pickle(path) {
        return UpgFile::open_with(path, options);
    }
    let v1 = V1File::open(path, &[])?;
    log::warn!(
        "{}: a file of version 1 is deprecated, and converted each time it is opened; convert it once with `upg convert`",
        path.display().to_string().escape_debug()
    );
    let texts = ModelFiles::read(folder_of(path))?;
    let file = v1.convert_to_temporary(&texts)?;
    UpgFile::checked(MappedFile::of_open_file(&file, path, options)?, options)
}

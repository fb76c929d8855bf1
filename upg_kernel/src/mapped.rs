//! The only memory map of the project.

use crate::error::{Error, Result};
use std::fs::File;
use std::ops::Deref;
use std::path::{Path, PathBuf};

/// A file mapped read-only into memory; its pages are read from disk when first touched.
///
/// The file must not be changed in place while it is mapped: on most systems a reader then sees the
/// new bytes, and touching a part that was cut off ends the process with a bus error. UPG's own
/// writer never changes a file in place: it renames a finished new one over the old one, and an open
/// map keeps the old one.
pub struct MappedFile {
    map: memmap2::Mmap,
    path: PathBuf,
}

impl MappedFile {
    /// Maps `path`. Cost: one system call, no reading. Errors: kind `Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |e| Error::io("cannot open", path, e);
        // Before it is opened: opening a pipe waits for its other end.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(io(std::io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is private to this value, never written through, and handed out only as
        // `&[u8]` bound to its life. Another process that truncates the file under us can end this
        // process (documented above), but bytes that change are plain data to every reader here:
        // each value read is checked or masked where it is used as an index.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
        Ok(Self {
            map,
            path: path.to_path_buf(),
        })
    }

    /// With another path, for messages.
    pub(crate) fn shown_as(mut self, path: &Path) -> Self {
        self.path = path.to_path_buf();
        self
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl std::fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "MappedFile({}, {} bytes)",
            self.path.display(),
            self.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn maps_what_the_file_holds_even_after_it_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"old").unwrap();
        let map = MappedFile::open(&path).unwrap();
        std::fs::write(dir.path().join("g"), b"newer").unwrap();
        std::fs::rename(dir.path().join("g"), &path).unwrap();
        assert_eq!(&map[..], b"old");
    }

    #[test]
    fn a_missing_file_and_a_directory_are_io_errors() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none"), dir.path().to_path_buf()] {
            let e = MappedFile::open(&path).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Io);
            assert!(e.to_string().contains(&path.display().to_string()));
        }
    }
}

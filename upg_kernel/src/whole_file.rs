//! Files that appear whole or not at all.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file on its way to `path`: written beside it under another name, put in its place by
/// [`WholeFile::commit`]. If that is never reached, nothing is left, and what was at `path` stays.
#[derive(Debug)]
pub struct WholeFile {
    out: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl WholeFile {
    /// Starts a file in the folder of `path`, with the permissions that a new file gets.
    ///
    /// Writes go through a buffer of 1 MiB. Errors: `Io` if the folder cannot be written to.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let folder = folder_of(path);
        if !folder.is_dir() {
            let missing = io::Error::new(io::ErrorKind::NotFound, "no such folder");
            return Err(Error::io("cannot write", path, missing)
                .hint(format!("make the folder {} first", folder.display())));
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".upg-").suffix(".partial");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temporary = builder
            .tempfile_in(folder)
            .map_err(|e| Error::io("cannot write", path, e))?;
        Ok(Self {
            out: BufWriter::with_capacity(1 << 20, temporary),
            path: path.to_path_buf(),
        })
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes everything to disk, then puts the file in its place. Errors: `Io`.
    pub fn commit(self) -> Result<()> {
        let Self { out, path } = self;
        let finish = || -> io::Result<()> {
            let file = out.into_inner().map_err(|e| e.into_error())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|e| e.error)?;
            // The name is on disk only when its folder is.
            #[cfg(unix)]
            std::fs::File::open(folder_of(&path))?.sync_all()?;
            Ok(())
        };
        finish().map_err(|e| Error::io("cannot write", &path, e))
    }
}

impl Write for WholeFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Seek for WholeFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.out.seek(to)
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_shows_before_the_commit_and_nothing_else_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"old").unwrap();
        let mut dropped = WholeFile::create(&path).unwrap();
        dropped.write_all(b"half").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        drop(dropped);
        assert_eq!(names(dir.path()), ["f"]);

        let mut file = WholeFile::create(&path).unwrap();
        file.write_all(b"..new").unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.write_all(b"a ").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"a new");
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[cfg(unix)]
    #[test]
    fn others_can_read_it_as_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let metadata = std::fs::metadata(dir.path().join(name)).unwrap();
            metadata.permissions().mode()
        };
        std::fs::write(dir.path().join("plain"), b"").unwrap();
        let file = WholeFile::create(dir.path().join("whole")).unwrap();
        file.commit().unwrap();
        assert_eq!(mode("whole"), mode("plain"));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_io_error() {
        let dir = tempfile::tempdir().unwrap();
        let e = WholeFile::create(dir.path().join("none/f")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Io);
    }
}

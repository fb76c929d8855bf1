//! Memory map of a file, the only one of the project.

mod live;

use crate::error::{Error, ErrorKind, Result};
use crate::files;
use live::Listed;
use memmap2::{Mmap, MmapMut};
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::ops::Deref;
use std::path::{Path, PathBuf};

pub use live::{MAPPED_PATH_BYTES, mapped_path_at};

/// Options for opening weight files. The default maps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenOptions {
    /// Maps files if true, else reads them into memory.
    ///
    /// A map reads nothing before it is used, and costs only memory that the system can reclaim. A
    /// file in memory is read as a whole, and a UPG file is then verified against its checksums.
    /// Use this for network drives and for files that others may write.
    pub mmap: bool,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { mmap: true }
    }
}

impl OpenOptions {
    /// Returns options that read a file into memory.
    pub fn in_memory() -> Self {
        Self { mmap: false }
    }
}

/// Read-only file in memory, mapped or read as a whole.
///
/// The pages of a mapped file are read from disk when first touched.
///
/// A mapped file must not be changed in place. On most systems a reader then sees the new bytes,
/// and touching a part that was cut off ends the process with a bus error. Copying another file
/// over it does both. Replace it by renaming, as UPG's own writer does: an open map keeps the old
/// file. Use [`MappedFile::read`] for files where that is not guaranteed.
pub struct MappedFile {
    /// First field: it leaves the list before its addresses are free for other maps.
    _listed: Option<Listed>,
    map: Mmap,
    path: PathBuf,
}

impl MappedFile {
    /// Maps `path`. Cost: one system call, no reading. Errors: kind `Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions { mmap: true })
    }

    fn map(file: &File, path: &Path) -> Result<Self> {
        // SAFETY: `map` requires that the file does not change while it is mapped. No process can
        // promise that for others: a private map shares its pages with a process that writes the
        // file in place, and a `&[u8]` or `&[T]` whose bytes change is outside Rust's model. UPG
        // relies on the following instead. The map is private to this value, never written through,
        // and lent only for its life. Values read from it have types for which all bit patterns are
        // valid (`Pod`), so no read creates an invalid value. An index is computed from one read
        // and bounded where it is used, independent of earlier checks of the file. Texts are copied
        // before they are parsed, so none changes after it was found to be UTF-8. A change then
        // gives wrong numbers or an error, but no access outside an array. A part that was cut off
        // ends the process with a bus error (documented above). Callers that cannot rule out
        // changes have `MappedFile::read`.
        let map = unsafe { Mmap::map(file) }.map_err(|e| Error::io("cannot open", path, e))?;
        Ok(Self {
            _listed: Listed::new(&map, path),
            map,
            path: path.to_path_buf(),
        })
    }

    /// Reads `path` into page-aligned memory.
    ///
    /// Cost: the memory and the time to read the whole file. Errors: `Io`, also if the file changes
    /// meanwhile, as far as its length and modification time show; `TooLarge` if the memory cannot
    /// be allocated.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions { mmap: false })
    }

    fn read_all(mut file: &File, path: &Path) -> Result<Self> {
        let io = |e| Error::io("cannot read", path, e);
        let before = file.metadata().map_err(io)?;
        let no_memory = |e: io::Error| {
            let message = format!("no memory for its {} bytes: {e}", before.len());
            Error::new(ErrorKind::TooLarge, message)
                .at(path)
                .hint("map the file instead of reading it, or end other programs")
        };
        let len = usize::try_from(before.len()).map_err(|e| no_memory(io::Error::other(e)))?;
        let mut memory = MmapMut::map_anon(len).map_err(no_memory)?;
        let is_whole = fill(&mut memory, &mut file).map_err(io)?;
        let after = file.metadata().map_err(io)?;
        if !is_whole || state(&before) != state(&after) {
            let message = "the file changed while it was read";
            return Err(Error::new(ErrorKind::Io, message)
                .at(path)
                .hint("try again when nobody writes it"));
        }
        Ok(Self {
            _listed: None,
            map: memory.make_read_only().map_err(io)?,
            path: path.to_path_buf(),
        })
    }

    /// Runs [`MappedFile::open`] or [`MappedFile::read`].
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let (file, _) = files::open_regular(path).map_err(|e| Error::io("cannot open", path, e))?;
        Self::of_open_file(&file, path, options)
    }

    /// Runs [`MappedFile::open_with`] on an open file, read from its position on.
    /// Messages name `path`.
    pub(crate) fn of_open_file(file: &File, path: &Path, options: OpenOptions) -> Result<Self> {
        match options.mmap {
            true => Self::map(file, path),
            false => Self::read_all(file, path),
        }
    }

    /// Returns the path it was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Fills `memory`; `false` if there are fewer bytes, or more.
fn fill(memory: &mut [u8], from: &mut impl Read) -> io::Result<bool> {
    match from.read_exact(memory) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(e) => return Err(e),
    }
    Ok(from.take(1).read_to_end(&mut Vec::new())? == 0)
}

/// Returns length and modification time, which differ after most changes of a file.
fn state(metadata: &Metadata) -> (u64, Option<std::time::SystemTime>) {
    (metadata.len(), metadata.modified().ok())
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
    fn what_was_read_stays_whatever_becomes_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        for content in [&b""[..], b"old", &[7; 10_000]] {
            std::fs::write(&path, content).unwrap();
            let read = MappedFile::read(&path).unwrap();
            assert!(read.as_ptr().addr().is_multiple_of(64));
            std::fs::write(&path, b"").unwrap();
            assert!(&read[..] == content);
            assert_eq!(read.path(), path);
        }
    }

    #[test]
    fn a_file_of_another_length_than_it_had_is_seen() {
        let mut memory = [0; 4];
        for (found, is_whole) in [("123", false), ("1234", true), ("12345", false)] {
            let filled = fill(&mut memory, &mut found.as_bytes()).unwrap();
            assert_eq!(filled, is_whole, "{found}");
        }
    }

    #[test]
    fn only_what_is_mapped_is_listed_and_only_while_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [1; 5000]).unwrap();
        let is_listed = |address| {
            let mut found = [0; MAPPED_PATH_BYTES];
            let len = mapped_path_at(address, &mut found);
            len.is_some_and(|len| found[..len] == *path.to_str().unwrap().as_bytes())
        };
        let map = MappedFile::open(&path).unwrap();
        let address = map.as_ptr().addr();
        assert!(is_listed(address) && is_listed(address + 4999) && !is_listed(address + 5000));
        drop(map);
        assert!(!is_listed(address));
        let read = MappedFile::read(&path).unwrap();
        assert!(!is_listed(read.as_ptr().addr()));
    }

    #[test]
    fn a_missing_file_and_a_directory_are_io_errors() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none"), dir.path().to_path_buf()] {
            for options in [OpenOptions::default(), OpenOptions::in_memory()] {
                let e = MappedFile::open_with(&path, options).unwrap_err();
                assert_eq!(e.kind(), ErrorKind::Io);
                assert!(e.to_string().contains(&path.display().to_string()));
            }
        }
    }
}

//! Regular files: non-blocking open and bounded reads.
#![forbid(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::path::Path;

/// Opens the regular file at `path` for reading, through links; also returns its metadata.
///
/// Never blocks: a pipe or a device that replaces the file at any moment is refused. Errors: those
/// of the system, and "not a regular file".
pub fn open_regular(path: &Path) -> io::Result<(File, Metadata)> {
    // Opening a device may have an effect, so the path is checked before. The check of the opened
    // file decides.
    check_regular(&std::fs::metadata(path)?)?;
    open_and_check(path)
}

fn open_and_check(path: &Path) -> io::Result<(File, Metadata)> {
    let file = options(false).read(true).open(path)?;
    let metadata = file.metadata()?;
    check_regular(&metadata)?;
    Ok((file, metadata))
}

/// Reads `from` to its end; returns `None` if there are more than `most` bytes.
///
/// `expected` is the declared length; memory for it is allocated at once. Errors: those of `from`.
pub fn read_at_most(from: impl Read, expected: u64, most: u64) -> io::Result<Option<Vec<u8>>> {
    if expected > most {
        return Ok(None);
    }
    let mut bytes = Vec::with_capacity(expected as usize);
    // A file may grow meanwhile.
    from.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= most).then_some(bytes))
}

/// Returns the folder that `path` is in: `.` for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Maximum files that one model is split into; real ones have up to about 200.
pub const MAX_PARTS: usize = 4096;

/// Name of a part of a model that is split into files: `NAME-00002-of-00003`, without extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartName<'a> {
    /// Common beginning of the names of all parts.
    pub name: &'a str,
    /// Number of the part, from 1 on.
    pub number: usize,
    /// Number of parts, [`MAX_PARTS`] at most.
    pub count: usize,
}

impl<'a> PartName<'a> {
    /// Recognizes a part by its name without extension.
    pub fn of(stem: &'a str) -> Option<Self> {
        let (rest, count) = stem.rsplit_once("-of-")?;
        let (name, number) = rest.rsplit_once('-')?;
        let parsed = |text: &str| -> Option<usize> {
            let is_number = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| is_number)
        };
        let (number, count) = (parsed(number)?, parsed(count)?);
        let is_part = (1..=count).contains(&number) && count <= MAX_PARTS;
        is_part.then_some(Self {
            name,
            number,
            count,
        })
    }

    /// Returns the name of another part with this extension, for `number` from 1 on.
    pub fn file_name(&self, number: usize, extension: &str) -> String {
        format!("{}-{number:05}-of-{:05}.{extension}", self.name, self.count)
    }
}

/// Returns an error unless `metadata` belongs to a regular file.
pub(crate) fn check_regular(metadata: &Metadata) -> io::Result<()> {
    match metadata.is_file() {
        true => Ok(()),
        false => Err(irregular()),
    }
}

pub(crate) fn irregular() -> io::Error {
    io::Error::other("not a regular file")
}

/// Returns options that open a file without blocking on a pipe and, with `no_follow`, without
/// following a link.
pub(crate) fn options(no_follow: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    {
        use nix::fcntl::OFlag;
        let mut flags = OFlag::O_NONBLOCK;
        flags.set(OFlag::O_NOFOLLOW, no_follow);
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags.bits());
    }
    #[cfg(windows)]
    if no_follow {
        const FILE_FLAG_OPEN_REPARSE_POINT: u32 = 0x0020_0000;
        let flags = FILE_FLAG_OPEN_REPARSE_POINT;
        std::os::windows::fs::OpenOptionsExt::custom_flags(&mut options, flags);
    }
    #[cfg(not(any(unix, windows)))]
    let _ = no_follow;
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regular_file_is_opened_and_a_folder_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        let (file, metadata) = open_regular(&path).unwrap();
        assert_eq!(metadata.len(), 3);
        assert_eq!(read_at_most(file, 3, 3).unwrap().unwrap(), b"abc");
        let e = open_regular(dir.path()).unwrap_err();
        assert_eq!(e.to_string(), "not a regular file");
        let e = open_regular(&dir.path().join("none")).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
    }

    /// A pipe that replaces a file after the file was checked.
    #[cfg(unix)]
    #[test]
    fn a_pipe_that_nobody_writes_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        for opened in [open_regular(&pipe), open_and_check(&pipe)] {
            assert_eq!(opened.unwrap_err().to_string(), "not a regular file");
        }
    }

    #[test]
    fn no_more_is_read_than_allowed() {
        let read = |expected, most| read_at_most(&b"abcd"[..], expected, most).unwrap();
        assert_eq!(read(4, 4).unwrap(), b"abcd");
        assert_eq!(read(0, 4).unwrap(), b"abcd");
        // The file has grown, or its declared length is too large.
        assert_eq!(read(3, 3), None);
        assert_eq!(read(5, 4), None);
    }
}

//! Bytes that stay in their files until conversion:
//! a pickle of many gigabytes is never in memory.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::files;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Size of the read buffer in bytes.
const BUFFER: usize = 1 << 17;

/// Range of bytes in the pickle (file 0) or in a file of an out-of-band buffer.
#[derive(Debug, Clone)]
pub(super) struct Bytes {
    pub file: usize,
    pub start: u64,
    pub len: u64,
    /// Flag for protocol 2, which has no bytes: each byte is a character up to U+00FF, in UTF-8.
    pub latin1: bool,
}

/// The pickle and the files of its out-of-band buffers.
///
/// They are read, not mapped: pages of a map would count as memory.
pub(super) struct Files(Vec<OpenFile>);

struct OpenFile {
    file: Mutex<File>,
    len: u64,
    path: PathBuf,
}

impl Files {
    /// Opens the files. Errors: `Io`.
    pub(super) fn open(pickle: &Path, buffers: &[PathBuf]) -> Result<Self> {
        let paths = std::iter::once(pickle).chain(buffers.iter().map(PathBuf::as_path));
        paths.map(OpenFile::new).collect::<Result<_>>().map(Self)
    }

    /// Returns the number of files of out-of-band buffers.
    pub(super) fn buffers(&self) -> usize {
        self.0.len() - 1
    }

    /// Returns the total bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |sum, file| sum.saturating_add(file.len))
    }

    /// Returns the whole of a file; panics if it does not exist.
    pub(super) fn whole(&self, file: usize) -> Bytes {
        Bytes {
            file,
            start: 0,
            len: self.0[file].len,
            latin1: false,
        }
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|file| file.path.as_path())
    }

    /// Returns a reader of the raw bytes in the file.
    pub(super) fn buffered(&self, bytes: &Bytes) -> BufReader<Span<'_>> {
        let span = Span {
            file: &self.0[bytes.file],
            start: bytes.start,
            len: bytes.len,
            position: 0,
        };
        BufReader::with_capacity(BUFFER.min(bytes.len as usize).max(64), span)
    }

    /// Returns a reader of the decoded bytes.
    pub(super) fn reader(&self, bytes: &Bytes) -> BytesReader<'_> {
        BytesReader {
            bytes: self.buffered(bytes),
            latin1: bytes.latin1,
            path: &self.0[bytes.file].path,
        }
    }
}

impl OpenFile {
    fn new(path: &Path) -> Result<Self> {
        let io = |e| Error::io("cannot open", path, e);
        let (file, metadata) = files::open_regular(path).map_err(io)?;
        Ok(Self {
            len: metadata.len(),
            file: Mutex::new(file),
            path: path.to_path_buf(),
        })
    }
}

/// Range of a file with its own read position.
pub(super) struct Span<'a> {
    file: &'a OpenFile,
    start: u64,
    len: u64,
    position: u64,
}

impl Read for Span<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.len.saturating_sub(self.position);
        let wanted = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut file = self
            .file
            .file
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.start + self.position))?;
        let read = file.read(&mut out[..wanted])?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for Span<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(to) => Some(to),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
        };
        self.position = to.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// Reader of [`Bytes`] from first to last.
pub(super) struct BytesReader<'a> {
    bytes: BufReader<Span<'a>>,
    latin1: bool,
    path: &'a Path,
}

impl BytesReader<'_> {
    /// Reads the next bytes and fills `out`.
    ///
    /// Errors: `Io`; `Malformed` if there are fewer, or characters that are not bytes.
    pub(super) fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        let filled = match self.latin1 {
            false => self.bytes.read_exact(out),
            true => fill_latin1(&mut self.bytes, out),
        };
        filled.map_err(|e| self.error(e))
    }

    /// Checks that all bytes were read. Errors (`Malformed`): some were not.
    pub(super) fn finish(mut self) -> Result<()> {
        match self.bytes.fill_buf().map(<[u8]>::is_empty) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let message = "an array has more bytes than its shape says";
                Err(Error::new(ErrorKind::Malformed, message))
            }
            Err(e) => Err(self.error(e)),
        }
    }

    fn error(&self, e: io::Error) -> Error {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::new(
                ErrorKind::Malformed,
                "an array has fewer bytes than its shape says",
            ),
            io::ErrorKind::InvalidData => Error::new(
                ErrorKind::Malformed,
                "text in the place of bytes has characters above U+00FF",
            ),
            _ => Error::io("cannot read", self.path, e),
        }
    }
}

/// Decodes characters up to U+00FF, in UTF-8, to bytes.
fn fill_latin1(text: &mut impl BufRead, out: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    // First byte of a character whose second one is past the end of the buffer.
    let mut lead = None;
    while filled < out.len() {
        let available = text.fill_buf()?;
        if available.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut used = 0;
        for &byte in available {
            if filled == out.len() {
                break;
            }
            used += 1;
            let decoded = match (lead.take(), byte) {
                (None, 0..=0x7F) => byte,
                (None, 0xC2 | 0xC3) => {
                    lead = Some(byte);
                    continue;
                }
                (Some(first), 0x80..=0xBF) => (first << 6) | (byte & 0x3F),
                _ => return Err(io::ErrorKind::InvalidData.into()),
            };
            out[filled] = decoded;
            filled += 1;
        }
        text.consume(used);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(content: &[u8]) -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, content).unwrap();
        let files = Files::open(&path, &[]).unwrap();
        (dir, files)
    }

    #[test]
    fn every_byte_comes_back_from_text() {
        let all: Vec<u8> = (0..=255).collect();
        let text: String = all.iter().map(|&b| char::from(b)).collect();
        let (_dir, files) = files(text.as_bytes());
        let mut bytes = files.whole(0);
        bytes.latin1 = true;
        for step in [1, 7, 256] {
            let mut reader = files.reader(&bytes);
            let mut found = vec![0; 256];
            for out in found.chunks_mut(step) {
                reader.fill(out).unwrap();
            }
            assert_eq!(found, all);
            reader.finish().unwrap();
        }
    }

    #[test]
    fn other_characters_and_other_lengths_are_refused() {
        for (text, wanted) in [("ab\u{100}", 3), ("ab", 3), ("\u{20AC}", 1)] {
            let (_dir, files) = files(text.as_bytes());
            let mut bytes = files.whole(0);
            bytes.latin1 = true;
            let e = files.reader(&bytes).fill(&mut vec![0; wanted]);
            assert_eq!(e.unwrap_err().kind(), ErrorKind::Malformed, "{text}");
        }
        let (_dir, files) = files(b"abc");
        let mut reader = files.reader(&files.whole(0));
        reader.fill(&mut [0; 2]).unwrap();
        assert_eq!(reader.finish().unwrap_err().kind(), ErrorKind::Malformed);
    }
}

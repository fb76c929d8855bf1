//! Journal: the tensors that a stopped run has finished,
//! as lines that the next run resumes from.
//!
//! The first line is [`MAGIC`]. Every other line has a checksum, a space and a JSON object: first
//! the fingerprint of the run, then one [`Record`] per tensor in file order. A checksum covers the
//! previous checksum and its own line, so that no line is valid without all those before it. Lines
//! after a torn or damaged one are ignored.
#![forbid(unsafe_code)]

use crate::encode::matrix::Encoded;
use crate::job::report::{TensorReport, zeros_of};
use crate::source::TensorInfo;
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use upg_kernel::format::{LayerInfo, WrittenArray, checksum_of};
use upg_kernel::support::{is_at, open_regular_file, sync_folder_of};
use upg_kernel::{Error, ErrorKind, Result};

/// First line, with the type of the file and the version of its format.
const MAGIC: &str = "upg journal 2\n";

/// Maximum bytes of a journal, far more than the records of the largest list of layers.
const MOST_BYTES: u64 = 1 << 28;

/// Names and values of everything that the output depends on, the most informative first.
pub(crate) type Fingerprint = Vec<(String, String)>;

/// Tensor that is on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub tensor: TensorReport,
    /// Description with its error; `None` for an uncompressed tensor.
    pub layer: Option<LayerInfo>,
    pub arrays: Vec<WrittenArray>,
}

impl Record {
    pub fn encoded(
        tensor: &TensorInfo,
        layer: &LayerInfo,
        encoded: &Encoded,
        arrays: Vec<WrittenArray>,
    ) -> Self {
        Self {
            tensor: TensorReport {
                name: tensor.name.clone(),
                encoding: layer.encoding_name().to_owned(),
                shape: tensor.shape.clone(),
                bytes: arrays.iter().map(|a| a.bytes).sum(),
                weight_error: layer.error,
                output_error: encoded.output_error,
                divergence: encoded.divergence,
                zeros: zeros_of(&encoded.matrix),
                seconds: encoded.seconds,
            },
            layer: Some(layer.clone()),
            arrays,
        }
    }

    pub fn uncompressed(tensor: &TensorInfo, seconds: f64, array: WrittenArray) -> Self {
        Self {
            tensor: TensorReport {
                name: tensor.name.clone(),
                encoding: "keep".to_owned(),
                shape: tensor.shape.clone(),
                bytes: array.bytes,
                weight_error: None,
                output_error: None,
                divergence: None,
                zeros: None,
                seconds,
            },
            layer: None,
            arrays: vec![array],
        }
    }
}

/// Open journal, which nobody else can open meanwhile.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    /// Checksum of the last line.
    chain: String,
}

/// Valid line: its end, its checksum and its JSON.
struct Line<'a> {
    end: usize,
    chain: &'a str,
    json: &'a str,
}

impl Journal {
    /// Opens and locks the journal at `path`, or starts one for a run with this fingerprint.
    ///
    /// Returns the records of an existing journal; `None` for a new one.
    ///
    /// Errors: `Argument` if another run holds it, or it belongs to a run with another fingerprint;
    /// `Malformed` if it is not a journal; `Io`.
    pub fn open(path: PathBuf, fingerprint: &Fingerprint) -> Result<(Self, Option<Vec<Record>>)> {
        let file = lock(&path)?;
        let mut journal = Self {
            file,
            path,
            chain: String::new(),
        };
        let text = journal.read()?;
        let Some(lines) = journal.lines(&text)? else {
            journal.start(fingerprint)?;
            return Ok((journal, None));
        };
        let [first, others @ ..] = &lines[..] else {
            return Err(journal.malformed("its first line is damaged"));
        };
        let found: Fingerprint = journal.parse(first.json)?;
        journal.compare(&found, fingerprint)?;
        let records = others.iter().map(|line| journal.parse(line.json));
        let records = records.collect::<Result<Vec<Record>>>()?;
        journal.keep(&lines, records.len())?;
        Ok((journal, Some(records)))
    }

    fn read(&mut self) -> Result<Vec<u8>> {
        let mut text = Vec::new();
        let limited = (&self.file).take(MOST_BYTES + 1).read_to_end(&mut text);
        limited.map_err(|e| Error::io("cannot read", &self.path, e))?;
        match text.len() as u64 > MOST_BYTES {
            true => Err(self.malformed("it is too long")),
            false => Ok(text),
        }
    }

    /// Returns the valid lines after the first; `None` if not even the fingerprint was written.
    fn lines<'a>(&self, text: &'a [u8]) -> Result<Option<Vec<Line<'a>>>> {
        if MAGIC.as_bytes().starts_with(text) {
            return Ok(None);
        }
        if !text.starts_with(MAGIC.as_bytes()) {
            return Err(self.malformed("it is something else"));
        }
        let mut lines = Vec::new();
        let (mut start, mut chain) = (MAGIC.len(), "");
        while let Some(len) = text[start..].iter().position(|&b| b == b'\n') {
            let line = str::from_utf8(&text[start..start + len]).ok();
            let Some((sum, json)) = line.and_then(|line| line.split_once(' ')) else {
                break;
            };
            if checksum_of(format!("{chain}{json}").as_bytes()) != sum {
                break;
            }
            start += len + 1;
            chain = sum;
            lines.push(Line {
                end: start,
                chain,
                json,
            });
        }
        let is_torn = lines.is_empty() && !text[start..].contains(&b'\n');
        Ok((!is_torn).then_some(lines))
    }

    fn parse<T: for<'a> Deserialize<'a>>(&self, json: &str) -> Result<T> {
        serde_json::from_str(json).map_err(|e| self.malformed(&e.to_string()).with_source(e))
    }

    fn malformed(&self, what: &str) -> Error {
        let message = format!("not a journal of a stopped run: {what}");
        Error::new(ErrorKind::Malformed, message)
            .at(&self.path)
            .hint("remove it to start from scratch, or choose another output")
    }

    /// Compares fingerprints. Errors (`Argument`): the run was started with other input.
    fn compare(&self, found: &Fingerprint, now: &Fingerprint) -> Result<()> {
        fn value<'a>(of: &'a Fingerprint, key: &str) -> Option<&'a str> {
            let mut entries = of.iter();
            entries.find(|(k, _)| k == key).map(|(_, v)| v.as_str())
        }
        let mut keys = now.iter().chain(found).map(|(key, _)| key);
        let Some(key) = keys.find(|key| value(found, key) != value(now, key)) else {
            return Ok(());
        };
        let [found, now] = [found, now].map(|of| value(of, key).unwrap_or("none"));
        let message = format!(
            "the stopped run had another {}: {}, now {}",
            short(key),
            short(found),
            short(now)
        );
        Err(Error::new(ErrorKind::Argument, message)
            .at(&self.path)
            .hint("use the original options and input, or remove this file and the .partial beside it to start from scratch"))
    }

    fn start(&mut self, fingerprint: &Fingerprint) -> Result<()> {
        let io = |e| Error::io("cannot write", &self.path, e);
        self.file.set_len(0).map_err(io)?;
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        self.file.write_all(MAGIC.as_bytes()).map_err(io)?;
        sync_folder_of(&self.path).map_err(io)?;
        self.line(fingerprint)
    }

    /// Truncates the journal after the fingerprint and `records` more lines.
    fn keep(&mut self, lines: &[Line<'_>], records: usize) -> Result<()> {
        let last = &lines[records];
        self.chain = last.chain.to_owned();
        self.file
            .set_len(last.end as u64)
            .and_then(|()| self.file.seek(SeekFrom::End(0)))
            .map(|_| ())
            .map_err(|e| Error::io("cannot write", &self.path, e))
    }

    /// Removes all records except the first `count`. Errors: `Io`;
    /// `Malformed` if there are fewer.
    pub fn forget_after(&mut self, count: usize) -> Result<()> {
        let io = |e| Error::io("cannot read", &self.path, e);
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        let text = self.read()?;
        match self.lines(&text)? {
            Some(lines) if lines.len() > count => self.keep(&lines, count),
            _ => Err(self.malformed("it has changed meanwhile")),
        }
    }

    /// Adds a record of data that is on disk, and syncs it. Errors: `Io`.
    pub fn add(&mut self, record: &Record) -> Result<()> {
        self.line(record)
    }

    fn line(&mut self, value: &impl Serialize) -> Result<()> {
        let json = serde_json::to_string(value)
            .map_err(|e| Error::new(ErrorKind::Argument, e.to_string()).with_source(e))?;
        let chain = checksum_of(format!("{}{json}", self.chain).as_bytes());
        self.file
            .write_all(format!("{chain} {json}\n").as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|e| Error::io("cannot write", &self.path, e))?;
        self.chain = chain;
        Ok(())
    }

    /// Removes the journal. Errors: `Io`.
    pub fn remove(self) -> Result<()> {
        std::fs::remove_file(&self.path)
            .and_then(|()| sync_folder_of(&self.path))
            .map_err(|e| Error::io("cannot remove", &self.path, e))
    }
}

/// Locks the file at `path`, which is created if necessary.
fn lock(path: &Path) -> Result<File> {
    let io = |e| Error::io("cannot open", path, e);
    loop {
        let file = open_regular_file(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(
                    Error::new(ErrorKind::Argument, "another run is writing this output")
                        .at(path)
                        .hint("wait for it, or choose another output"),
                );
            }
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        // The run that held it may have removed it since it was opened;
        // then it is a file without a name.
        if is_at(&file, path) {
            return Ok(file);
        }
    }
}

/// Returns the start of a text, for a message.
fn short(text: &str) -> String {
    const MOST: usize = 200;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ..", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;

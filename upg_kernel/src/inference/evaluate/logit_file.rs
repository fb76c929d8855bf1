//! Logits of a reference in a file, so that they are computed once.
//!
//! The file is little-endian. A header of 64 bytes has magic, vocab, positions, and the SHA-256 of
//! the identity of the logits. Then each position has the largest logit and a step (f32), and for
//! each token of the vocabulary the number of steps that its logit is below the largest (u16). The
//! error of a logit is at most half a step, which is the range of the logits divided by 131,070:
//! 0.0003 for a range of 40.
#![forbid(unsafe_code)]

use super::reference::Reference;
use super::windows::{Window, Windows};
use crate::atomic_file::AtomicFile;
use crate::error::{Error, ErrorKind, Result};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: [u8; 8] = *b"upglogit";
const HEADER: usize = 64;

/// Bytes of the largest logit and the step of a position.
const RANGE: usize = 8;

/// Logits of `reference`, cached in a file.
///
/// They are read from the file if it has them, else computed and written to it. Computed logits are
/// rounded like those read, so that both give the same figures.
pub struct LogitFile<'a> {
    path: PathBuf,
    vocab: usize,
    scored: usize,
    bytes: u64,
    state: State<'a>,
}

enum State<'a> {
    Filled(BufReader<File>),
    Filling(AtomicFile, &'a mut dyn Reference),
}

impl<'a> LogitFile<'a> {
    /// Opens the file at `path`.
    ///
    /// It has the logits if it was written for the same windows and the same `identity`, which
    /// alone identifies the computation of `reference`. Otherwise a new file replaces it at
    /// [`LogitFile::finish`].
    ///
    /// Errors: `Argument` if there is another kind of file at `path`, or one of `inputs`;
    /// `Malformed` if its size does not match its header; `TooLarge` if no file can have so many
    /// logits; `Io`.
    pub fn open(
        path: &Path,
        windows: &Windows,
        vocab: usize,
        identity: &str,
        inputs: &[PathBuf],
        reference: &'a mut dyn Reference,
    ) -> Result<Self> {
        let scored = windows.scored();
        let bytes = file_bytes(windows.count(), scored, vocab)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "too many logits for a file"))?;
        let header = header(windows, vocab, identity);
        let state = match filled(path, &header, bytes)? {
            Some(file) => State::Filled(file),
            None => {
                let mut out = AtomicFile::create_from(path, inputs)?;
                let written = out.write_all(&header);
                written.map_err(|e| Error::io("cannot write", path, e))?;
                State::Filling(out, reference)
            }
        };
        Ok(Self {
            path: path.to_path_buf(),
            vocab,
            scored,
            bytes,
            state,
        })
    }

    /// Returns whether the file had all logits when it was opened.
    pub fn is_filled(&self) -> bool {
        matches!(self.state, State::Filled(_))
    }

    /// Returns the bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Commits a new file, after the last window. Errors: `Io`.
    pub fn finish(self) -> Result<()> {
        match self.state {
            State::Filled(_) => Ok(()),
            State::Filling(out, _) => out.commit(),
        }
    }
}

impl Reference for LogitFile<'_> {
    /// Returns the logits of `window`; windows must be requested in order.
    ///
    /// Errors: those of the reference; `Malformed` for ranges that are not finite; `Io`.
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>> {
        let row = row_bytes(self.vocab);
        let mut rows = vec![0; self.scored * row];
        match &mut self.state {
            State::Filled(file) => {
                let start = HEADER as u64 + window.index as u64 * rows.len() as u64;
                let read = file.seek(SeekFrom::Start(start));
                read.and_then(|_| file.read_exact(&mut rows))
                    .map_err(|e| Error::io("cannot read", &self.path, e))?;
            }
            State::Filling(out, reference) => {
                let logits = reference.logits(window)?;
                if logits.len() != self.scored * self.vocab {
                    return Err(super::other_vocabulary());
                }
                rows.par_chunks_mut(row)
                    .zip(logits.par_chunks(self.vocab))
                    .try_for_each(|(row, logits)| encode(logits, row))?;
                let written = out.write_all(&rows);
                written.map_err(|e| Error::io("cannot write", &self.path, e))?;
            }
        }
        let mut logits = vec![0.0; self.scored * self.vocab];
        rows.par_chunks(row)
            .zip(logits.par_chunks_mut(self.vocab))
            .try_for_each(|(row, logits)| decode(row, logits))
            .map_err(|e| e.at(&self.path))?;
        Ok(logits)
    }
}

fn row_bytes(vocab: usize) -> usize {
    RANGE + 2 * vocab
}

fn file_bytes(windows: usize, scored: usize, vocab: usize) -> Option<u64> {
    let row = vocab.checked_mul(2)?.checked_add(RANGE)?;
    let rows = windows.checked_mul(scored)?;
    u64::try_from(rows.checked_mul(row)?.checked_add(HEADER)?).ok()
}

/// Returns the header of a file with the logits of exactly these windows.
fn header(windows: &Windows, vocab: usize, identity: &str) -> [u8; HEADER] {
    let mut hash = Sha256::new();
    for window in windows.iter() {
        for token in window.input.iter().chain(window.targets) {
            hash.update(token.to_le_bytes());
        }
    }
    hash.update(identity);
    let numbers = [vocab, windows.count(), windows.scored()].map(|n| (n as u64).to_le_bytes());
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..32].copy_from_slice(numbers.as_flattened());
    header[32..].copy_from_slice(&hash.finalize());
    header
}

/// Opens the file at `path` if it has this header;
/// `None` if there is none, or one with other logits.
fn filled(path: &Path, header: &[u8; HEADER], bytes: u64) -> Result<Option<BufReader<File>>> {
    let io = |e| Error::io("cannot read", path, e);
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io)?,
    };
    let found_bytes = file.metadata().map_err(io)?.len();
    let mut file = BufReader::with_capacity(1 << 20, file);
    let mut found = [0; HEADER];
    if found_bytes < HEADER as u64 || file.read_exact(&mut found).is_err() || found[..8] != MAGIC {
        let message = "this is not a file with the logits of a reference";
        return Err(Error::new(ErrorKind::Argument, message)
            .at(path)
            .hint("name a new file, or one that upg eval wrote"));
    }
    if found != *header {
        return Ok(None);
    }
    if found_bytes != bytes {
        let message = format!("{found_bytes} bytes, its header says {bytes}");
        return Err(Error::new(ErrorKind::Malformed, message)
            .at(path)
            .hint("delete it: it will be recomputed"));
    }
    Ok(Some(file))
}

/// Encodes the logits of a position. Errors (`Invalid`): a logit is not finite.
fn encode(logits: &[f32], row: &mut [u8]) -> Result<()> {
    let bounds = (f32::INFINITY, f32::NEG_INFINITY);
    let (min, max) = logits
        .iter()
        .fold(bounds, |(min, max), &l| (min.min(l), max.max(l)));
    let step = (max - min) / f32::from(u16::MAX);
    if !step.is_finite() || logits.iter().any(|l| !l.is_finite()) {
        let message = "a logit of the reference is not finite";
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    let (range, codes) = row.split_at_mut(RANGE);
    range[..4].copy_from_slice(&max.to_le_bytes());
    range[4..].copy_from_slice(&step.to_le_bytes());
    let per_step = if step > 0.0 { 1.0 / step } else { 0.0 };
    for (code, logit) in codes.as_chunks_mut::<2>().0.iter_mut().zip(logits) {
        *code = (((max - logit) * per_step).round() as u16).to_le_bytes();
    }
    Ok(())
}

/// Decodes the logits of a position. Errors (`Malformed`): the range is not finite.
fn decode(row: &[u8], logits: &mut [f32]) -> Result<()> {
    let (range, codes) = row.split_at(RANGE);
    let [max, step] = [0, 4].map(|at| {
        let bytes = [range[at], range[at + 1], range[at + 2], range[at + 3]];
        f32::from_le_bytes(bytes)
    });
    if !(max - step * f32::from(u16::MAX)).is_finite() {
        let message = format!("a position has logits from {max} down in steps of {step}");
        return Err(
            Error::new(ErrorKind::Malformed, message).hint("delete it: it will be recomputed")
        );
    }
    for (logit, code) in logits.iter_mut().zip(codes.as_chunks::<2>().0) {
        *logit = max - step * f32::from(u16::from_le_bytes(*code));
    }
    Ok(())
}

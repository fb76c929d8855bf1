//! Download of one file into the cache: resumed, checked, by one process at a time.
#![forbid(unsafe_code)]

use crate::cache::{Cache, create_folder_of};
use crate::http::{Attempts, Client, Failure, check_interrupt, cut, pause};
use crate::name::ModelName;
use sha2::{Digest, Sha256};
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind as IoKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use upg_kernel::support::sync_folder_of;
use upg_kernel::{Error, ErrorKind, Result};
use ureq::http::{HeaderMap, StatusCode, Uri, header};

/// Bytes that are read at once.
const CHUNK: usize = 1 << 17;

/// Interval in which a process looks whether another one has finished a file.
const LOCK_TICK: Duration = Duration::from_millis(100);

/// Observer of a download. All methods do nothing by default.
pub trait Progress {
    /// A download begins; `bytes` is the size of all files, if it is known.
    fn start(&self, _bytes: Option<u64>) {}

    /// A file begins.
    fn file(&self, _name: &str) {}

    /// Bytes of all files so far. Falls if a file starts again.
    fn position(&self, _bytes: u64) {}

    /// An attempt failed, and another one follows.
    fn retry(&self, _why: &Error) {}

    /// Another process downloads this file, and this one waits for it.
    fn wait(&self, _name: &str) {}
}

impl Progress for () {}

/// Download of files of one commit.
pub(crate) struct Download<'a> {
    pub(crate) client: &'a Client,
    pub(crate) cache: &'a Cache,
    pub(crate) name: &'a ModelName,
    pub(crate) commit: &'a str,
    pub(crate) progress: &'a dyn Progress,
    /// Bytes of the files before this one.
    pub(crate) before: u64,
}

/// Content of a file, by the headers of the server.
struct Blob {
    etag: String,
    bytes: Option<u64>,
}

impl Blob {
    /// Reads the headers. Errors (`Malformed`): no hash, or one that cannot be a file name.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let etag = text("x-linked-etag").or(text("etag"))?.trim();
        let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
        let is_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        let is_sound = (1..=128).contains(&etag.len())
            && etag.bytes().all(is_name)
            && !etag.starts_with('.')
            && !etag.ends_with(".incomplete");
        let bytes = match headers.contains_key(header::LOCATION) {
            // The length of a redirect is not that of the file.
            true => text("x-linked-size"),
            false => text("x-linked-size").or(text("content-length")),
        };
        is_sound.then(|| Self {
            etag: etag.to_owned(),
            bytes: bytes.and_then(|n| n.parse().ok()),
        })
    }

    /// Returns the SHA-256 of the content; that of a small file is not known.
    fn sha256(&self) -> Option<String> {
        let is_hash = self.etag.len() == 64 && self.etag.bytes().all(|b| b.is_ascii_hexdigit());
        is_hash.then(|| self.etag.to_ascii_lowercase())
    }

    /// Returns whether the blob is in the cache.
    fn is_at(&self, path: &Path) -> bool {
        let found = path.metadata().ok().filter(|m| m.is_file());
        found.is_some_and(|m| self.bytes.is_none_or(|n| n == m.len()))
    }
}

impl Download<'_> {
    /// Puts `file` into the snapshot, unless it is there; returns its size.
    ///
    /// Errors: those of the server; `Checksum` if its SHA-256 is not the one that the server
    /// stated, and then nothing of it is left; `Io`; `Interrupted`, which can be resumed.
    pub(crate) fn file(&self, file: &str) -> Result<u64> {
        let link = self.cache.snapshot(self.name, self.commit).join(file);
        if let Ok(metadata) = link.metadata() {
            return Ok(metadata.len());
        }
        self.progress.file(file);
        let address = self.address(file)?;
        let blob = self.blob(&address)?;
        let path = self.cache.blob(self.name, &blob.etag);
        if !blob.is_at(&path) {
            create_folder_of(&path)?;
            let _lock = self.lock(&blob, file)?;
            if !blob.is_at(&path) {
                self.fetch(&address, &blob, &path)
                    .map_err(|e| match e.kind() {
                        ErrorKind::Checksum => e.at(file),
                        _ => e,
                    })?;
            }
        }
        create_folder_of(&link)?;
        link_to_blob(file, &blob.etag, &path, &link)
            .map_err(|e| Error::io("cannot link", &link, e))?;
        path.metadata()
            .map(|m| m.len())
            .map_err(|e| Error::io("cannot read", &path, e))
    }

    fn address(&self, file: &str) -> Result<Uri> {
        let file = file.split('/').map(escaped).collect::<Vec<_>>().join("/");
        self.client
            .address(&[self.name.repository(), "resolve", self.commit, &file])
    }

    fn blob(&self, address: &Uri) -> Result<Blob> {
        let mut attempts = Attempts::new(self.client.settings());
        let retry = |e: &Error| self.progress.retry(e);
        let headers = loop {
            match self.client.headers(address) {
                Ok(headers) => break headers,
                Err(failure) => attempts.failed(failure, &retry)?,
            }
        };
        Blob::of(&headers).ok_or_else(|| {
            let message = format!("{}: the server states no hash of the file", address.path());
            Error::new(ErrorKind::Malformed, message).hint("is HF_ENDPOINT a Hugging Face Hub?")
        })
    }

    /// Waits until no other process downloads the blob.
    fn lock(&self, blob: &Blob, file: &str) -> Result<Option<File>> {
        let path = self.cache.lock(self.name, &blob.etag);
        lock(&path, &mut || self.progress.wait(file), &mut || {
            pause(self.client.settings(), LOCK_TICK)
        })
    }

    /// Downloads the blob to `path`.
    fn fetch(&self, address: &Uri, blob: &Blob, path: &Path) -> Result<()> {
        let partial = path.with_file_name(format!("{}.incomplete", blob.etag));
        let mut content = Content::open(&partial)?;
        let mut attempts = Attempts::new(self.client.settings());
        loop {
            let before = content.bytes;
            match self.transfer(address, blob, &mut content) {
                Ok(()) => break,
                Err(failure) => {
                    if content.bytes > before {
                        attempts.succeeded();
                    }
                    attempts.failed(failure, &|e| self.progress.retry(e))?;
                }
            }
        }
        let found = content.finish()?;
        if let Some(expected) = blob.sha256().filter(|expected| *expected != found) {
            fs::remove_file(&partial).map_err(|e| Error::io("cannot remove", &partial, e))?;
            let message = format!("the SHA-256 is {found}, the server stated {expected}");
            return Err(Error::new(ErrorKind::Checksum, message)
                .hint("what was downloaded is removed; pull again"));
        }
        fs::rename(&partial, path).map_err(|e| Error::io("cannot rename", &partial, e))?;
        sync_folder_of(path).map_err(|e| Error::io("cannot write", path, e))
    }

    /// Appends to `content` what is missing, in one request.
    fn transfer(&self, address: &Uri, blob: &Blob, content: &mut Content) -> Result<(), Failure> {
        if blob.bytes.is_some_and(|n| content.bytes > n) {
            content.clear()?;
        }
        self.progress.position(self.before + content.bytes);
        if blob.bytes == Some(content.bytes) {
            return Ok(());
        }
        let answer = self.client.bytes(address, content.bytes)?;
        if content.bytes > 0 && !continues(&answer, content.bytes) {
            content.clear()?;
            if answer.status() != StatusCode::OK {
                let e = cut(address, "other bytes than those that were asked for");
                return Err(Failure::Retry(e, None));
            }
        }
        let mut body = answer.into_body().into_reader();
        let mut chunk = vec![0; CHUNK];
        loop {
            check_interrupt(self.client.settings())?;
            let n = match body.read(&mut chunk) {
                Ok(n) => n,
                Err(e) if e.kind() == IoKind::Interrupted => continue,
                Err(e) => return Err(Failure::Retry(cut(address, &e.to_string()), None)),
            };
            match (n, blob.bytes) {
                (0, Some(all)) if content.bytes < all => {
                    return Err(Failure::Retry(cut(address, "the answer ended early"), None));
                }
                (0, _) => return Ok(()),
                _ => content.append(&chunk[..n])?,
            }
            if blob.bytes.is_some_and(|all| content.bytes > all) {
                content.clear()?;
                let message = format!("{}: more bytes than stated", address.path());
                return Err(Error::new(ErrorKind::Malformed, message).into());
            }
            self.progress.position(self.before + content.bytes);
        }
    }
}

/// Returns whether an answer has the bytes from `start` on.
fn continues(answer: &ureq::http::Response<ureq::Body>, start: u64) -> bool {
    let range = answer.headers().get(header::CONTENT_RANGE);
    let range = range.and_then(|r| r.to_str().ok()?.strip_prefix("bytes "));
    let first = range.and_then(|r| r.split_once('-')?.0.trim().parse::<u64>().ok());
    answer.status() == StatusCode::PARTIAL_CONTENT && first == Some(start)
}

/// Part of a blob on the disk, with its hash so far.
struct Content {
    file: File,
    path: PathBuf,
    bytes: u64,
    hash: Sha256,
}

impl Content {
    /// Opens or creates the file; reads what an earlier download left. Errors: `Io`.
    fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io("cannot write", path, e);
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(path).map_err(io)?;
        let mut hash = Sha256::new();
        let mut bytes = 0;
        let mut chunk = vec![0; CHUNK];
        loop {
            let n = file.read(&mut chunk).map_err(io)?;
            if n == 0 {
                break;
            }
            hash.update(&chunk[..n]);
            bytes += n as u64;
        }
        Ok(Self {
            file,
            path: path.to_path_buf(),
            bytes,
            hash,
        })
    }

    fn append(&mut self, chunk: &[u8]) -> Result<()> {
        let written = self.file.write_all(chunk);
        written.map_err(|e| Error::io("cannot write", &self.path, e))?;
        self.hash.update(chunk);
        self.bytes += chunk.len() as u64;
        Ok(())
    }

    /// Starts from scratch.
    fn clear(&mut self) -> Result<()> {
        let cleared = self.file.set_len(0);
        let cleared = cleared.and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cleared.map_err(|e| Error::io("cannot write", &self.path, e))?;
        self.hash = Sha256::new();
        self.bytes = 0;
        Ok(())
    }

    /// Writes everything to the disk; returns the SHA-256.
    fn finish(self) -> Result<String> {
        let synced = self.file.sync_all();
        synced.map_err(|e| Error::io("cannot write", &self.path, e))?;
        Ok(hex(&self.hash.finalize()))
    }
}

/// Locks `path`, a file for nothing else, until the value is dropped.
///
/// Calls `first` once if another process has it, and `tick` between attempts. `None`: the file
/// system has no locks. Errors: `Io`; those of `tick`.
pub(crate) fn lock(
    path: &Path,
    first: &mut dyn FnMut(),
    tick: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<File>> {
    create_folder_of(path)?;
    let io = |e| Error::io("cannot lock", path, e);
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(false);
    let file = options.open(path).map_err(io)?;
    let mut waits = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::Error(e)) if e.kind() == IoKind::Unsupported => return Ok(None),
            Err(TryLockError::Error(e)) => return Err(io(e)),
            Err(TryLockError::WouldBlock) => {}
        }
        if !waits {
            first();
            waits = true;
        }
        tick()?;
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Escapes a part of a path for an address.
pub(crate) fn escaped(part: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
    let escape = |b: u8| match is_plain(b) {
        true => char::from(b).to_string(),
        false => format!("%{b:02X}"),
    };
    part.bytes().map(escape).collect()
}

/// Makes `link`, the place of `file` in a snapshot, refer to the blob.
#[cfg(unix)]
fn link_to_blob(file: &str, etag: &str, _blob: &Path, link: &Path) -> std::io::Result<()> {
    // Relative, so that the cache can be moved: out of the folders of the file, the commit and
    // `snapshots`.
    let up = "../".repeat(file.split('/').count() + 1);
    let target = format!("{up}blobs/{etag}");
    match std::os::unix::fs::symlink(&target, link) {
        // Another process made it, or its blob was removed.
        Err(e) if e.kind() == IoKind::AlreadyExists => {
            let beside = link.with_extension(format!("{}.link", std::process::id()));
            std::os::unix::fs::symlink(&target, &beside)?;
            fs::rename(&beside, link)
        }
        made => made,
    }
}

/// Makes `link`, the place of `file` in a snapshot, a second name of the blob, or a copy.
#[cfg(not(unix))]
fn link_to_blob(_file: &str, _etag: &str, blob: &Path, link: &Path) -> std::io::Result<()> {
    if fs::hard_link(blob, link).is_ok() || link.is_file() {
        return Ok(());
    }
    let beside = link.with_extension(format!("{}.link", std::process::id()));
    fs::copy(blob, &beside)?;
    fs::rename(&beside, link)
}

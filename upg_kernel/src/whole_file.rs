//! Files that appear whole or not at all.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// A file on its way to `path`: written beside it under another name, put in its place by
/// [`WholeFile::commit`]. If that is never reached, nothing is left, and what was at `path` stays.
#[derive(Debug)]
pub struct WholeFile {
    out: BufWriter<File>,
    temporary: TempPath,
    path: PathBuf,
    /// Where `path` leads to, if it is a link.
    target: PathBuf,
}

impl WholeFile {
    /// Starts a file in the folder of `path`, with the permissions that a new file gets. A link is
    /// followed: the file that it leads to is replaced.
    ///
    /// Writes go through a buffer of 1 MiB. Errors: `Io` if the folder cannot be written to, or `path`
    /// is something else than a file, such as a device.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let io = |e| Error::io("cannot write", path, e);
        let target = checked_target(path)?;
        let folder = folder_of(&target);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".upg-").suffix(".partial");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        // Its own message names the temporary file, which means nothing to anybody.
        let temporary = builder.tempfile_in(folder);
        let (file, temporary) = temporary.map_err(|e| io(e.kind().into()))?.into_parts();
        Ok(Self::new(file, temporary, path, target))
    }

    fn new(file: File, temporary: TempPath, path: &Path, target: PathBuf) -> Self {
        Self {
            out: BufWriter::with_capacity(BUFFER, file),
            temporary,
            path: path.to_path_buf(),
            target,
        }
    }

    /// As [`WholeFile::create`], for an output made from the files `read`.
    ///
    /// Errors: also `Argument` if it would take the place of one of them, by whatever path.
    pub fn create_from<P: AsRef<Path>>(
        path: impl AsRef<Path>,
        read: impl IntoIterator<Item = P>,
    ) -> Result<Self> {
        refuse_to_overwrite(path.as_ref(), read)?;
        Self::create(path)
    }

    /// As [`WholeFile::create`], for work that may go on after a stop: until [`WholeFile::commit`] the file has the
    /// name [`WholeFile::partial`], under which it stays if that is never reached, and what is there already is opened
    /// with what it holds.
    ///
    /// Two at once would write over each other: the caller has to have a lock. Errors: as [`WholeFile::create`].
    pub fn resume(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let target = checked_target(path)?;
        let partial = Self::partial(path)?;
        let io = |e| Error::io("cannot write", &partial, e);
        // Not through a link: renaming would move the link.
        if std::fs::symlink_metadata(&partial).is_ok_and(|found| !found.is_file()) {
            return Err(io(io::Error::other("not a regular file")));
        }
        let mut open = OpenOptions::new();
        open.read(true).write(true).create(true).truncate(false);
        let file = open.open(&partial).map_err(io)?;
        sync_folder_of(&partial).map_err(io)?;
        let mut temporary = TempPath::try_from_path(&partial).map_err(io)?;
        temporary.disable_cleanup(true);
        Ok(Self::new(file, temporary, path, target))
    }

    /// Where the file that [`WholeFile::resume`] opens for `path` is: beside it, with `.partial` after its name.
    ///
    /// Errors: `Io` if `path` cannot be written to.
    pub fn partial(path: impl AsRef<Path>) -> Result<PathBuf> {
        Self::beside(path, ".partial")
    }

    /// The file beside the one that `path` is, through links, with `suffix` after its name.
    ///
    /// Errors: `Io` if `path` cannot be written to.
    pub fn beside(path: impl AsRef<Path>, suffix: &str) -> Result<PathBuf> {
        let mut name = OsString::from(checked_target(path.as_ref())?);
        name.push(suffix);
        Ok(name.into())
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings everything to disk, so that [`WholeFile::commit`] has only the name to change: for several
    /// files of which none may appear without the others. Errors: `Io`.
    pub fn sync(&mut self) -> Result<()> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().sync_all())
            .map_err(|e| Error::io("cannot write", &self.path, e))
    }

    /// Ends the file after `len` bytes and goes there. Errors: `Io`.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().set_len(len))
            .and_then(|()| self.out.seek(SeekFrom::Start(len)))
            .map(|_| ())
            .map_err(|e| Error::io("cannot write", &self.path, e))
    }

    /// Brings everything to disk, then puts the file in its place. Errors: `Io`.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        let Self {
            temporary,
            path,
            target,
            ..
        } = self;
        let finish = || -> io::Result<()> {
            // Opened first: once the file has its name, nothing of this may fail for lack of rights.
            let folder = open_folder_of(&target);
            temporary.persist(&target).map_err(|e| e.error)?;
            sync_folder(folder)
        };
        finish().map_err(|e| Error::io("cannot write", &path, e))
    }
}

/// What was written; the place for reading and writing is the same.
impl Read for WholeFile {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.out.flush()?;
        self.out.get_ref().read(bytes)
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

/// Brings the name of a new or removed file to disk. Errors: those of the system.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    sync_folder(open_folder_of(path))
}

fn open_folder_of(path: &Path) -> Option<File> {
    File::open(folder_of(path)).ok().filter(|_| cfg!(unix))
}

/// A name is on disk only when its folder is; some file systems know no such thing.
fn sync_folder(folder: Option<File>) -> io::Result<()> {
    match folder.map_or(Ok(()), |folder| folder.sync_all()) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        synced => synced,
    }
}

/// Errors (`Argument`): a file at `path` would take the place of one of the files `read`, by whatever path.
pub fn refuse_to_overwrite<P: AsRef<Path>>(
    path: &Path,
    read: impl IntoIterator<Item = P>,
) -> Result<()> {
    let target = place_of(path);
    let is_target = |read: P| place_of(read.as_ref()).is_some_and(|p| Some(p) == target);
    if !read.into_iter().any(is_target) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Argument,
        "the output would overwrite a file of the input",
    )
    .at(path)
    .hint("choose another output"))
}

/// [`target_of`] `path`, in a folder that is there.
fn checked_target(path: &Path) -> Result<PathBuf> {
    let io = |e| Error::io("cannot write", path, e);
    let target = target_of(path).map_err(io)?;
    let folder = folder_of(&target);
    if !folder.is_dir() {
        let missing = io(io::Error::new(io::ErrorKind::NotFound, "no such folder"));
        return Err(missing.hint(format!("make the folder {} first", folder.display())));
    }
    Ok(target)
}

/// What a file at `path` would replace: `path`, or what it leads to. Renaming would put a file in the
/// place of anything, a device too.
fn target_of(path: &Path) -> io::Result<PathBuf> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(path.to_path_buf());
    };
    let target = match metadata.is_symlink() {
        true => path.canonicalize()?,
        false => path.to_path_buf(),
    };
    match std::fs::metadata(&target)?.is_file() {
        true => Ok(target),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// The file that `path` is, through links; of one that is not there yet, the place where it would be.
fn place_of(path: &Path) -> Option<PathBuf> {
    let place = || Some(folder_of(path).canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(place)
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

    #[test]
    fn a_partial_file_stays_and_is_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut first = WholeFile::resume(&path).unwrap();
        first.write_all(b"abcdef").unwrap();
        first.sync().unwrap();
        drop(first);
        assert_eq!(names(dir.path()), ["f.partial"]);

        let mut second = WholeFile::resume(&path).unwrap();
        let mut found = [0; 3];
        second.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"abc");
        second.truncate(4).unwrap();
        second.write_all(b"E").unwrap();
        second.commit().unwrap();
        assert_eq!(names(dir.path()), ["f"]);
        assert_eq!(std::fs::read(&path).unwrap(), b"abcdE");
    }

    #[test]
    fn no_file_of_the_input_is_overwritten_by_any_path() {
        let dir = tempfile::tempdir().unwrap();
        let read = dir.path().join("f");
        std::fs::write(&read, b"").unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        let refused = |out: PathBuf, read: &Path| {
            let e = WholeFile::create_from(&out, [read]).err();
            e.is_some_and(|e| e.kind() == ErrorKind::Argument)
        };
        assert!(refused(dir.path().join("f"), &read));
        assert!(refused(dir.path().join("d/../f"), &read));
        // A name of the input that is not there yet.
        assert!(refused(dir.path().join("d/../g"), &dir.path().join("g")));
        assert!(!refused(dir.path().join("d/f"), &read));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&read, dir.path().join("link")).unwrap();
            assert!(refused(dir.path().join("link"), &read));
        }
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

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_what_is_no_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(at(to), at(name)).unwrap();
        std::fs::create_dir(at("d")).unwrap();
        std::fs::write(at("d/f"), b"old").unwrap();
        link("d/f", "link");
        let mut file = WholeFile::create(at("link")).unwrap();
        file.write_all(b"new").unwrap();
        file.commit().unwrap();
        assert_eq!(std::fs::read(at("d/f")).unwrap(), b"new");
        assert!(at("link").is_symlink());

        link("none", "dangling");
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for bad in ["d", "dangling", "socket"] {
            let e = WholeFile::create(at(bad)).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Io, "{bad}");
        }
        assert_eq!(names(dir.path()), ["d", "dangling", "link", "socket"]);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_io_error() {
        let dir = tempfile::tempdir().unwrap();
        let e = WholeFile::create(dir.path().join("none/f")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Io);
    }
}

//! The file behind a [`AtomicFile`](super::AtomicFile) until it is in its place.
//!
//! On Linux it has no name where the file system allows that (`O_TMPFILE`): however the process ends, nothing is left.
//! Elsewhere its name says what it is, and a lock says that somebody is writing it. Making the next temporary file in
//! a folder removes those of this name that nobody has locked.
#![forbid(unsafe_code)]

use super::{is_at, with_mode};
use crate::files::{self, folder_of};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::path::Path;
use tempfile::TempPath;

/// Beginning of the names of temporary files.
const PREFIX: &str = ".upg-";
/// End of the names of temporary files.
const SUFFIX: &str = ".partial";
/// Random letters and digits between the two. Other programs have other numbers of them, and do not lock their files.
const RANDOM: usize = 16;

/// Makes a file in `folder` for reading and writing; its name, or `None` if it has none.
///
/// `mode` is what Unix gives it, less the umask. Cost: reads the list of files of the folder. Errors: those of the
/// system.
pub(super) fn create(folder: &Path, mode: u32) -> io::Result<(File, Option<TempPath>)> {
    remove_abandoned(folder);
    #[cfg(target_os = "linux")]
    if let Some(file) = unnamed::create(folder, mode) {
        return Ok((file, None));
    }
    let (file, name) = named(folder, mode)?;
    Ok((file, Some(name)))
}

/// Puts a file of [`create`] at `target`, in the place of what is there. Errors: those of the system.
pub(super) fn put(file: &mut File, name: Option<TempPath>, target: &Path) -> io::Result<()> {
    match name {
        Some(name) => name.persist(target).map_err(|e| e.error),
        #[cfg(target_os = "linux")]
        None => unnamed::put(file, target),
        #[cfg(not(target_os = "linux"))]
        None => put_copy(file, target),
    }
}

/// A locked file with a name of the known form.
fn named(folder: &Path, mode: u32) -> io::Result<(File, TempPath)> {
    let create = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = with_mode(&mut options, mode).open(path)?;
        if is_held(&file, path) {
            return Ok(file);
        }
        // Another process took it for an abandoned one before it was locked. This error has the next name tried.
        let _ = fs::remove_file(path);
        Err(io::ErrorKind::AlreadyExists.into())
    };
    Ok(builder_in(folder, create)?.into_parts())
}

/// Locks a file; `false` if another process has the lock, or has removed the file from `path`.
fn is_held(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => false,
        // A file system without locks: no other process can lock the file to remove it.
        Ok(()) | Err(TryLockError::Error(_)) => is_at(file, path),
    }
}

fn builder_in<R>(
    folder: &Path,
    make: impl FnMut(&Path) -> io::Result<R>,
) -> io::Result<tempfile::NamedTempFile<R>> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX).rand_bytes(RANDOM);
    builder.make_in(folder, make)
}

/// Copies a file that cannot be given a name into one that has one, and puts that at `target`.
fn put_copy(file: &mut File, target: &Path) -> io::Result<()> {
    let (mut copy, name) = named(folder_of(target), 0o600)?;
    file.seek(SeekFrom::Start(0))?;
    io::copy(file, &mut copy)?;
    super::resemble(&copy, &file.metadata()?)?;
    copy.sync_all()?;
    name.persist(target).map_err(|e| e.error)
}

fn is_temporary(name: &OsStr) -> bool {
    let name = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
    let random = name.and_then(|name| name.strip_suffix(SUFFIX));
    random.is_some_and(|random| {
        random.len() == RANDOM && random.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

/// Removes the temporary files in `folder` that no process is writing. What fails is left to the next time.
fn remove_abandoned(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if is_file && is_temporary(&entry.file_name()) {
            let _ = remove_if_abandoned(&entry.path());
        }
    }
}

fn remove_if_abandoned(path: &Path) -> io::Result<()> {
    // Locks on network disks need a file that can be written; a finished file may allow reading only.
    let open = |write| {
        let mut options = files::options(true);
        options.read(true).write(write).open(path)
    };
    let file = open(true).or_else(|_| open(false))?;
    // The check comes after the lock: who had it may have renamed the file meanwhile.
    let is_abandoned = file.try_lock().is_ok() && file.metadata()?.is_file() && is_at(&file, path);
    match is_abandoned {
        true => fs::remove_file(path),
        false => Ok(()),
    }
}

/// Files without names.
#[cfg(target_os = "linux")]
mod unnamed {
    use super::{builder_in, folder_of, put_copy, with_mode};
    use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
    use nix::unistd::linkat;
    use std::fs::{File, OpenOptions};
    use std::io;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::{Path, PathBuf};

    /// `None` where the file system has no files without names, or there is no `/proc` to give them one.
    pub(super) fn create(folder: &Path, mode: u32) -> Option<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(OFlag::O_TMPFILE.bits());
        let file = with_mode(&mut options, mode).open(folder).ok()?;
        // For the moment in which it has a temporary name: then it is locked from the start.
        let _ = file.try_lock();
        let opened = same_file(&file.metadata().ok()?);
        let through_proc = same_file(&std::fs::metadata(in_proc(&file)).ok()?);
        (opened == through_proc).then_some(file)
    }

    fn same_file(metadata: &std::fs::Metadata) -> (u64, u64) {
        use std::os::unix::fs::MetadataExt;
        (metadata.dev(), metadata.ino())
    }

    fn in_proc(file: &File) -> PathBuf {
        format!("/proc/self/fd/{}", file.as_raw_fd()).into()
    }

    fn link(file: &File, path: &Path) -> io::Result<()> {
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        Ok(linkat(AT_FDCWD, &in_proc(file), AT_FDCWD, path, follow)?)
    }

    /// A link cannot take the place of a file, a renamed one can: only then the file has a temporary name, for a moment.
    pub(super) fn put(file: &mut File, target: &Path) -> io::Result<()> {
        let linked = match link(file, target) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let name = builder_in(folder_of(target), |path| link(file, path));
                name.map(|name| name.into_temp_path().persist(target).map_err(|e| e.error))
            }
            linked => linked.map(Ok),
        };
        match linked {
            Ok(renamed) => renamed?,
            // The file system gives no names after all: hours of work may be in the file.
            Err(_) => return put_copy(file, target),
        }
        // Some file systems note a new name with the file, not with the folder only.
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::names;
    use super::*;
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Makes a file as a process that was killed leaves it.
    fn abandoned(folder: &Path, mode: u32) -> std::path::PathBuf {
        let (file, name) = named(folder, mode).unwrap();
        drop(file);
        name.keep().unwrap()
    }

    #[test]
    fn files_that_nobody_writes_are_removed_and_others_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        // Of another program, of another kind, of another name.
        let others = [
            ".upg-0123abcd.partial",
            ".upg-0123456789abcde-.partial",
            ".upg-0123456789abcdef.partial.journal",
            "0123456789abcdef.partial",
        ];
        for other in others {
            fs::write(folder.join(other), b"").unwrap();
        }
        fs::create_dir(folder.join(".upg-0123456789abcdef.partial")).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(others[0], folder.join(".upg-000000000000link.partial"))
            .unwrap();
        let left = names(folder);

        let (_writing, writing) = named(folder, 0o600).unwrap();
        let gone = [abandoned(folder, 0o600), abandoned(folder, 0o400)];
        assert_eq!(names(folder).len(), left.len() + 3);
        let (_file, _name) = create(folder, 0o600).unwrap();
        assert!(gone.iter().all(|path| !path.exists()));
        assert!(writing.exists());
        drop((_file, _name, writing));
        assert_eq!(names(folder), left);
    }

    /// Some make files with names, others remove what is abandoned, at the same time: no file in use is lost.
    #[test]
    fn a_file_in_use_is_never_taken_for_an_abandoned_one() {
        let dir = tempfile::tempdir().unwrap();
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let makers = [0, 1].map(|_| {
                scope.spawn(|| {
                    for i in 0..500 {
                        let (file, name) = named(dir.path(), 0o600).unwrap();
                        std::thread::yield_now();
                        assert!(is_at(&file, &name), "file {i}");
                    }
                })
            });
            for _ in 0..2 {
                scope.spawn(|| {
                    while !ended.load(Ordering::Relaxed) {
                        remove_abandoned(dir.path());
                    }
                });
            }
            let made = makers.map(|maker| maker.join());
            ended.store(true, Ordering::Relaxed);
            made.into_iter().for_each(|made| made.unwrap());
        });
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn a_file_that_gets_no_name_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("f");
        for text in ["one", "two"] {
            let mut file = tempfile::tempfile_in(dir.path()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            put_copy(&mut file, &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), text);
            assert_eq!(names(dir.path()), ["f"]);
        }
    }

    #[test]
    fn a_file_with_a_name_is_put_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("f");
        for text in ["one", "two"] {
            let (mut file, name) = named(dir.path(), 0o600).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert!(is_temporary(name.file_name().unwrap()));
            put(&mut file, Some(name), &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), text);
            assert_eq!(names(dir.path()), ["f"]);
        }
    }
}

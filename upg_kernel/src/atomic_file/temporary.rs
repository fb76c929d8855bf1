//! Temporary file of an [`AtomicFile`](super::AtomicFile) until it is committed.
//!
//! On Linux it has no name where the file system allows that (`O_TMPFILE`): nothing is left
//! however the process ends. Elsewhere its name marks it as temporary, and a lock marks it
//! as in use. Creating the next temporary file in a folder removes those with such a name
//! that nobody has locked.
#![forbid(unsafe_code)]

use super::{is_at, with_mode};
use crate::files::{self, folder_of};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::path::Path;
use tempfile::TempPath;

/// Prefix of the names of temporary files.
const PREFIX: &str = ".upg-";
/// Suffix of the names of temporary files.
const SUFFIX: &str = ".partial";
/// Number of random letters and digits between the two.
///
/// Other programs use other numbers of them, and do not lock their files.
const RANDOM: usize = 16;

/// Creates a file in `folder` for reading and writing;
/// returns its name, or `None` if it has none.
///
/// `mode` is its Unix mode before the umask. Cost: lists the files of the folder. Errors: those of
/// the system.
pub(super) fn create(folder: &Path, mode: u32) -> io::Result<(File, Option<TempPath>)> {
    remove_abandoned(folder);
    #[cfg(target_os = "linux")]
    if let Some(file) = unnamed::create(folder, mode) {
        return Ok((file, None));
    }
    let (file, name) = named(folder, mode)?;
    Ok((file, Some(name)))
}

/// Moves a file of [`create`] to `target`, replacing an existing one. Errors:
/// those of the system.
pub(super) fn put(file: &mut File, name: Option<TempPath>, target: &Path) -> io::Result<()> {
    match name {
        Some(name) => name.persist(target).map_err(|e| e.error),
        #[cfg(target_os = "linux")]
        None => unnamed::put(file, target),
        #[cfg(not(target_os = "linux"))]
        None => put_copy(file, target),
    }
}

/// Creates a locked file with a name of the known form.
fn named(folder: &Path, mode: u32) -> io::Result<(File, TempPath)> {
    let create = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = with_mode(&mut options, mode).open(path)?;
        if is_held(&file, path) {
            return Ok(file);
        }
        // Another process took it for an abandoned file before it was locked. This error makes the
        // caller try the next name.
        let _ = fs::remove_file(path);
        Err(io::ErrorKind::AlreadyExists.into())
    };
    Ok(builder_in(folder, create)?.into_parts())
}

/// Locks a file; `false` if another process has the lock,
/// or has removed the file from `path`.
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

/// Copies a file that cannot be given a name to a named one, and moves that to `target`.
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

/// Removes the temporary files in `folder` that no process is writing; failures are left to
/// the next call.
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
    // Locks on network drives need a writable file; a finished file may be read-only.
    let open = |write| {
        let mut options = files::options(true);
        options.read(true).write(write).open(path)
    };
    let file = open(true).or_else(|_| open(false))?;
    // Checked after the lock: its previous holder may have renamed the file meanwhile.
    let is_abandoned = file.try_lock().is_ok() && file.metadata()?.is_file() && is_at(&file, path);
    match is_abandoned {
        true => fs::remove_file(path),
        false => Ok(()),
    }
}

/// Unnamed files.
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

    /// Creates an unnamed file.
    ///
    /// `None` if the file system has none, or if there is no `/proc` to name it later.
    pub(super) fn create(folder: &Path, mode: u32) -> Option<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(OFlag::O_TMPFILE.bits());
        let file = with_mode(&mut options, mode).open(folder).ok()?;
        // Locked from the start, because it gets a temporary name for a moment.
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

    /// Moves the file to `target`.
    ///
    /// A link cannot replace a file, but a rename can. Only in that case the file gets a temporary
    /// name, for a moment.
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
            // The file system cannot name the file after all; hours of work may be in it.
            Err(_) => return put_copy(file, target),
        }
        // Some file systems store a new name with the file, not only with the folder.
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::names;
    use super::*;
    use std::io::Write;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Creates a file in the state that a killed process leaves.
    fn abandoned(folder: &Path, mode: u32) -> std::path::PathBuf {
        let (file, name) = named(folder, mode).unwrap();
        drop(file);
        name.keep().unwrap()
    }

    #[test]
    fn files_that_nobody_writes_are_removed_and_others_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        // Files of another program, of another kind, and with other names.
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

    /// Some threads create named files, others remove abandoned ones: no file in use is lost.
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

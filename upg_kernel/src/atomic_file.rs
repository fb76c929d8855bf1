//! Files that are replaced atomically.
#![forbid(unsafe_code)]

mod temporary;

use crate::error::{Error, ErrorKind, Result};
use crate::files::{self, folder_of};
use crate::format::checksum_of;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempPath;

/// Size of the write buffer in bytes.
const BUFFER: usize = 1 << 20;

/// Maximum bytes of a file name.
///
/// File systems with other units (UTF-16, characters) allow at least as much.
const LONGEST_NAME: usize = 255;
/// Bytes reserved for a suffix, so that all files beside one have names of the same form.
const LONGEST_SUFFIX: usize = ".partial.journal".len();
/// Maximum bytes of the prefix of a long name that a shortened name keeps.
const BEGINNING: usize = 160;

/// Permissions of a new file on Unix, before the umask.
const NEW_FILE: u32 = 0o666;

/// File that is written in the folder of `path` and renamed to it by [`AtomicFile::commit`].
///
/// If `commit` is never reached, nothing is left, and the file at `path` stays.
///
/// The same holds for a process that is killed. On Linux, if the file system allows it, the file
/// has no name before [`AtomicFile::commit`], except for a moment in a commit that replaces a file.
/// Elsewhere it is named `.upg-*.partial` and locked, and the next [`AtomicFile::create`] in the
/// folder removes such files that nobody has locked. (On a network drive this needs locks that all
/// machines see.)
#[derive(Debug)]
pub struct AtomicFile {
    out: BufWriter<File>,
    /// Temporary name; `None` if the file has no name yet.
    temporary: Option<TempPath>,
    path: PathBuf,
    /// Target of `path`, if it is a link.
    target: PathBuf,
    /// Metadata of the file that existed at the start.
    replaced: Option<Box<Metadata>>,
}

impl AtomicFile {
    /// Starts a file in the folder of `path`. A link is followed: its target is replaced.
    ///
    /// A file that replaces another gets its permissions, without set-user-id and set-group-id, and
    /// its owner and group where the system allows it. (If the group cannot be set, the current
    /// group gets the permissions of others.) A new file gets the default permissions. Writes go
    /// through a buffer of 1 MiB. Errors: `Io` if the folder is not writable, or `path` is not a
    /// regular file, such as a device.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let target = checked_target(path)?;
        let mode = mode_of(std::fs::metadata(&target).ok().as_ref());
        let created = temporary::create(folder_of(&target), mode);
        let (file, temporary) = created.map_err(|e| Error::io("cannot write", path, e))?;
        Ok(Self::new(file, temporary, path, target))
    }

    fn new(file: File, temporary: Option<TempPath>, path: &Path, target: PathBuf) -> Self {
        Self {
            out: BufWriter::with_capacity(BUFFER, file),
            temporary,
            path: path.to_path_buf(),
            replaced: std::fs::metadata(&target).ok().map(Box::new),
            target,
        }
    }

    /// Starts a file like [`AtomicFile::create`], for an output made from the files `read`.
    ///
    /// Errors: also `Argument` if it would replace one of them, by whatever path.
    pub fn create_from<P: AsRef<Path>>(
        path: impl AsRef<Path>,
        read: impl IntoIterator<Item = P>,
    ) -> Result<Self> {
        refuse_to_overwrite(path.as_ref(), read)?;
        Self::create(path)
    }

    /// Opens a file like [`AtomicFile::create`], for work that can resume after a stop.
    ///
    /// Until [`AtomicFile::commit`] the file is named [`AtomicFile::partial`], and it stays there
    /// if `commit` is never reached. An existing partial file is opened with its content.
    ///
    /// Two writers would overwrite each other: the caller must hold a lock. Errors: as
    /// [`AtomicFile::create`].
    pub fn resume(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let target = checked_target(path)?;
        let partial = Self::partial(path)?;
        let io = |e| Error::io("cannot write", &partial, e);
        let mode = mode_of(std::fs::metadata(&target).ok().as_ref());
        let file = open_regular(&partial, mode).map_err(io)?;
        sync_folder_of(&partial).map_err(io)?;
        let mut temporary = TempPath::try_from_path(&partial).map_err(io)?;
        temporary.disable_cleanup(true);
        Ok(Self::new(file, Some(temporary), path, target))
    }

    /// Starts an unnamed file in the system's folder for temporary files. It is never committed.
    ///
    /// Messages name `path`. Nothing is left of it however the process ends. Errors: `Io`.
    #[cfg(feature = "v1")]
    pub(crate) fn temporary(path: &Path) -> Result<Self> {
        let file = tempfile::tempfile();
        let file = file.map_err(|e| Error::io("cannot make a temporary file for", path, e))?;
        Ok(Self::new(file, None, path, PathBuf::new()))
    }

    /// Returns the written file, positioned at its start.
    ///
    /// A file without a name then vanishes when it is closed. Errors: `Io`.
    #[cfg(feature = "v1")]
    pub(crate) fn into_file(self) -> Result<File> {
        let Self { out, path, .. } = self;
        let rewound = || -> io::Result<File> {
            let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.rewind()?;
            Ok(file)
        };
        rewound().map_err(|e| Error::io("cannot write", &path, e))
    }

    /// Returns the path of the file that [`AtomicFile::resume`] opens for `path`.
    ///
    /// It is beside it, with the suffix `.partial`; [`AtomicFile::beside`] may shorten the name.
    /// Errors: `Io` if `path` is not writable.
    pub fn partial(path: impl AsRef<Path>) -> Result<PathBuf> {
        Self::beside(path, ".partial")
    }

    /// Returns the path beside the target of `path` (through links) with `suffix` after its name.
    ///
    /// A name of more than 239 bytes leaves no room for that. It is shortened to its first
    /// characters, up to 160 bytes, `~` and a checksum of the whole name. Errors: `Io` if `path` is
    /// not writable.
    pub fn beside(path: impl AsRef<Path>, suffix: &str) -> Result<PathBuf> {
        let mut path = checked_target(path.as_ref())?;
        let name = path.file_name().unwrap_or_default();
        path.set_file_name(name_beside(name, suffix));
        Ok(path)
    }

    /// Returns the final path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs all data to disk, so that [`AtomicFile::commit`] only has to rename.
    ///
    /// Useful for several files of which none may appear without the others. Errors: `Io`.
    pub fn sync(&mut self) -> Result<()> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().sync_all())
            .map_err(|e| Error::io("cannot write", &self.path, e))
    }

    /// Truncates the file to `len` bytes and seeks there. Errors: `Io`.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        self.out
            .flush()
            .and_then(|()| self.out.get_ref().set_len(len))
            .and_then(|()| self.out.seek(SeekFrom::Start(len)))
            .map(|_| ())
            .map_err(|e| Error::io("cannot write", &self.path, e))
    }

    /// Syncs all data to disk, then moves the file to its path. Errors: `Io`.
    pub fn commit(mut self) -> Result<()> {
        self.sync()?;
        let replaced = std::fs::metadata(&self.target).ok();
        if let Some(old) = replaced.as_ref().or(self.replaced.as_deref()) {
            // Done late: a read-only file could not be resumed.
            resemble(self.out.get_ref(), old)
                .map_err(|e| Error::io("cannot write", &self.path, e))?;
            self.sync()?;
        }
        let Self {
            mut out,
            temporary,
            path,
            target,
            ..
        } = self;
        let finish = || -> io::Result<()> {
            // Opened first: once the file has its name, no step may fail for lack of permissions.
            let folder = open_folder_of(&target);
            temporary::put(out.get_mut(), temporary, &target)?;
            sync_folder(folder)
        };
        finish().map_err(|e| Error::io("cannot write", &path, e))
    }
}

/// Reads the written data; reading and writing share one position.
impl Read for AtomicFile {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.out.flush()?;
        self.out.get_ref().read(bytes)
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.out.seek(to)
    }
}

/// Syncs the directory entry of a new or removed file to disk. Errors: those of the system.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    sync_folder(open_folder_of(path))
}

fn open_folder_of(path: &Path) -> Option<File> {
    File::open(folder_of(path)).ok().filter(|_| cfg!(unix))
}

/// Syncs a folder.
///
/// A name is on disk only when its folder is; some file systems do not support this.
fn sync_folder(folder: Option<File>) -> io::Result<()> {
    match folder.map_or(Ok(()), |folder| folder.sync_all()) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        synced => synced,
    }
}

/// Opens the file at `path` for reading and writing, and creates it if necessary.
///
/// Errors: those of the system; the path is a link, not a regular file, or a file with another
/// name, which would change too.
pub fn open_regular_file(path: &Path) -> io::Result<File> {
    open_regular(path, NEW_FILE)
}

fn open_regular(path: &Path, mode: u32) -> io::Result<File> {
    let mut options = files::options(true);
    options.read(true).write(true).create(true).truncate(false);
    match with_mode(&mut options, mode).open(path) {
        Ok(file) => {
            let metadata = file.metadata()?;
            files::check_regular(&metadata)?;
            match has_other_names(&metadata) {
                true => Err(io::Error::other("the file has another name (a hard link)")),
                false => Ok(file),
            }
        }
        // The system has a different error code for each kind of irregular file.
        Err(e) => Err(match std::fs::symlink_metadata(path) {
            Ok(found) if !found.is_file() => files::irregular(),
            _ => e,
        }),
    }
}

/// Returns whether a file has more than one name; `false` where the system does not say.
fn has_other_names(metadata: &Metadata) -> bool {
    #[cfg(unix)]
    return std::os::unix::fs::MetadataExt::nlink(metadata) > 1;
    #[cfg(not(unix))]
    {
        let _ = metadata;
        false
    }
}

/// Sets the permissions of a file to create.
fn with_mode(options: &mut OpenOptions, mode: u32) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    options
}

/// Returns whether `path` is this open file, not through a link.
///
/// Also `false` if that cannot be determined.
pub fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let places = [file.metadata(), std::fs::symlink_metadata(path)];
        let [opened, named] = places.map(|found| found.ok().map(|m| (m.dev(), m.ino())));
        opened.is_some() && opened == named
    }
    #[cfg(not(unix))]
    {
        let opened = file.try_clone().and_then(same_file::Handle::from_file);
        let named = same_file::Handle::from_path(path);
        opened.is_ok_and(|opened| named.is_ok_and(|named| opened == named))
    }
}

/// Returns the permissions of the temporary file that is to replace `replaced`.
///
/// Its owner can write it, and nobody can read it meanwhile who cannot read the replaced file.
fn mode_of(replaced: Option<&Metadata>) -> u32 {
    #[cfg(unix)]
    if let Some(replaced) = replaced {
        use std::os::unix::fs::PermissionsExt;
        return replaced.permissions().mode() & NEW_FILE | 0o600;
    }
    let _ = replaced;
    NEW_FILE
}

/// Gives `file` the owner, group and permissions of `old`, as far as the system allows it.
#[cfg(unix)]
fn resemble(file: &File, old: &Metadata) -> io::Result<()> {
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
    let (uid, gid) = (old.uid(), old.gid());
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (uid, gid) && fchown(file, Some(uid), Some(gid)).is_err() {
        // Only privileged users may change the owner, but members of a group may set the group.
        let _ = fchown(file, None, Some(gid));
    }
    let mut mode = old.mode() & 0o777;
    if file.metadata()?.gid() != gid {
        mode = mode & 0o707 | mode & (mode & 0o007) << 3;
    }
    match file.set_permissions(Permissions::from_mode(mode)) {
        // Foreign file systems have no permissions to set.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        set => set,
    }
}

#[cfg(not(unix))]
fn resemble(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// Joins `name` and `suffix`, shortened to the limit of file systems; see
/// [`AtomicFile::beside`].
fn name_beside(name: &OsStr, suffix: &str) -> OsString {
    if name.len() + suffix.len().max(LONGEST_SUFFIX) <= LONGEST_NAME {
        let mut name = name.to_os_string();
        name.push(suffix);
        return name;
    }
    let text = name.to_string_lossy();
    let beginning = &text[..text.floor_char_boundary(BEGINNING)];
    let checksum = checksum_of(name.as_encoded_bytes());
    format!("{beginning}~{checksum}{suffix}").into()
}

/// Checks that a file at `path` replaces none of the files `read`, by whatever path.
///
/// Errors (`Argument`): it would replace one.
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

/// Returns [`target_of`] `path`; its folder must exist.
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

/// Returns the path that a file at `path` would replace: `path`, or its link target.
///
/// A rename would replace anything, even a device, so irregular files are an error.
fn target_of(path: &Path) -> io::Result<PathBuf> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(path.to_path_buf());
    };
    let target = match metadata.is_symlink() {
        true => path.canonicalize()?,
        false => path.to_path_buf(),
    };
    files::check_regular(&std::fs::metadata(&target)?).map(|()| target)
}

/// Resolves links in `path`; for a file that does not exist yet, returns its future location.
fn place_of(path: &Path) -> Option<PathBuf> {
    let place = || Some(folder_of(path).canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(place)
}

#[cfg(test)]
mod tests;

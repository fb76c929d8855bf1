//! Files that appear whole or not at all.
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

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// Most bytes of a file name. File systems that count otherwise (UTF-16, characters) allow at least as much.
const LONGEST_NAME: usize = 255;
/// Bytes that are kept free for a suffix, so that all files beside one have names of the same kind.
const LONGEST_SUFFIX: usize = ".partial.journal".len();
/// Most bytes of a long name that a shortened one begins with.
const BEGINNING: usize = 160;

/// Permissions of a new file on Unix, before the umask.
const NEW_FILE: u32 = 0o666;

/// A file on its way to `path`: written in the same folder, put in its place by [`AtomicFile::commit`]. If that is
/// never reached, nothing is left, and what was at `path` stays.
///
/// The same holds for a process that is killed: on Linux the file has no name before [`AtomicFile::commit`] where the file
/// system allows it, but for a moment of a commit that replaces a file. Elsewhere it is named `.upg-*.partial` and locked, and the next [`AtomicFile::create`] in the folder
/// removes such files that nobody has locked. (Over a network that takes locks that all machines see.)
#[derive(Debug)]
pub struct AtomicFile {
    out: BufWriter<File>,
    /// `None`: the file has no name yet.
    temporary: Option<TempPath>,
    path: PathBuf,
    /// Where `path` leads to, if it is a link.
    target: PathBuf,
    /// The file that was there at the start.
    replaced: Option<Box<Metadata>>,
}

impl AtomicFile {
    /// Starts a file in the folder of `path`. A link is followed: the file that it leads to is replaced.
    ///
    /// A file that takes the place of another gets its permissions, without set-user-id and set-group-id, and where the
    /// system allows it its owner and group. (A group that it cannot have gives the permissions of everybody to the
    /// group that it has.) A new one gets the permissions that new files get. Writes go through a buffer of 1 MiB.
    /// Errors: `Io` if the folder cannot be written to, or `path` is something else than a file, such as a device.
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

    /// Does what [`AtomicFile::create`] does, for an output made from the files `read`.
    ///
    /// Errors: also `Argument` if it would take the place of one of them, by whatever path.
    pub fn create_from<P: AsRef<Path>>(
        path: impl AsRef<Path>,
        read: impl IntoIterator<Item = P>,
    ) -> Result<Self> {
        refuse_to_overwrite(path.as_ref(), read)?;
        Self::create(path)
    }

    /// Does what [`AtomicFile::create`] does, for work that may resume after a stop: until [`AtomicFile::commit`] the file has the
    /// name [`AtomicFile::partial`], under which it stays if that is never reached, and what is there already is opened
    /// with what it holds.
    ///
    /// Two at once would write over each other: the caller has to have a lock. Errors: as [`AtomicFile::create`].
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

    /// Starts a file without a name, where temporary files are, that is never put in a place. Messages name `path`.
    ///
    /// However the process ends, nothing is left of it. Errors: `Io`.
    #[cfg(feature = "v1")]
    pub(crate) fn temporary(path: &Path) -> Result<Self> {
        let file = tempfile::tempfile();
        let file = file.map_err(|e| Error::io("cannot make a temporary file for", path, e))?;
        Ok(Self::new(file, None, path, PathBuf::new()))
    }

    /// The file as it was written, at its start. Nothing keeps a file that has no name yet. Errors: `Io`.
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

    /// Where the file that [`AtomicFile::resume`] opens for `path` is: beside it, with `.partial` after its name, which
    /// [`AtomicFile::beside`] shortens.
    ///
    /// Errors: `Io` if `path` cannot be written to.
    pub fn partial(path: impl AsRef<Path>) -> Result<PathBuf> {
        Self::beside(path, ".partial")
    }

    /// The file beside the one that `path` is, through links, with `suffix` after its name.
    ///
    /// A name of more than 239 bytes leaves no room for that: of it come the first characters, up to 160 bytes, `~` and
    /// a checksum of the whole name. Errors: `Io` if `path` cannot be written to.
    pub fn beside(path: impl AsRef<Path>, suffix: &str) -> Result<PathBuf> {
        let mut path = checked_target(path.as_ref())?;
        let name = path.file_name().unwrap_or_default();
        path.set_file_name(name_beside(name, suffix));
        Ok(path)
    }

    /// Where the file will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Brings everything to disk, so that [`AtomicFile::commit`] has only the name to change: for several
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
        let replaced = std::fs::metadata(&self.target).ok();
        if let Some(old) = replaced.as_ref().or(self.replaced.as_deref()) {
            // Late: a file that can only be read could not be resumed.
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
            // Opened first: once the file has its name, nothing of this may fail for lack of rights.
            let folder = open_folder_of(&target);
            temporary::put(out.get_mut(), temporary, &target)?;
            sync_folder(folder)
        };
        finish().map_err(|e| Error::io("cannot write", &path, e))
    }
}

/// What was written; the place for reading and writing is the same.
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

/// Opens the file at `path` for reading and writing, and makes it if need be.
///
/// Errors: those of the system; the path is a link, something other than a regular file, or a file with another name, which
/// would change too.
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
        // The system has a code for each kind of thing that it does not open.
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

/// Permissions for a file that is made.
fn with_mode(options: &mut OpenOptions, mode: u32) -> &mut OpenOptions {
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    options
}

/// Returns whether `path` is this open file, not through a link. `false` too if that cannot be found out.
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

/// Permissions that a file is made with which is to take the place of `replaced`: its owner can write it, and nobody
/// reads it meanwhile who may not read that one.
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
        // Not everybody may give files away, but members of a group may give them to the group.
        let _ = fchown(file, None, Some(gid));
    }
    let mut mode = old.mode() & 0o777;
    if file.metadata()?.gid() != gid {
        mode = mode & 0o707 | mode & (mode & 0o007) << 3;
    }
    match file.set_permissions(Permissions::from_mode(mode)) {
        // File systems of other systems have no permissions to set.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        set => set,
    }
}

#[cfg(not(unix))]
fn resemble(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

/// `name` and `suffix`, shortened to what file systems take; see [`AtomicFile::beside`].
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
    files::check_regular(&std::fs::metadata(&target)?).map(|()| target)
}

/// The file that `path` is, through links; of one that is not there yet, the place where it would be.
fn place_of(path: &Path) -> Option<PathBuf> {
    let place = || Some(folder_of(path).canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(place)
}

#[cfg(test)]
mod tests;

use super::*;

pub(super) fn names(folder: &Path) -> Vec<String> {
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
    let mut dropped = AtomicFile::create(&path).unwrap();
    dropped.write_all(b"half").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    drop(dropped);
    assert_eq!(names(dir.path()), ["f"]);

    let mut file = AtomicFile::create(&path).unwrap();
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
    let mut first = AtomicFile::resume(&path).unwrap();
    first.write_all(b"abcdef").unwrap();
    first.sync().unwrap();
    drop(first);
    assert_eq!(names(dir.path()), ["f.partial"]);

    let mut second = AtomicFile::resume(&path).unwrap();
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
        let e = AtomicFile::create_from(&out, [read]).err();
        e.is_some_and(|e| e.kind() == ErrorKind::Argument)
    };
    assert!(refused(dir.path().join("f"), &read));
    assert!(refused(dir.path().join("d/../f"), &read));
    // A name of the input that does not exist yet.
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
    let file = AtomicFile::create(dir.path().join("whole")).unwrap();
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
    let mut file = AtomicFile::create(at("link")).unwrap();
    file.write_all(b"new").unwrap();
    file.commit().unwrap();
    assert_eq!(std::fs::read(at("d/f")).unwrap(), b"new");
    assert!(at("link").is_symlink());

    link("none", "dangling");
    std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    for bad in ["d", "dangling", "socket"] {
        let e = AtomicFile::create(at(bad)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Io, "{bad}");
    }
    assert_eq!(names(dir.path()), ["d", "dangling", "link", "socket"]);
}

#[test]
fn a_folder_that_is_not_there_is_an_io_error() {
    let dir = tempfile::tempdir().unwrap();
    let e = AtomicFile::create(dir.path().join("none/f")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
}

/// Returns whether unnamed files can be created in `folder` and found in `/proc`.
#[cfg(target_os = "linux")]
fn has_unnamed_files(folder: &Path) -> bool {
    use nix::fcntl::OFlag;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(OFlag::O_TMPFILE.bits());
    options.open(folder).is_ok() && Path::new("/proc/self/fd").is_dir()
}

#[cfg(target_os = "linux")]
#[test]
fn on_linux_a_file_has_no_name_before_the_commit() {
    let dir = tempfile::tempdir().unwrap();
    if !has_unnamed_files(dir.path()) {
        eprintln!("NOT RUN: no O_TMPFILE where temporary files are, or no /proc");
        return;
    }
    let path = dir.path().join("f");
    for text in ["one", "another"] {
        let before = names(dir.path());
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file.sync().unwrap();
        assert_eq!(names(dir.path()), before);
        file.commit().unwrap();
        assert_eq!(names(dir.path()), ["f"]);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn the_last_of_several_that_write_the_same_file_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let write = |text: &str| {
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    let (first, second) = (write("first"), write("second"));
    second.commit().unwrap();
    first.commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"first");

    // Concurrently: each file is complete, and exactly one of them is there.
    let texts: Vec<String> = (0..8).map(|i| i.to_string().repeat(50_000)).collect();
    std::thread::scope(|scope| {
        for text in &texts {
            scope.spawn(|| (0..20).for_each(|_| write(text).commit().unwrap()));
        }
    });
    assert!(texts.contains(&std::fs::read_to_string(&path).unwrap()));
    assert_eq!(names(dir.path()), ["f"]);
}

#[cfg(unix)]
#[test]
fn a_replaced_file_keeps_its_permissions() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Only root may change the owner; otherwise the owner is the same anyway.
    let root = std::fs::metadata(dir.path()).unwrap().uid() == 0;
    let partial = |path: &Path| AtomicFile::partial(path).unwrap();
    for mode in [0o600, 0o640, 0o444, 0o755, 0o666] {
        for resume in [false, true] {
            let path = at("f");
            std::fs::write(&path, b"old").unwrap();
            if root && let Err(e) = chown(&path, Some(1234), Some(4321)) {
                // In a user namespace without these ids.
                use io::ErrorKind::{InvalidInput, PermissionDenied};
                assert!(matches!(e.kind(), InvalidInput | PermissionDenied), "{e}");
                eprintln!("NOT RUN: files of another owner: {e}");
            }
            let set = std::fs::Permissions::from_mode(mode | 0o6000);
            std::fs::set_permissions(&path, set).unwrap();
            let old = std::fs::metadata(&path).unwrap();
            let mut file = match resume {
                true => AtomicFile::resume(&path).unwrap(),
                false => AtomicFile::create(&path).unwrap(),
            };
            file.write_all(b"new").unwrap();
            // Even during the write, others must not read what they may not read in the end.
            let written = file.out.get_ref().metadata().unwrap();
            assert_eq!(written.mode() & 0o077 & !mode, 0, "{mode:o}");
            file.commit().unwrap();
            let new = std::fs::metadata(&path).unwrap();
            assert_eq!(new.mode() & 0o7777, mode, "{mode:o} {resume}");
            assert_eq!((new.uid(), new.gid()), (old.uid(), old.gid()));
            assert!(!partial(&path).exists());
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[cfg(unix)]
#[test]
fn a_partial_file_is_not_opened_through_a_link_nor_anything_but_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("victim"), b"theirs").unwrap();
    let partial = at("f.partial");
    let refused = || {
        let e = AtomicFile::resume(at("f")).unwrap_err();
        assert!(e.to_string().contains("not a regular file"), "{e}");
        let e = open_regular_file(&partial).unwrap_err();
        assert_eq!(e.to_string(), "not a regular file");
    };
    for target in ["victim", "none"] {
        std::os::unix::fs::symlink(at(target), &partial).unwrap();
        refused();
        std::fs::remove_file(&partial).unwrap();
    }
    std::fs::hard_link(at("victim"), &partial).unwrap();
    for e in [
        AtomicFile::resume(at("f")).unwrap_err().to_string(),
        open_regular_file(&partial).unwrap_err().to_string(),
    ] {
        assert!(e.contains("another name"), "{e}");
    }
    std::fs::remove_file(&partial).unwrap();
    std::os::unix::net::UnixListener::bind(&partial).unwrap();
    refused();
    std::fs::remove_file(&partial).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&partial).status();
    assert!(made.unwrap().success());
    refused();
    std::fs::remove_file(&partial).unwrap();
    std::fs::create_dir(&partial).unwrap();
    refused();
    assert_eq!(std::fs::read(at("victim")).unwrap(), b"theirs");
    assert_eq!(names(dir.path()), ["f.partial", "victim"]);
}

#[test]
fn long_names_have_room_for_all_that_is_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    let long = |character: &str, bytes: usize, end: &str| {
        let count = (bytes - end.len()) / character.len();
        let padding = "x".repeat(bytes - end.len() - count * character.len());
        format!("{padding}{}{end}", character.repeat(count))
    };
    let mut seen = std::collections::HashSet::new();
    for character in ["a", "ü", "語", "🦀"] {
        for bytes in [100, 239, 240, 254, 255] {
            // The names differ only in their last bytes.
            for end in ["1", "2"] {
                let name = long(character, bytes, end);
                assert_eq!(name.len(), bytes);
                let path = dir.path().join(&name);
                for suffix in [".partial", ".partial.journal"] {
                    let beside = AtomicFile::beside(&path, suffix).unwrap();
                    let beside = beside.file_name().unwrap().to_str().unwrap().to_owned();
                    let is_plain = beside == format!("{name}{suffix}");
                    assert_eq!(is_plain, bytes < 240, "{beside}");
                    assert!(beside.len() <= 255 && beside.ends_with(suffix));
                    assert_eq!(beside.as_bytes()[..19], name.as_bytes()[..19]);
                    assert!(seen.insert(beside));
                }
                AtomicFile::create(&path).unwrap().commit().unwrap();
                let mut file = AtomicFile::resume(&path).unwrap();
                file.write_all(b"resumed").unwrap();
                file.commit().unwrap();
                assert_eq!(std::fs::read(&path).unwrap(), b"resumed");
                assert_eq!(names(dir.path()), [name]);
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
}

/// Names need not be valid text.
#[cfg(target_os = "linux")]
#[test]
fn long_names_that_are_no_text_differ_too() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let beside = |last: u8| {
        let mut name = [0xff; 255];
        name[254] = last;
        let path = dir.path().join(OsStr::from_bytes(&name));
        AtomicFile::resume(&path).unwrap().commit().unwrap();
        AtomicFile::partial(&path).unwrap()
    };
    assert_ne!(beside(0xfe), beside(0xfd));
}

#[cfg(unix)]
#[test]
fn a_folder_that_cannot_be_written_to_is_an_io_error() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    // A folder of the kernel, where even root cannot write.
    let of_kernel = Path::new("/proc");
    let set = std::fs::Permissions::from_mode(0o555);
    std::fs::set_permissions(dir.path(), set).unwrap();
    let probe = dir.path().join("probe");
    let folders = [of_kernel, dir.path()].into_iter();
    for folder in
        folders.filter(|f| f.is_dir() && (*f == of_kernel || File::create(&probe).is_err()))
    {
        for made in [
            AtomicFile::create(folder.join("f")),
            AtomicFile::resume(folder.join("f")),
        ] {
            let e = made.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Io);
            assert!(e.to_string().contains("cannot write"), "{e}");
        }
    }
}

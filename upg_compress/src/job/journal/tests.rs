use super::*;
use upg_kernel::format::Encoding;

fn fingerprint(seed: &str) -> Fingerprint {
    [("options", seed), ("version", "1")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

fn record(name: &str) -> Record {
    let mut layer = LayerInfo::new(name, 2, 3, Encoding::MdCsr);
    layer.error = Some(0.123457);
    Record {
        tensor: TensorReport {
            name: name.into(),
            encoding: "mdcsr".into(),
            shape: vec![2, 3],
            bytes: 6,
            weight_error: layer.error,
            output_error: Some(1.0 / 3.0),
            divergence: Some(3.33333e-10),
            zeros: Some(7),
            seconds: 0.1,
        },
        layer: Some(layer),
        arrays: vec![WrittenArray {
            shape: vec![6],
            bytes: 6,
            checksum: checksum_of(name.as_bytes()),
        }],
    }
}

/// Writes a journal of three records; returns its bytes.
fn written(path: &Path) -> Vec<u8> {
    let (mut journal, found) = Journal::open(path.into(), &fingerprint("7")).unwrap();
    assert!(found.is_none());
    for name in ["a", "b", "c"] {
        journal.add(&record(name)).unwrap();
    }
    std::fs::read(path).unwrap()
}

fn names(records: &[Record]) -> Vec<&str> {
    records.iter().map(|r| r.tensor.name.as_str()).collect()
}

#[test]
fn records_come_back_and_more_can_be_added() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    written(&path);
    let (mut journal, found) = Journal::open(path.clone(), &fingerprint("7")).unwrap();
    assert_eq!(found.unwrap(), ["a", "b", "c"].map(record));
    journal.forget_after(1).unwrap();
    journal.add(&record("d")).unwrap();
    drop(journal);
    let (journal, found) = Journal::open(path.clone(), &fingerprint("7")).unwrap();
    assert_eq!(names(&found.unwrap()), ["a", "d"]);
    journal.remove().unwrap();
    assert!(!path.exists());
}

fn ends_of_lines(bytes: &[u8]) -> Vec<usize> {
    let lines = bytes.split_inclusive(|&b| b == b'\n');
    let mut end = 0;
    lines
        .map(|line| {
            end += line.len();
            end
        })
        .collect()
}

/// Cut after any byte, the journal has the records whose lines are complete, and accepts the
/// others again.
#[test]
fn a_torn_journal_has_what_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let bytes = written(&path);
    let ends = ends_of_lines(&bytes);
    for len in 0..=bytes.len() {
        std::fs::write(&path, &bytes[..len]).unwrap();
        let (mut journal, found) = Journal::open(path.clone(), &fingerprint("7")).unwrap();
        let whole = ends.iter().filter(|&&end| end <= len).count();
        let count = found.as_ref().map(Vec::len);
        assert_eq!(count, whole.checked_sub(2), "{len}");
        for name in ["a", "b", "c"].iter().skip(count.unwrap_or(0)) {
            journal.add(&record(name)).unwrap();
        }
        drop(journal);
        assert!(std::fs::read(&path).unwrap() == bytes, "{len}");
    }
}

/// From a wrong bit on, nothing is trusted; damage to the first lines is an error.
#[test]
fn damage_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let bytes = written(&path);
    let ends = ends_of_lines(&bytes);
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 4;
        std::fs::write(&path, &damaged).unwrap();
        let opened = Journal::open(path.clone(), &fingerprint("7"));
        let whole = ends.iter().filter(|&&end| end <= place).count();
        match opened {
            Ok((_, found)) => assert_eq!(found.unwrap().len() + 2, whole, "{place}"),
            Err(e) => {
                assert_eq!(e.kind(), ErrorKind::Malformed, "{place}: {e}");
                assert!(whole < 2, "{place}: {e}");
            }
        }
    }
}

#[test]
fn another_run_is_refused_by_what_differs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let bytes = written(&path);
    let e = Journal::open(path.clone(), &fingerprint("8")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
    assert!(e.to_string().contains("another options: 7, now 8"), "{e}");
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn two_cannot_have_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let (first, _) = Journal::open(path.clone(), &fingerprint("7")).unwrap();
    let e = Journal::open(path.clone(), &fingerprint("7")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
    drop(first);
    Journal::open(path, &fingerprint("7")).unwrap();
}

#[test]
fn other_files_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    for text in ["x", "upg journal 1\n", "upg journal 2\nx\n"] {
        std::fs::write(&path, text).unwrap();
        let e = Journal::open(path.clone(), &fingerprint("7")).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Malformed, "{text}: {e}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
    let e = Journal::open(folder.path().to_path_buf(), &fingerprint("7")).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
}

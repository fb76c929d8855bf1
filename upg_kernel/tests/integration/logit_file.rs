//! Reference logits in a file, which is read as untrusted input.

use std::fs;
use std::path::{Path, PathBuf};
use upg_kernel::inference::evaluate::{LogitFile, Reference, Window, Windows};
use upg_kernel::{ErrorKind, Result};

const VOCAB: usize = 3;

/// Reference with these logits at each position, limited to a number of calls.
struct Fixed([f32; VOCAB], usize);

impl Reference for Fixed {
    fn logits(&mut self, window: &Window<'_>) -> Result<Vec<f32>> {
        self.1 = self.1.checked_sub(1).expect("was computed before");
        Ok(self.0.repeat(window.targets.len()))
    }
}

fn windows(token: u32) -> Windows {
    Windows::new(vec![token; 10], None, 5, usize::MAX).unwrap()
}

/// Returns the logits of all windows through the file, and whether it had them.
fn through(path: &Path, token: u32, identity: &str, most: usize) -> Result<(Vec<f32>, bool)> {
    let windows = windows(token);
    let mut fixed = Fixed([-1.0, 1.0, 0.123], most);
    let mut file = LogitFile::open(path, &windows, VOCAB, identity, &[], &mut fixed)?;
    let filled = file.is_filled();
    let mut logits = Vec::new();
    for window in windows.iter() {
        logits.extend(file.logits(&window)?);
    }
    file.finish()?;
    Ok((logits, filled))
}

#[test]
fn what_was_computed_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logits");
    let (computed, filled) = through(&path, 1, "a", 2).unwrap();
    assert!(!filled && computed.len() == 2 * 2 * VOCAB);
    let half_a_step = 2.0 / 131_070.0;
    for (found, wanted) in computed.iter().zip([-1.0f32, 1.0, 0.123].iter().cycle()) {
        assert!(
            (found - wanted).abs() <= 1.01 * half_a_step,
            "{found}, {wanted}"
        );
    }
    assert_eq!(through(&path, 1, "a", 0).unwrap(), (computed, true));
    // Others are computed again.
    assert!(!through(&path, 1, "b", 2).unwrap().1);
    assert!(!through(&path, 2, "b", 2).unwrap().1);
    assert!(through(&path, 2, "b", 0).unwrap().1);
}

#[test]
fn the_file_is_as_described() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logits");
    through(&path, 1, "identity", 2).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 64 + 2 * 2 * (8 + 2 * VOCAB));
    assert_eq!(bytes[..8], *b"upglogit");
    let numbers = [VOCAB as u64, 2, 2].map(u64::to_le_bytes);
    assert_eq!(bytes[8..32], *numbers.as_flattened());
    // python3 -c 'import hashlib, struct; print(hashlib.sha256(struct.pack("<14I", *[1] * 14) +
    // b"identity").hexdigest()[:8])'
    assert_eq!(bytes[32..36], [142, 127, 53, 238]);
    let range = [1.0f32, 2.0 / 65_535.0].map(f32::to_le_bytes);
    assert_eq!(bytes[64..72], *range.as_flattened());
    // (1 - 0.123) * 65535 / 2 = 28737.1
    let codes = [65_535u16, 0, 28_737].map(u16::to_le_bytes);
    assert_eq!(bytes[72..78], *codes.as_flattened());
}

#[test]
fn files_that_are_not_sound_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logits");
    through(&path, 1, "a", 2).unwrap();
    let sound = fs::read(&path).unwrap();
    let infinite = [&sound[..64], &f32::INFINITY.to_le_bytes(), &sound[68..]].concat();
    let longer = [sound.as_slice(), &[0]].concat();
    for (bytes, kind) in [
        (sound[..sound.len() - 1].to_vec(), ErrorKind::Malformed),
        (longer, ErrorKind::Malformed),
        (infinite, ErrorKind::Malformed),
        (b"a text of somebody".repeat(9), ErrorKind::Argument),
        (b"short".to_vec(), ErrorKind::Argument),
        (Vec::new(), ErrorKind::Argument),
    ] {
        fs::write(&path, &bytes).unwrap();
        let e = through(&path, 1, "a", 2).unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
        assert_eq!(fs::read(&path).unwrap(), bytes, "was touched");
    }
}

#[test]
fn logits_that_no_file_can_have_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("logits");
    let windows = windows(1);
    let open = |reference: &mut Fixed, inputs: &[PathBuf]| {
        let mut file = LogitFile::open(&path, &windows, VOCAB, "a", inputs, reference)?;
        let window = windows.iter().next().expect("there are two");
        file.logits(&window)
    };
    let e = open(&mut Fixed([0.0, f32::NAN, 0.0], 1), &[]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Invalid, "{e}");
    // Equal logits have a step of 0.
    assert_eq!(open(&mut Fixed([0.5; 3], 1), &[]).unwrap(), [0.5; 6]);
    let e = open(&mut Fixed([0.5; 3], 1), std::slice::from_ref(&path)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
    // None was finished.
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    let mut fixed = Fixed([0.0; 3], 0);
    let most = LogitFile::open(&path, &windows, usize::MAX, "a", &[], &mut fixed);
    assert_eq!(most.err().map(|e| e.kind()), Some(ErrorKind::TooLarge));
}

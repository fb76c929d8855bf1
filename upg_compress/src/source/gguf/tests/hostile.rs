//! Damaged and malicious GGUF files.
//!
//! The result is an informative error or a correct read; never a panic, and never more memory than
//! the size of the file justifies.

use super::super::{GgufSource, Source};
use super::builder::{ARRAY, File, STRING};
use super::{FAMILIES, data};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::path::Path;
use upg_kernel::{ErrorKind, Result};

/// Writes `bytes` to a file and reads everything in it.
pub(super) fn read_all(path: &Path, bytes: &[u8]) -> Result<()> {
    // Not in place: a mapped file must not change.
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
    let source = GgufSource::open(path)?;
    for index in 0..source.tensors().len() {
        source.read_f32(index)?;
        source.read_raw(index)?;
    }
    Ok(())
}

#[test]
fn every_truncation_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let good = std::fs::read(data("families/qwen2/model.gguf")).unwrap();
    read_all(&path, &good).unwrap();
    // The last tensor ends up to one alignment before the file does.
    for len in (0..good.len() - 32).step_by(5) {
        let error = read_all(&path, &good[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{len}: {error}");
    }
}

#[test]
fn random_damage_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for family in FAMILIES {
        let good = std::fs::read(data(&format!("families/{family}/model.gguf"))).unwrap();
        // The position of the tensor data does not matter:
        // most flips hit bytes that affect decisions.
        let header = good.len().min(5000) as u64;
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..=random.next_u64() % 3 {
                let at = (random.next_u64() % header) as usize;
                bad[at] = random.next_u64() as u8;
            }
            refused += usize::from(read_all(&path, &bad).is_err());
        }
    }
    assert!(
        refused > 100,
        "{refused} of 2100 refused: is the damage applied?"
    );
}

#[test]
fn absurd_headers_are_refused() {
    let architecture = |name: &str| {
        File::new(0, 1)
            .key("general.architecture", STRING)
            .text(name)
    };
    let tensor = |dims: &[u64], kind, offset| {
        File::new(1, 0)
            .tensor("blk.0.x", dims, kind, offset)
            .bytes(&[0; 256])
    };
    let nested = (0..9).fold(File::new(0, 1).key("k", ARRAY), |f, _| f.u32(ARRAY).u64(1));
    let huge = u64::MAX;
    use ErrorKind::{Malformed, Missing, TooLarge, Unsupported};
    let table: Vec<(&str, File, ErrorKind, &str)> = vec![
        ("tensors", File::new(huge, 0), TooLarge, "at most 65536"),
        ("keys", File::new(0, huge), TooLarge, "metadata keys"),
        (
            "key length",
            File::new(0, 1).u64(huge),
            Malformed,
            "more bytes expected",
        ),
        (
            "long key",
            File::new(0, 1).text(&"k".repeat(5000)).u32(0),
            Malformed,
            "5000 bytes",
        ),
        (
            "key bytes",
            File::new(0, 1).u64(2).bytes(&[0xff, 0xfe]),
            Malformed,
            "UTF-8",
        ),
        (
            "string length",
            File::new(0, 1).key("k", STRING).u64(huge),
            Malformed,
            "\"k\"",
        ),
        (
            "value type",
            File::new(0, 1).key("k", 13).u64(0),
            Malformed,
            "unknown value type 13",
        ),
        (
            "bool",
            File::new(0, 1).key("k", 7).bytes(&[2]),
            Malformed,
            "2 as a value",
        ),
        (
            "bytes",
            File::new(0, 1).key("k", ARRAY).u32(0).u64(huge),
            Malformed,
            "more bytes",
        ),
        (
            "longs",
            File::new(0, 1).key("k", ARRAY).u32(10).u64(huge / 4),
            Malformed,
            "more bytes",
        ),
        (
            "strings",
            File::new(0, 1).key("k", ARRAY).u32(STRING).u64(huge),
            Malformed,
            "more bytes",
        ),
        ("nested", nested, Malformed, "depth"),
        (
            "key twice",
            File::new(0, 2).number("k", 1).number("k", 2),
            Malformed,
            "twice",
        ),
        (
            "alignment 0",
            File::new(0, 1).number("general.alignment", 0),
            Malformed,
            "power of two",
        ),
        (
            "alignment 12",
            File::new(0, 1).number("general.alignment", 12),
            Malformed,
            "power of two",
        ),
        (
            "alignment 4",
            File::new(0, 1).number("general.alignment", 4),
            Malformed,
            "power of two",
        ),
        (
            "big alignment",
            File::new(0, 1).number("general.alignment", 1 << 31),
            Malformed,
            "power",
        ),
        (
            "alignment kind",
            File::new(0, 1).key("general.alignment", STRING).text("8"),
            Malformed,
            "",
        ),
        ("no dims", tensor(&[], 0, 0), Malformed, "0 dimensions"),
        ("5 dims", tensor(&[1; 5], 0, 0), Malformed, "5 dimensions"),
        ("dim 0", tensor(&[4, 0], 0, 0), Malformed, "bad dimensions"),
        (
            "overflow",
            tensor(&[1 << 40, 1 << 40], 0, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "wraps to 0",
            tensor(&[1 << 32, 1 << 32], 0, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "bytes overflow",
            tensor(&[1 << 62], 0, 0),
            Malformed,
            "past the end",
        ),
        (
            "ragged block",
            tensor(&[33, 2], 2, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "past the end",
            tensor(&[64], 0, 32),
            Malformed,
            "past the end",
        ),
        (
            "offset overflow",
            tensor(&[4], 0, huge - 31),
            Malformed,
            "past the end",
        ),
        ("unaligned", tensor(&[4], 0, 8), Malformed, "not aligned"),
        (
            "IQ type",
            tensor(&[256], 23, 0),
            Unsupported,
            "tensor 'blk.0.x': GGUF type IQ4_XS",
        ),
        ("NVFP4", tensor(&[256], 40, 0), Unsupported, "NVFP4"),
        ("Q8_1", tensor(&[32], 9, 0), Unsupported, "Q8_1"),
        (
            "new type",
            tensor(&[256], 1000, 0),
            Unsupported,
            "number 1000",
        ),
        (
            "tensor twice",
            File::new(2, 0)
                .tensor("a", &[1], 0, 0)
                .tensor("a", &[1], 0, 0),
            Malformed,
            "twice",
        ),
        ("nothing", File::new(0, 0), Missing, "general.architecture"),
        (
            "other model",
            architecture("gemma3"),
            Unsupported,
            "\"gemma3\"",
        ),
        (
            "no sizes",
            architecture("llama"),
            Missing,
            "llama.embedding_length",
        ),
        (
            "split",
            File::new(0, 1).key("split.count", 2).bytes(&[3, 0]),
            Unsupported,
            "part 1 of 3",
        ),
        (
            "adapter",
            File::new(0, 1).key("general.type", STRING).text("adapter"),
            Unsupported,
            "adapter",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (what, file, kind, message) in table {
        let error = read_all(&path, &file.0).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        let error = error.to_string();
        assert!(error.contains(message), "{what}: {error}");
        assert!(
            error.contains("m.gguf") && !error.contains('\n'),
            "{what}: {error}"
        );
    }
}

/// 8 GiB of one-byte values, in a sparse file: expanded into values of 32 bytes it would be
/// 256 GiB. Neither these nor empty texts are walked over, read or stored.
#[test]
fn a_huge_array_costs_neither_memory_nor_time() {
    let len = 8u64 << 30;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (kind, count) in [(0, len), (STRING, len / 8)] {
        let header = File::new(0, 1).key("k", ARRAY).u32(kind).u64(count).0;
        std::fs::write(&path, &header).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(header.len() as u64 + len).unwrap();
        let error = GgufSource::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        assert!(error.to_string().contains("over 256 MiB"), "{error}");
    }
}

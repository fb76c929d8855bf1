//! Models in parts, which llama.cpp's `gguf` package wrote; see `tests/data/make_split.py`.

use super::super::{GgufSource, Source};
use super::builder::File;
use super::data;
use std::path::{Path, PathBuf};
use upg_kernel::ErrorKind::{self, *};

/// Names of the parts of a model in `tests/data/split`.
fn parts(model: &str, count: usize) -> Vec<String> {
    let name = |number| format!("{model}-{number:05}-of-{count:05}.gguf");
    (1..=count).map(name).collect()
}

#[test]
fn any_part_opens_the_whole_model() {
    for (model, count) in [("llama3", 2), ("qwen3", 4)] {
        let whole = GgufSource::open(data(&format!("families/{model}/model.gguf"))).unwrap();
        let paths: Vec<PathBuf> = parts(model, count)
            .iter()
            .map(|name| data("split").join(name))
            .collect();
        for path in &paths {
            let split = GgufSource::open(path).unwrap();
            assert_eq!(split.own_files(), paths);
            assert_eq!(split.model_name(), whole.model_name());
            assert_eq!(split.files(), whole.files());
            let shapes = |s: &GgufSource| -> Vec<_> {
                let tensors = s.tensors().iter();
                tensors.map(|t| (t.name.clone(), t.shape.clone())).collect()
            };
            assert_eq!(shapes(&split), shapes(&whole));
            for index in 0..whole.tensors().len() {
                assert_eq!(
                    split.read_f32(index).unwrap(),
                    whole.read_f32(index).unwrap()
                );
            }
        }
    }
}

#[test]
fn a_model_without_name_is_called_like_its_parts() {
    let folder = tempfile::tempdir().unwrap();
    for name in parts("qwen3", 4) {
        let mut bytes = std::fs::read(data("split").join(&name)).unwrap();
        let key = b"general.name";
        if let Some(at) = bytes.windows(key.len()).position(|w| w == key) {
            bytes[at..at + key.len()].copy_from_slice(b"general.none");
        }
        std::fs::write(folder.path().join(name.replace("qwen3", "my")), bytes).unwrap();
    }
    let source = GgufSource::open(folder.path().join("my-00001-of-00004.gguf")).unwrap();
    assert_eq!(source.model_name(), "my");
}

/// Copies a split model, lets `change` spoil it,
/// and checks the error of opening its first part.
fn refused(change: impl FnOnce(&Path), kind: ErrorKind, words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    for name in parts("qwen3", 4) {
        std::fs::copy(data("split").join(&name), folder.path().join(&name)).unwrap();
    }
    change(folder.path());
    let first = folder.path().join("qwen3-00001-of-00004.gguf");
    let error = GgufSource::open(first).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    for word in words {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let part = |folder: &Path, number| folder.join(format!("qwen3-{number:05}-of-00004.gguf"));
    let copy = |from: PathBuf, to: PathBuf| std::fs::copy(from, to).unwrap();
    refused(
        |folder| std::fs::remove_file(part(folder, 3)).unwrap(),
        Missing,
        &["qwen3-00003-of-00004.gguf", "part 3 of 4", "one folder"],
    );
    refused(
        |folder| _ = copy(part(folder, 2), part(folder, 3)),
        Unsupported,
        &["qwen3-00003-of-00004.gguf", "this is part 2 of 4"],
    );
    refused(
        |folder| _ = copy(data("families/qwen3/model.gguf"), part(folder, 4)),
        Malformed,
        &["qwen3-00004-of-00004.gguf", "a whole GGUF file"],
    );
    refused(
        |folder| {
            let bytes = std::fs::read(part(folder, 4)).unwrap();
            std::fs::write(part(folder, 4), &bytes[..bytes.len() - 64]).unwrap();
        },
        Malformed,
        &["qwen3-00004-of-00004.gguf", "cut short"],
    );
    let split = |tensors: u64| {
        let keys = File::new(tensors, 2).number("split.count", 4);
        keys.number("split.no", 3)
    };
    refused(
        |folder| std::fs::write(part(folder, 4), split(0).0).unwrap(),
        Malformed,
        &["00001-of-00004.gguf", "18 tensors", "says 25"],
    );
    refused(
        |folder| {
            let tensor = split(1).tensor("token_embd.weight", &[1], 0, 0);
            std::fs::write(part(folder, 4), tensor.bytes(&[0; 64]).0).unwrap();
        },
        Malformed,
        &[
            "00004-of-00004.gguf",
            "token_embd.weight",
            "listed in two parts",
        ],
    );
}

#[test]
fn what_a_part_says_of_itself_is_checked() {
    for (name, count, number, kind, words) in [
        ("m.gguf", 3, 0, Unsupported, "part 1 of 3"),
        ("m-00002-of-00003.gguf", 3, 0, Unsupported, "part 1 of 3"),
        (
            "m-00001-of-00003.gguf",
            3,
            3,
            Malformed,
            "split.no is 3 of 3",
        ),
        ("m-00001-of-00003.gguf", 3, 0, Missing, "part 2 of 3"),
        ("m-00001-of-60000.gguf", 60_000, 0, TooLarge, "60000 parts"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let keys = File::new(0, 2).number("split.count", count);
        let path = folder.path().join(name);
        std::fs::write(&path, keys.number("split.no", number).0).unwrap();
        let error = GgufSource::open(&path).unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(words), "{name}: {error}");
    }
}

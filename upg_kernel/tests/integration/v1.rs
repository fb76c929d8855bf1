//! Version 1 files that Python has written, and pickles that must be refused.

use crate::common::{collect, data};
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::v1::{V1File, is_pickle, open_any, open_any_with};
use upg_kernel::{ErrorKind, OpenOptions, Result, UPGDecompressor, UPGModel};

fn file(name: &str) -> PathBuf {
    data("v1").join(name)
}

/// Lists the files of Python, each with its expected content: `rows.safetensors` or
/// `one.safetensors`.
fn files_of_python() -> Vec<(PathBuf, &'static str)> {
    let of_python = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with("numpy") && name.ends_with(".upg")
    };
    let entries = fs::read_dir(data("v1")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path()).filter(of_python);
    let with_kind = |path: PathBuf| match path.to_str().unwrap().contains("-one") {
        true => (path, "one"),
        false => (path, "rows"),
    };
    let files: Vec<_> = paths.map(with_kind).collect();
    assert_eq!(files.len(), 72);
    files
}

fn buffers_of(path: &Path) -> Vec<PathBuf> {
    let name = path.with_extension("").to_str().unwrap().to_owned();
    let numbered = (0..).map(|number| PathBuf::from(format!("{name}.{number:02}.buffer")));
    numbered.take_while(|path| path.exists()).collect()
}

fn convert(path: &Path, buffers: &[PathBuf]) -> Result<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let file = V1File::open(path, buffers)?;
    let converted = file.convert(&out, &ModelFiles::default(), &mut |_, _| Ok(()));
    assert_eq!(out.exists(), converted.is_ok());
    converted.map(|_| fs::read(out).unwrap())
}

/// Compares every weight of a file with numpy's result in double precision.
fn check_weights(found: &UpgFile, kind: &str) {
    let bytes = fs::read(file("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut names = 0;
    for (name, tensor) in expected.iter() {
        let Some(name) = name.strip_prefix(&format!("{kind}/")) else {
            continue;
        };
        let weights = match found.layer_id(name) {
            Some(id) => found.matrix(id).unwrap().to_dense(),
            None => found.kept_vector(name).unwrap(),
        };
        let expected: Vec<f64> = collect(tensor.data());
        assert_eq!(weights.len(), expected.len());
        for (found, expected) in weights.iter().zip(expected) {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= 1e-6 * expected.abs(), "{name}: {found} {expected}");
        }
        names += 1;
    }
    assert_eq!(names, 4);
}

/// Loads the output of `convert_pickle_to_safetensors.py`.
#[test]
fn test_load_safetensors() {
    for kind in ["rows", "one"] {
        let path = file(&format!("{kind}.safetensors"));
        let opened = UpgFile::open(&path).unwrap();
        opened.verify(&|_| ()).unwrap();
        assert_eq!(opened.metadata("version"), Some("2.0"));
        assert_eq!(opened.metadata("model"), Some("phi-4-upg"));
        check_weights(&opened, kind);
    }
}

#[test]
fn every_file_of_python_becomes_what_the_script_makes_of_it() {
    for (path, kind) in files_of_python() {
        assert!(is_pickle(&path));
        let converted = convert(&path, &buffers_of(&path));
        let expected = fs::read(file(&format!("{kind}.safetensors"))).unwrap();
        assert!(converted.unwrap() == expected, "{}", path.display());
    }
}

#[test]
fn old_files_are_opened_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let old = file("model/tiny.upg");
    let texts = ModelFiles::read(&file("model")).unwrap();
    let new = folder.path().join("new.safetensors");
    let mut named = Vec::new();
    let v1 = V1File::open(&old, &[]).unwrap();
    let mut proceed = |name: &str, weights| {
        named.push((name.to_owned(), weights));
        Ok(())
    };
    let converted = v1.convert(&new, &texts, &mut proceed).unwrap();
    assert_eq!((converted.matrices, converted.vectors), (8, 3));
    assert_eq!(named.len(), 11);
    assert_eq!(named[0], ("model.embed_tokens.weight".to_owned(), 512));
    let weights: u64 = named.iter().map(|(_, weights)| weights).sum();
    assert_eq!(converted.weights, weights);
    assert_eq!(converted.file_bytes, fs::metadata(&new).unwrap().len());

    let opened = Arc::new(open_any(&old).unwrap());
    // Messages name the requested file.
    assert_eq!(opened.path(), old);
    let of_old = UPGModel::new(Arc::clone(&opened)).unwrap();
    let of_new = UPGModel::from_file(&new).unwrap();
    let logits = |model: &UPGModel| {
        let logits = model.forward(&[1, 5, 9]).unwrap();
        logits.flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(logits(&of_old), logits(&of_new));
    let matrix = UPGDecompressor::new(opened);
    let name = "model.layers.0.mlp.down_proj.weight";
    let decompressed = |model: &UPGDecompressor| {
        let tensor = model.decompress_layer(name).unwrap();
        tensor
            .flatten_all()
            .unwrap()
            .to_vec1::<half::bf16>()
            .unwrap()
    };
    let new = UPGDecompressor::from_safetensors(&new).unwrap();
    assert_eq!(decompressed(&matrix), decompressed(&new));
    // Read into memory, it is verified too.
    let read = open_any_with(&old, OpenOptions::in_memory()).unwrap();
    assert_eq!(read.file_len(), converted.file_bytes);
}

#[test]
fn old_files_are_not_converted_unasked() {
    let old = file("model/tiny.upg");
    for e in [
        UpgFile::open(&old).err(),
        UPGModel::from_file(&old).err(),
        UPGDecompressor::from_safetensors(&old).err(),
    ] {
        let e = e.unwrap();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        let says = e.to_string();
        assert!(says.contains("a UPG file of version 1"), "{says}");
        assert!(says.contains("upg convert OLD NEW"), "{says}");
        assert_eq!(says.lines().count(), 1);
    }
}

/// The length of a header may equal the bytes that a pickle starts with.
#[test]
fn a_file_of_version_2_that_begins_as_a_pickle_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("padded.safetensors");
    let bytes = fs::read(file("rows.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let longer: u64 = 0x10280;
    let mut padded = longer.to_le_bytes().to_vec();
    padded.extend(&bytes[8..8 + header as usize]);
    padded.resize(8 + longer as usize, b' ');
    padded.extend(&bytes[8 + header as usize..]);
    fs::write(&path, padded).unwrap();
    assert!(!is_pickle(&path));
    UpgFile::open(&path).unwrap().verify(&|_| ()).unwrap();
}

#[test]
fn a_list_without_weights_is_read_and_not_converted() {
    let path = file("catalogue.upg");
    let opened = V1File::open(&path, &[]).unwrap();
    let catalogue = opened.catalogue();
    assert!(catalogue.is_list_only());
    assert_eq!(catalogue.source.as_deref(), Some("microsoft/phi-4"));
    let tensor = &catalogue.tensors[2];
    assert_eq!(tensor.name, "model.layers.1.mlp.up_proj.weight");
    assert_eq!(tensor.shape, [3, 4]);
    assert_eq!(tensor.notes["quantization"], "int8");
    for e in [
        convert(&path, &[]).unwrap_err(),
        open_any(&path).err().unwrap(),
    ] {
        assert_eq!(e.kind(), ErrorKind::Missing);
        let command = "upg compress microsoft/phi-4 -o phi-4.safetensors --encoding t3";
        assert!(e.to_string().contains(command), "{e}");
    }
}

/// Returns a pickle with the text `from` replaced by one of the same length.
fn replaced(name: &str, from: &str, to: &str) -> Vec<u8> {
    let mut bytes = fs::read(file(name)).unwrap();
    let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
    let at = at.unwrap();
    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn no_command_of_a_file_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    for source in ["a; rm -rf ~/   ", "-o/etc/passwd  ", "$(touch canary)"] {
        fs::write(&path, replaced("catalogue.upg", "microsoft/phi-4", source)).unwrap();
        let e = convert(&path, &[]).unwrap_err().to_string();
        assert!(
            e.contains("upg compress MODEL_DIRECTORY -o model.safetensors"),
            "{e}"
        );
    }
}

/// Reads the cases of a file.
fn cases(name: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(file(name)).unwrap()).unwrap()
}

/// Joins the bytes of parts, each repeated by its count.
fn joined(parts: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts.as_array().unwrap() {
        let part_bytes = of_hex(part[0].as_str().unwrap());
        (0..part[1].as_u64().unwrap()).for_each(|_| bytes.extend(&part_bytes));
    }
    bytes
}

#[test]
fn lists_of_numbers_are_as_the_arrays_of_the_same_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.upg");
    let cases = cases("alike.json");
    assert!(cases.len() > 15);
    for case in cases {
        let [of_lists, of_arrays] = ["lists", "arrays"].map(|kind| {
            fs::write(&path, joined(&case[kind])).unwrap();
            convert(&path, &[]).unwrap_or_else(|e| panic!("{}: {kind}: {e}", case["name"]))
        });
        assert!(of_lists == of_arrays, "{}", case["name"]);
    }
}

#[test]
fn hostile_pickles_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("hostile");
    let cases = cases("hostile.json");
    assert!(cases.len() > 100);
    for case in cases {
        fs::write(&path, joined(&case["parts"])).unwrap();
        let e = convert(&path, &[]).expect_err(case["name"].as_str().unwrap());
        let says = case["says"].as_str().unwrap();
        assert!(e.to_string().contains(says), "{}: {e}", case["name"]);
    }
}

fn of_hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().as_chunks::<2>().0;
    let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
    digits.iter().map(|pair| byte(pair).unwrap()).collect()
}

#[test]
fn every_beginning_of_a_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut");
    for name in ["numpy1-p2-one.upg", "numpy2-p5-arrays.upg"] {
        let bytes = fs::read(file(name)).unwrap();
        for len in 0..bytes.len() {
            fs::write(&path, &bytes[..len]).unwrap();
            assert!(convert(&path, &[]).is_err(), "{name}: {len}");
        }
    }
}

#[test]
fn buffers_have_to_be_those_of_the_file() {
    let path = file("numpy2-p5-out-of-band.upg");
    let buffers = buffers_of(&path);
    assert_eq!(buffers.len(), 20);
    let e = convert(&path, &[]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Missing);
    assert!(e.to_string().contains("--buffers"), "{e}");
    assert!(
        convert(&path, &buffers[..19])
            .unwrap_err()
            .to_string()
            .contains("the 19")
    );
    let mut exchanged = buffers.clone();
    exchanged.swap(0, 1);
    assert_eq!(
        convert(&path, &exchanged).unwrap_err().kind(),
        ErrorKind::Malformed
    );
}

#[test]
fn an_input_is_not_overwritten_and_an_error_of_the_caller_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.upg");
    fs::copy(file("numpy2-p5-arrays.upg"), &path).unwrap();
    let opened = V1File::open(&path, &[]).unwrap();
    let texts = ModelFiles::default();
    let e = opened
        .convert(&path, &texts, &mut |_, _| Ok(()))
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
    let out = folder.path().join("new");
    let mut stop = |_: &str, _| Err(upg_kernel::Error::new(ErrorKind::Interrupted, "stop"));
    let e = opened.convert(&out, &texts, &mut stop).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Interrupted);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

//! All fuzz targets by name.

pub mod compressed_tensors;
pub mod config;
pub mod decoders;
pub mod gguf;
pub mod header;
pub mod hf_directory;
pub mod journal;
pub mod pickle;
pub mod resealed;
pub mod template;
pub mod tokenizer;

use std::path::Path;
use tempfile::TempDir;
use upg_compress::Source;
use upg_kernel::format::UpgFile;
use upg_kernel::support::steers;
use upg_kernel::{Error, Matrix};

/// Target with its name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const ALL: [Target; 11] = [
    ("compressed_tensors", compressed_tensors::run),
    ("config", config::run),
    ("decoders", decoders::run),
    ("gguf", gguf::run),
    ("header", header::run),
    ("hf_directory", hf_directory::run),
    ("journal", journal::run),
    ("pickle", pickle::run),
    ("resealed", resealed::run),
    ("template", template::run),
    ("tokenizer", tokenizer::run),
];

/// Separator between the parts of an input.
const SEPARATOR: &[u8] = b"\n=====\n";

/// Maximum weights of a tensor that is decoded or read; larger ones would only take time.
const MOST_WEIGHTS: usize = 1 << 16;

/// Splits an input at `N - 1` separators; missing parts are empty.
fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut rest = data;
    std::array::from_fn(|i| {
        let end = match i + 1 == N {
            true => None,
            false => rest.windows(SEPARATOR.len()).position(|w| w == SEPARATOR),
        };
        match end {
            None => std::mem::take(&mut rest),
            Some(end) => {
                let part = &rest[..end];
                rest = &rest[end + SEPARATOR.len()..];
                part
            }
        }
    })
}

/// Returns the text of a part.
fn text(part: &[u8]) -> String {
    String::from_utf8_lossy(part).into_owned()
}

/// Creates a folder for one input.
fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder for temporary files")
}

fn write(folder: &TempDir, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("room for temporary files");
    path
}

/// Checks the guarantees of every error: one line without terminal control characters.
fn one_line(e: &Error) {
    let line = e.to_string();
    let is_plain = |c: char| !c.is_control() && !steers(c);
    assert!(line.chars().all(is_plain), "{line:?}");
    assert!(line.len() < 1 << 16, "an error of {} bytes", line.len());
}

/// Opens a UPG file and reads all of it.
fn read_upg(path: &Path) {
    let file = match UpgFile::open(path) {
        Ok(file) => file,
        Err(e) => return one_line(&e),
    };
    if let Err(e) = file.verify(&|_| {}) {
        one_line(&e);
    }
    for id in 0..file.layers().len() {
        match file.matrix(id) {
            Ok(matrix) => decoders::read(matrix),
            Err(e) => one_line(&e),
        }
    }
    let kept: Vec<String> = file.kept().map(|(name, ..)| name.to_owned()).collect();
    for name in &kept {
        match file.kept_matrix(name) {
            Ok(matrix) => decoders::read(&Matrix::Dense(matrix)),
            Err(e) => one_line(&e),
        }
        if let Err(e) = file.kept_vector(name) {
            one_line(&e);
        }
    }
}

/// Reads every tensor of a source and loads its texts.
fn read_source(source: &dyn Source) {
    for (index, tensor) in source.tensors().iter().enumerate() {
        if tensor.weights() > MOST_WEIGHTS {
            continue;
        }
        if let Err(e) = source.read_f32(index) {
            one_line(&e);
        }
        if let Err(e) = source.read_raw(index) {
            one_line(&e);
        }
        let rows = tensor.rows();
        if let Err(e) = source.read_rows_f32(index, rows / 2..rows) {
            one_line(&e);
        }
    }
    let files = source.files();
    if let Err(e) = files.config() {
        one_line(&e);
    }
    match files.tokenizer() {
        Ok(tokenizer) => tokenizer::use_all(&tokenizer, "Hello, world! 123\n\u{1f600} <s></s>"),
        Err(e) => one_line(&e),
    }
}

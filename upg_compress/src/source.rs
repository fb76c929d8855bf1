//! Sources of models: Hugging Face directories, GGUF files and version 1 UPG files, behind
//! one trait.
//!
//! A source returns every tensor under its name in transformers, in the order in which the model
//! uses it, together with the texts (config, tokenizer, chat template) that belong to it. The
//! weights stay in memory-mapped files and are converted to f32 a few rows at a time, so a model
//! larger than memory can be read.
#![forbid(unsafe_code)]

pub(crate) mod gguf;
mod hf;
pub(crate) mod model;
mod runnable;
pub(crate) mod synthetic;
mod v1;

pub use gguf::GgufSource;
pub use gguf::tokenizer::{GgufVocab, TokenizerFiles};
pub use hf::HfSource;
pub use model::{FloatType, RawTensor, SkippedTensor, Source, SourceDtype, TensorInfo, sort_key};
pub use runnable::check_runnable;
pub use synthetic::{PUBLISHED, SyntheticSource};
pub use upg_kernel::inference::model_dir::ModelFiles;
pub use v1::V1Source;

use std::io::Read;
use std::path::Path;
use upg_kernel::format::container::Container;
use upg_kernel::inference::model_dir::{MAX_STAND_IN, check_link, check_stand_in};
use upg_kernel::support::{folder_of, open_regular};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Opens the model at `path`: a Hugging Face directory, a GGUF file or a version 1 UPG file.
///
/// Files are recognized by their first bytes. The texts of a version 1 file come from its folder.
///
/// Reads only headers and texts. Errors: `Io`, and `Unsupported` for every other kind of file, with
/// what was found and what to pass instead; then those of [`HfSource::open`], [`GgufSource::open`]
/// and [`V1Source::open`].
pub fn open(path: impl AsRef<Path>) -> Result<Box<dyn Source>> {
    open_with(path, OpenOptions::default())
}

/// Opens like [`open`], with options.
///
/// Weights that are read instead of mapped are in memory as a whole;
/// those of version 1 are never mapped.
///
/// Errors: also those of [`MappedFile::read`](upg_kernel::MappedFile::read).
pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Box<dyn Source>> {
    let path = path.as_ref();
    let io = |e| Error::io("cannot open", path, e);
    check_link(path)?;
    if std::fs::metadata(path).map_err(io)?.is_dir() {
        return Ok(Box::new(HfSource::open_with(path, options)?));
    }
    let mut magic = Vec::new();
    let (file, _) = open_regular(path).map_err(io)?;
    let most = MAX_STAND_IN as u64 + 1;
    file.take(most).read_to_end(&mut magic).map_err(io)?;
    if magic.starts_with(b"GGUF") {
        return Ok(Box::new(GgufSource::open_with(path, options)?));
    }
    if upg_kernel::v1::is_pickle(path) {
        let folder = folder_of(path);
        return Ok(Box::new(V1Source::open(path, &[], Some(folder))?));
    }
    check_stand_in(path, &magic)?;
    Err(not_a_source(path, &magic).at(path))
}

/// Returns the error for a file that is not a source, according to its first bytes.
fn not_a_source(path: &Path, magic: &[u8]) -> Error {
    let pass_directory = "pass the directory that holds it together with config.json";
    let (found, hint) = match magic {
        [] => ("an empty file", "pass a model directory or a .gguf file"),
        [b'F', b'U', b'G', b'G', ..] => (
            "a big-endian GGUF file",
            "convert the original model again on a little-endian machine",
        ),
        [b'l' | b't' | b'f', b'm' | b'j', b'g', b'g', ..] => (
            "a GGML file from before GGUF",
            "convert the original model to GGUF, or pass its Hugging Face directory",
        ),
        [b'P', b'K', 3, 4, ..] => (
            "a PyTorch checkpoint",
            "convert it to safetensors first and pass the model's directory",
        ),
        [_, _, _, _, _, 0, 0, 0, b'{', ..] if is_upg(path) => (
            "a UPG file, which is compressed already",
            "run it as it is, or pass the original model",
        ),
        [_, _, _, _, _, 0, 0, 0, b'{', ..] => ("a single safetensors file", pass_directory),
        [b'{' | b'[', ..] => ("a JSON file", pass_directory),
        _ => (
            "a file of unknown kind",
            "pass a Hugging Face model directory or a .gguf file",
        ),
    };
    Error::new(ErrorKind::Unsupported, format!("this is {found}")).hint(hint)
}

/// Returns whether `path` is a UPG file, according to the metadata of its safetensors header.
///
/// Reads only the header, without a map.
pub fn is_upg(path: &Path) -> bool {
    has_metadata(path, ("format", "upg"))
}

/// Returns whether `path` is a safetensors file with this key and value in its metadata.
///
/// Reads only the header.
pub(crate) fn has_metadata(path: &Path, (key, value): (&str, &str)) -> bool {
    let table = || {
        let (file, metadata) = open_regular(path).ok()?;
        Container::read_from(file, metadata.len()).ok()
    };
    table().is_some_and(|table| {
        table
            .metadata()
            .get(key)
            .is_some_and(|found| found == value)
    })
}

#[cfg(test)]
mod tests;

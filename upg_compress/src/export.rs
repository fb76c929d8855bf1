//! Export of a UPG file to a Hugging Face directory.
#![forbid(unsafe_code)]

use crate::progress::Progress;
use crate::source::{FloatType, has_metadata};
use bytemuck::Pod;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use upg_kernel::format::json;
use upg_kernel::support::AtomicFile;
use upg_kernel::{Error, ErrorKind, Result, UPGDecompressor, WeightFloat};

/// Mark of the weights that this program wrote, in their safetensors metadata.
const MADE_BY: (&str, &str) = ("made_by", "upg decompress");

const WEIGHTS: &str = "model.safetensors";
/// Index of a sharded model; never written here.
const INDEX: &str = "model.safetensors.index.json";

/// Files that an export writes, or removes if the model before it had one.
const FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.json",
    INDEX,
    WEIGHTS,
];

/// Exports `model` to the folder `out`, which is created if necessary.
///
/// Writes `config.json`, tokenizer files and `model.safetensors`, with compressed matrices as
/// `dtype` and all others unchanged. transformers loads the result.
///
/// `None` is the type in `config.json`, which is that of the source, or BF16 if it names none; F32
/// is lossless. `config.json` gets `dtype`, everything else is as in the source. Every file is
/// replaced atomically, and none before all are written. Memory: the largest matrix as `dtype`.
///
/// Errors: `Io`; `Argument` if `out` has a model that [`export`] did not write, unless `replace` is
/// set, if the input file would be overwritten, or while another export writes there; `Invalid` if
/// a weight is too large for F16; `Interrupted`; and those of
/// [`UPGDecompressor::decompress_layer`].
pub fn export(
    model: &UPGDecompressor,
    out: impl AsRef<Path>,
    dtype: Option<FloatType>,
    replace: bool,
    progress: &dyn Progress,
) -> Result<()> {
    let out = out.as_ref();
    if !replace {
        refuse_foreign_model(out, model.file().path())?;
    }
    let is_new = !out.exists();
    std::fs::create_dir_all(out).map_err(|e| Error::io("cannot make the folder", out, e))?;
    let _lock = lock(out)?;
    let files = write_all(model, out, dtype, progress);
    if files.is_err() && is_new {
        // If it is no longer empty, it stays.
        let _ = std::fs::remove_dir(out);
    }
    let files = files?;
    let written: Vec<PathBuf> = files.iter().map(|f| f.path().to_path_buf()).collect();
    files.into_iter().try_for_each(AtomicFile::commit)?;
    // A chat template or tokenizer of the previous model would be taken for this one's.
    let stale = FILES.iter().map(|name| out.join(name));
    let read = model.file().path().canonicalize().ok();
    let is_stale = |path: &PathBuf| {
        !written.contains(path) && path.exists() && path.canonicalize().ok() != read
    };
    for path in stale.filter(is_stale) {
        std::fs::remove_file(&path).map_err(|e| Error::io("cannot remove", &path, e))?;
    }
    Ok(())
}

/// Locks the folder, so that no other export mixes its files with these.
///
/// Errors (`Argument`): another export holds the lock.
/// Nothing is locked where folders cannot be locked.
fn lock(out: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(out) else {
        return Ok(None);
    };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::Error(_)) => Ok(None),
        Err(TryLockError::WouldBlock) => {
            let message = "another export is writing to this folder";
            Err(Error::new(ErrorKind::Argument, message).at(out))
        }
    }
}

/// Checks that the folder holds no model that may be somebody's only copy.
///
/// Errors (`Argument`): it does.
fn refuse_foreign_model(out: &Path, read: &Path) -> Result<()> {
    let weights = out.join(WEIGHTS);
    let ours = has_metadata(&weights, MADE_BY);
    let entries = std::fs::read_dir(out).into_iter().flatten().flatten();
    let read = read.canonicalize().ok();
    let is_foreign = |path: &PathBuf| {
        if *path != weights && read.is_some() && path.canonicalize().ok() == read {
            return false;
        }
        // Files that this writes or removes are its own after an earlier export, except an index.
        if FILES.iter().any(|name| path.ends_with(name)) {
            return !ours || path.ends_with(INDEX);
        }
        let extension = path.extension().and_then(OsStr::to_str);
        ["safetensors", "bin", "pt", "pth", "gguf"]
            .map(Some)
            .contains(&extension)
    };
    match entries.map(|entry| entry.path()).filter(is_foreign).min() {
        None => Ok(()),
        Some(foreign) => Err(
            Error::new(ErrorKind::Argument, "another model is in this folder")
                .at(foreign)
                .hint("choose another folder, or replace it with --force"),
        ),
    }
}

/// Writes every file of the directory without moving it to its place; the weights last.
fn write_all(
    model: &UPGDecompressor,
    out: &Path,
    dtype: Option<FloatType>,
    progress: &dyn Progress,
) -> Result<Vec<AtomicFile>> {
    let file = model.file();
    let mut config = file.metadata("config.json").map(parsed).transpose()?;
    let dtype = dtype
        .or_else(|| named_dtype(config.as_ref()?))
        .unwrap_or(FloatType::Bf16);
    let mut texts = Vec::new();
    if let Some(config) = &mut config {
        config.insert(dtype_key(config).into(), dtype.torch_name().into());
        let text = serde_json::to_string_pretty(config).map_err(not_json)? + "\n";
        texts.push(("config.json", text.into_bytes()));
    }
    for (key, name) in [
        ("generation_config.json", "generation_config.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("special_tokens_map.json", "special_tokens_map.json"),
        ("chat_template", "chat_template.jinja"),
    ] {
        texts.extend(file.metadata(key).map(|text| (name, text.into())));
    }
    texts.extend(
        file.tokenizer_json()
            .map(|t| ("tokenizer.json", t.to_vec())),
    );
    let create = |name: &str| AtomicFile::create_from(out.join(name), [file.path()]);
    let mut files = Vec::new();
    for (name, text) in texts {
        let mut file = create(name)?;
        file.write_all(&text)
            .map_err(|e| Error::io("cannot write", file.path(), e))?;
        files.push(file);
    }
    let mut weights = create(WEIGHTS)?;
    write_weights(model, &mut weights, dtype, progress)?;
    files.push(weights);
    files.iter_mut().try_for_each(AtomicFile::sync)?;
    Ok(files)
}

fn parsed(config: &str) -> Result<Map<String, Value>> {
    match json::value("config.json", config)? {
        Value::Object(config) => Ok(config),
        _ => Err(Error::new(
            ErrorKind::Malformed,
            "config.json: not a JSON object",
        )),
    }
}

fn not_json(e: serde_json::Error) -> Error {
    Error::new(ErrorKind::Malformed, format!("config.json: {e}")).with_source(e)
}

/// Returns the key of the data type.
///
/// Newer versions of transformers write `dtype`; all of them read the older name.
fn dtype_key(config: &Map<String, Value>) -> &'static str {
    match config.contains_key("dtype") {
        true => "dtype",
        false => "torch_dtype",
    }
}

fn named_dtype(config: &Map<String, Value>) -> Option<FloatType> {
    let name = config.get(dtype_key(config))?.as_str()?;
    [FloatType::Bf16, FloatType::F16, FloatType::F32]
        .into_iter()
        .find(|dtype| dtype.torch_name() == name)
}

/// Writes the layers, then the uncompressed tensors, as one safetensors file.
fn write_weights(
    model: &UPGDecompressor,
    out: &mut AtomicFile,
    dtype: FloatType,
    progress: &dyn Progress,
) -> Result<()> {
    let file = model.file();
    let path = out.path().to_path_buf();
    let io = |e| Error::io("cannot write", &path, e);
    out.write_all(&header(model, dtype)?).map_err(io)?;
    progress.start(file.layers().iter().map(|l| (l.rows * l.cols) as u64).sum());
    for (id, layer) in file.layers().iter().enumerate() {
        progress.check_interrupt()?;
        progress.tensor(&layer.name);
        match dtype {
            FloatType::Bf16 => write_layer::<bf16>(model, id, dtype, out),
            FloatType::F16 => write_layer::<f16>(model, id, dtype, out),
            FloatType::F32 => write_layer::<f32>(model, id, dtype, out),
        }?;
        progress.advance((layer.rows * layer.cols) as u64);
    }
    for (name, ..) in file.kept() {
        out.write_all(file.bytes(name).unwrap_or_default())
            .map_err(io)?;
    }
    Ok(())
}

fn write_layer<T: WeightFloat + Pod>(
    model: &UPGDecompressor,
    id: usize,
    dtype: FloatType,
    out: &mut AtomicFile,
) -> Result<()> {
    let layer = &model.file().layers()[id];
    let len = layer.rows * layer.cols;
    let mut weights = Vec::new();
    weights.try_reserve_exact(len).map_err(|e| {
        let message = format!("no memory for {len} weights: {e}");
        Error::new(ErrorKind::TooLarge, message).tensor(&layer.name)
    })?;
    weights.resize(len, T::zeroed());
    model.decompress_layer_into(id, &mut weights)?;
    if weights
        .par_iter()
        .any(|&w| !Into::<f32>::into(w).is_finite())
    {
        let message = format!("a weight does not fit into {dtype}");
        return Err(Error::new(ErrorKind::Invalid, message)
            .tensor(&layer.name)
            .hint("write it as bf16 or f32"));
    }
    out.write_all(bytemuck::cast_slice(&weights))
        .map_err(|e| Error::io("cannot write", out.path(), e))
}

/// Returns the safetensors header with its length before it, for the order of writing.
fn header(model: &UPGDecompressor, dtype: FloatType) -> Result<Vec<u8>> {
    let file = model.file();
    let layers = file
        .layers()
        .iter()
        .map(|l| (l.name.clone(), dtype.into(), vec![l.rows, l.cols]));
    let kept = file
        .kept()
        .map(|(name, dtype, shape)| (name.to_owned(), dtype, shape.to_vec()));
    let mut end = 0;
    let tensors: Vec<(String, TensorInfo)> = layers
        .chain(kept)
        .map(|(name, dtype, shape): (String, Dtype, Vec<usize>)| {
            let begin = end;
            end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            let info = TensorInfo {
                dtype,
                shape,
                data_offsets: (begin, end),
            };
            (name, info)
        })
        .collect();
    let metadata = [("format", "pt"), MADE_BY];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let metadata = HashMap::from(metadata);
    let table = Metadata::new(Some(metadata), tensors)
        .map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()).with_source(e))?;
    let malformed =
        |e: serde_json::Error| Error::new(ErrorKind::Invalid, e.to_string()).with_source(e);
    let mut header = serde_json::to_value(&table).map_err(malformed)?;
    // The metadata are a `HashMap`, in arbitrary order.
    header.sort_all_objects();
    let mut json = serde_json::to_vec(&header).map_err(malformed)?;
    // Pads with spaces, so that the data starts at a multiple of 8.
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_takes_one_export_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        let error = lock(folder.path()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Argument, "{error}");
        drop(first);
        lock(folder.path()).unwrap();
    }
}

//! Back from a UPG file to a Hugging Face directory.
#![forbid(unsafe_code)]

use crate::compress::Progress;
use crate::source::{FloatType, refuse_overwriting};
use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use upg_kernel::{Error, ErrorKind, Result, UPGDecompressor, WeightFloat, WholeFile};

/// Writes `model` into the folder `out` (made if need be): `config.json`, tokenizer files and
/// `model.safetensors`, with compressed matrices as `dtype` and all others as they are.
///
/// transformers loads the result. `None` is the type that `config.json` names, which is that of the
/// source, or BF16 if it names none; F32 loses nothing. Every file appears whole or not at all; the
/// weights come last. `config.json` gets `dtype`, everything else is as the source had it. Memory: the
/// largest matrix as `dtype`. Errors: `Io`; `Argument` if the weights would take the place of the file that they come
/// from; `Interrupted`; and those of [`UPGDecompressor::decompress_layer`].
pub fn export(
    model: &UPGDecompressor,
    out: impl AsRef<Path>,
    dtype: Option<FloatType>,
    progress: &dyn Progress,
) -> Result<()> {
    let out = out.as_ref();
    let file = model.file();
    let mut config = file.metadata("config.json").map(parsed).transpose()?;
    let dtype = dtype
        .or_else(|| named_dtype(config.as_ref()?))
        .unwrap_or(FloatType::Bf16);
    let weights = out.join("model.safetensors");
    refuse_overwriting(&weights, [file.path()])?;
    std::fs::create_dir_all(out).map_err(|e| Error::io("cannot make the folder", out, e))?;
    if let Some(config) = &mut config {
        config.insert(dtype_key(config).into(), dtype.torch_name().into());
        let text = serde_json::to_string_pretty(config).map_err(not_json)? + "\n";
        write(&out.join("config.json"), text.as_bytes())?;
    }
    for (key, name) in [
        ("generation_config.json", "generation_config.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("special_tokens_map.json", "special_tokens_map.json"),
        ("chat_template", "chat_template.jinja"),
    ] {
        if let Some(text) = file.metadata(key) {
            write(&out.join(name), text.as_bytes())?;
        }
    }
    if let Some(json) = file.tokenizer_json() {
        write(&out.join("tokenizer.json"), json)?;
    }
    write_weights(model, &weights, dtype, progress)
}

/// A small file, whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = WholeFile::create(path)?;
    file.write_all(bytes)
        .map_err(|e| Error::io("cannot write", path, e))?;
    file.commit()
}

fn parsed(config: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(config).map_err(not_json)
}

fn not_json(e: serde_json::Error) -> Error {
    Error::new(ErrorKind::Malformed, format!("config.json: {e}")).with_source(e)
}

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

/// The layers, then the tensors that were kept, as one safetensors file.
fn write_weights(
    model: &UPGDecompressor,
    path: &Path,
    dtype: FloatType,
    progress: &dyn Progress,
) -> Result<()> {
    let file = model.file();
    let io = |e| Error::io("cannot write", path, e);
    let mut out = WholeFile::create(path)?;
    out.write_all(&header(model, dtype)?).map_err(io)?;
    progress.start(file.layers().iter().map(|l| (l.rows * l.cols) as u64).sum());
    for (id, layer) in file.layers().iter().enumerate() {
        progress.proceed()?;
        progress.tensor(&layer.name);
        match dtype {
            FloatType::Bf16 => write_layer::<bf16>(model, id, &mut out),
            FloatType::F16 => write_layer::<f16>(model, id, &mut out),
            FloatType::F32 => write_layer::<f32>(model, id, &mut out),
        }?;
        progress.advance((layer.rows * layer.cols) as u64);
    }
    for (name, ..) in file.kept() {
        out.write_all(file.bytes(name).unwrap_or_default())
            .map_err(io)?;
    }
    out.commit()
}

fn write_layer<T: WeightFloat + Pod>(
    model: &UPGDecompressor,
    id: usize,
    out: &mut WholeFile,
) -> Result<()> {
    let layer = &model.file().layers()[id];
    let mut weights = vec![T::zeroed(); layer.rows * layer.cols];
    model.decompress_layer_into(id, &mut weights)?;
    out.write_all(bytemuck::cast_slice(&weights))
        .map_err(|e| Error::io("cannot write", out.path(), e))
}

/// The safetensors header, its length before it, for the order in which the tensors are written.
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
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let table = Metadata::new(Some(metadata), tensors)
        .map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()).with_source(e))?;
    let mut json = serde_json::to_vec(&table)
        .map_err(|e| Error::new(ErrorKind::Invalid, e.to_string()).with_source(e))?;
    // Spaces, so that the data starts at a multiple of 8.
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

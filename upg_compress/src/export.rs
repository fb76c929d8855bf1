//! Back from a UPG file to a Hugging Face directory.
#![forbid(unsafe_code)]

use crate::compress::Progress;
use crate::source::{FloatType, refuse_overwriting};
use bytemuck::Pod;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use upg_kernel::{Error, ErrorKind, Result, UPGDecompressor, WeightFloat, WholeFile};

/// Writes `model` into the folder `out` (made if need be): `config.json`, tokenizer files and
/// `model.safetensors`, with compressed matrices as `dtype` and all others as they are.
///
/// transformers loads the result. Every file appears whole or not at all; the weights come last.
/// `config.json` gets `dtype`, everything else is as the source had it. Memory: two copies of the
/// largest matrix. Errors: `Io`; `Argument` if the weights would take the place of the file that they
/// come from; `Interrupted`; and those of [`UPGDecompressor::decompress_layer`].
pub fn export(
    model: &UPGDecompressor,
    out: impl AsRef<Path>,
    dtype: FloatType,
    progress: &dyn Progress,
) -> Result<()> {
    let out = out.as_ref();
    std::fs::create_dir_all(out).map_err(|e| Error::io("cannot make the folder", out, e))?;
    let file = model.file();
    let weights = out.join("model.safetensors");
    refuse_overwriting(&weights, [file.path()])?;
    if let Some(config) = file.metadata("config.json") {
        write(&out.join("config.json"), &with_dtype(config, dtype)?)?;
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

    let mut tensors = Vec::new();
    for (id, layer) in file.layers().iter().enumerate() {
        // Every check of the file happens here, so that writing below cannot meet a bad layer.
        file.matrix(id)?;
        let content = Content::Layer {
            model,
            id,
            progress,
        };
        tensors.push((
            layer.name.clone(),
            Exported {
                dtype: dtype.into(),
                shape: vec![layer.rows, layer.cols],
                content,
            },
        ));
    }
    for (name, dtype, shape) in file.kept() {
        let bytes = file.bytes(name).unwrap_or_default();
        let shape = shape.to_vec();
        tensors.push((
            name.to_owned(),
            Exported {
                dtype,
                shape,
                content: Content::Kept(bytes),
            },
        ));
    }
    progress.start(file.layers().iter().map(|l| (l.rows * l.cols) as u64).sum());
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let weights = WholeFile::create(weights)?;
    safetensors::serialize_to_file(tensors, Some(metadata), weights.temporary_path()).map_err(
        |e| {
            Error::new(ErrorKind::Io, format!("cannot write: {e}"))
                .at(weights.path())
                .with_source(e)
        },
    )?;
    if progress.is_cancelled() {
        return Err(Error::new(ErrorKind::Interrupted, "stopped before the end"));
    }
    weights.commit()
}

/// The text of `config.json` with the type that the exported matrices have.
fn with_dtype(config: &str, dtype: FloatType) -> Result<Vec<u8>> {
    let malformed = |e: serde_json::Error| {
        Error::new(ErrorKind::Malformed, format!("config.json: {e}")).with_source(e)
    };
    let mut config: serde_json::Map<_, _> = serde_json::from_str(config).map_err(malformed)?;
    // Newer versions of transformers write `dtype`; all of them read the older name.
    let key = match config.contains_key("dtype") {
        true => "dtype",
        false => "torch_dtype",
    };
    config.insert(key.into(), dtype.torch_name().into());
    let mut text = serde_json::to_vec_pretty(&config).map_err(malformed)?;
    text.push(b'\n');
    Ok(text)
}

/// A small file, whole or not at all.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = WholeFile::create(path)?;
    file.write_all(bytes)
        .map_err(|e| Error::io("cannot write", path, e))?;
    file.commit()
}

/// A tensor of the directory, decoded only when it is written.
struct Exported<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    Layer {
        model: &'a UPGDecompressor,
        id: usize,
        progress: &'a dyn Progress,
    },
    Kept(&'a [u8]),
}

impl View for Exported<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.content {
            Content::Kept(bytes) => bytes.into(),
            Content::Layer {
                model,
                id,
                progress,
            } => {
                if progress.is_cancelled() {
                    // Nothing can be returned here; `export` sees it and drops the file.
                    return Cow::Borrowed(&[]);
                }
                let len = self.shape.iter().product();
                let bytes = match self.dtype {
                    Dtype::F32 => decoded::<f32>(model, id, len),
                    Dtype::F16 => decoded::<f16>(model, id, len),
                    _ => decoded::<bf16>(model, id, len),
                };
                progress.advance(len as u64);
                bytes.into()
            }
        }
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

fn decoded<T: WeightFloat + Pod>(model: &UPGDecompressor, id: usize, len: usize) -> Vec<u8> {
    let mut weights = vec![T::zeroed(); len];
    model
        .decompress_layer_into(id, &mut weights)
        .expect("the layer was checked and the buffer has its size");
    bytemuck::cast_slice(&weights).to_vec()
}

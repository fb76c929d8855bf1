//! Models as GGUF files of llama.cpp.
//!
//! Names, row order, config and tokenizer are restored to their form in transformers. The header is
//! read by `gguf/header.rs`, which explains why; candle decodes the blocks of quantized types.
#![forbid(unsafe_code)]

mod config;
pub(super) mod dims;
pub(super) mod families;
mod header;
mod metadata;
mod parts;
mod rope;
pub(crate) mod tokenizer;
mod types;

use super::model::{
    FloatType, RawTensor, SkippedTensor, Source, TensorInfo, check_rows, fill_rows, sort_key,
    tensor_at,
};
use dims::{Dims, FromTensors};
use families::{ExpectedTensor, Family, RowOrder};
use metadata::Metadata;
use parts::{Opened, Parts, Stored};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizer::GgufVocab;
use types::GgmlType;
use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::support::PartName;
use upg_kernel::{Error, ErrorKind, OpenOptions, Result};

/// Model in one GGUF file, or in the parts of a split one.
///
/// The files are mapped, not read, unless options say otherwise.
#[derive(Debug)]
pub struct GgufSource {
    parts: Parts,
    name: String,
    files: ModelFiles,
    vocab: GgufVocab,
    tensors: Vec<TensorInfo>,
    places: Vec<Place>,
    skipped: Vec<SkippedTensor>,
}

/// Location of a tensor in a part of the file. Checked:
/// `bytes` are inside it and hold the tensor's blocks.
#[derive(Debug, Clone)]
struct Place {
    kind: GgmlType,
    order: RowOrder,
    part: usize,
    bytes: Range<usize>,
}

/// Tensors that carry no weights, but settings that the config expresses in another way.
const ROPE_FREQS: &str = "rope_freqs.weight";
const ROPE_SHORT: &str = "rope_factors_short.weight";
const ROPE_LONG: &str = "rope_factors_long.weight";

impl GgufSource {
    /// Opens a GGUF file: checks its header and rebuilds names, config and texts.
    ///
    /// For any part of a split file, such as `NAME-00001-of-00003.gguf`, all parts are opened.
    ///
    /// Cost: one walk over the metadata; no weights are read. Errors: `Malformed`, `Unsupported`
    /// (architecture, tensor type, features that the families do not have), `Missing` (keys,
    /// tensors, parts), `Shape`, `Invalid`, `TooLarge`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// Runs [`GgufSource::open`] with options. Errors: also those of
    /// [`MappedFile::read`](upg_kernel::MappedFile::read).
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let opened = Opened::open(path, options)?;
        Self::from_parts(path, opened).map_err(|e| e.at(path))
    }

    /// Checks what was opened by the name `path`.
    fn from_parts(path: &Path, opened: Opened) -> Result<Self> {
        let Opened {
            parts,
            header,
            tensors,
        } = opened;
        // A copy: texts of a mapped file may change while they are read.
        let texts = parts.bytes(0).get(..header.end).unwrap_or_default();
        let texts = texts.to_vec();
        let metadata = Metadata {
            header: &header,
            file: &texts,
        };
        let mut stored: BTreeMap<&str, &Stored> =
            tensors.iter().map(|t| (t.entry.name.as_str(), t)).collect();
        let embeddings = stored.get("token_embd.weight");
        let vocab_rows = embeddings.and_then(|t| t.entry.shape.first().copied());
        let vocab_rows = vocab_rows.unwrap_or(0);
        // The kind of file is checked before its tensors: a projector has no embeddings either.
        let (family, dims) = config::read_dims(&metadata, vocab_rows)?;
        let tokens = metadata.token_count()?;
        if tokens != 0 && tokens != vocab_rows {
            let message = format!("{vocab_rows} rows for {tokens} tokens");
            return Err(Error::new(ErrorKind::Shape, message).tensor("token_embd.weight"));
        }
        let vocab = metadata::read_vocab(&metadata)?;
        let mut facts = FromTensors::default();
        let skipped = take_rope_tensors(&parts, &mut stored, &mut facts)?;
        let found = match_tensors(family, &dims, &mut stored, &mut facts)?;
        facts.torch_dtype = torch_dtype(&found);
        let (tokenizer, ends) = tokenizer_files(&vocab)?;
        let generation = config::generation_config_json(&metadata, dims.vocab, &ends)?;
        let files = ModelFiles {
            config_json: Some(config::config_json(&metadata, family, &dims, &facts)?),
            generation_config_json: Some(generation),
            chat_template: vocab.chat_template.clone(),
            ..tokenizer
        };
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        let stem = PartName::of(&stem).map_or(&*stem, |part| part.name);
        let name = metadata
            .text("general.name")?
            .filter(|n| !n.trim().is_empty());
        let name = name.unwrap_or_else(|| stem.to_owned());
        let (tensors, places) = found.into_iter().unzip();
        Ok(Self {
            name,
            files,
            vocab,
            tensors,
            places,
            skipped,
            parts,
        })
    }

    /// Returns the tokenizer data of the file.
    pub fn vocab(&self) -> &GgufVocab {
        &self.vocab
    }

    fn place(&self, index: usize) -> Result<(&TensorInfo, &Place, &[u8])> {
        let tensor = tensor_at(&self.tensors, index)?;
        self.places
            .get(index)
            .and_then(|place| {
                let bytes = self.parts.bytes(place.part);
                Some((tensor, place, bytes.get(place.bytes.clone())?))
            })
            .ok_or_else(|| {
                Error::new(ErrorKind::Malformed, "outside the file").tensor(&tensor.name)
            })
    }
}

impl Source for GgufSource {
    fn model_name(&self) -> &str {
        &self.name
    }

    fn files(&self) -> &ModelFiles {
        &self.files
    }

    fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    fn skipped(&self) -> &[SkippedTensor] {
        &self.skipped
    }

    fn own_files(&self) -> Vec<PathBuf> {
        self.parts.paths().map(Path::to_path_buf).collect()
    }

    fn read_rows_f32(&self, index: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let (tensor, place, bytes) = self.place(index)?;
        check_rows(tensor, &rows)?;
        let cols = tensor.cols();
        // Rows that are in order are decoded many at a time.
        let max_rows = if place.order == RowOrder::Same {
            usize::MAX
        } else {
            1
        };
        fill_rows(rows, cols, max_rows, |first, out| {
            let start = place.kind.bytes_of(place.order.stored_row(first) * cols);
            let end = start + place.kind.bytes_of(out.len());
            place
                .kind
                .to_f32(bytes.get(start..end).unwrap_or_default(), out)
        })
        .map_err(|e| e.tensor(&tensor.name))
    }

    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>> {
        let (tensor, place, bytes) = self.place(index)?;
        let GgmlType::Float(dtype) = place.kind else {
            return Ok(RawTensor::of_f32(&self.read_f32(index)?));
        };
        if place.order == RowOrder::Same {
            return Ok(RawTensor {
                dtype,
                bytes: Cow::Borrowed(bytes),
            });
        }
        let row_bytes = tensor.cols() * dtype.size();
        let mut ordered = Vec::with_capacity(bytes.len());
        for row in 0..tensor.rows() {
            let start = place.order.stored_row(row) * row_bytes;
            ordered.extend_from_slice(bytes.get(start..start + row_bytes).unwrap_or_default());
        }
        Ok(RawTensor {
            dtype,
            bytes: Cow::Owned(ordered),
        })
    }
}

/// Builds the tokenizer files from the vocabulary; also returns the ids that end an answer.
///
/// Both are empty if the file has no vocabulary.
fn tokenizer_files(vocab: &GgufVocab) -> Result<(ModelFiles, Vec<u32>)> {
    if vocab.model.is_empty() && vocab.tokens.is_empty() {
        return Ok((ModelFiles::default(), Vec::new()));
    }
    let files = vocab.to_tokenizer_files()?;
    let texts = ModelFiles {
        tokenizer_json: Some(files.tokenizer_json),
        tokenizer_config_json: Some(files.tokenizer_config_json),
        ..ModelFiles::default()
    };
    Ok((texts, files.special.eos))
}

/// Moves the rotary factors from `stored` to `facts`.
fn take_rope_tensors(
    parts: &Parts,
    stored: &mut BTreeMap<&str, &Stored>,
    facts: &mut FromTensors,
) -> Result<Vec<SkippedTensor>> {
    let mut skipped = Vec::new();
    let mut take = |name: &str| -> Result<Option<Vec<f32>>> {
        let Some(Stored { part, entry }) = stored.remove(name) else {
            return Ok(None);
        };
        skipped.push(SkippedTensor {
            name: name.to_owned(),
            reason: "now rope_scaling in the config",
        });
        // No head is longer than this; the factors go into the config as text.
        if entry.shape.len() != 1 || entry.shape.iter().any(|n| *n > 1 << 12) {
            return Err(Error::new(
                ErrorKind::Shape,
                format!("shape {:?}, expected one short list", entry.shape),
            )
            .tensor(name));
        }
        let mut values = vec![0f32; entry.shape.iter().product()];
        let bytes = parts.bytes(*part).get(entry.bytes.clone());
        let bytes = bytes.unwrap_or_default();
        entry
            .kind
            .to_f32(bytes, &mut values)
            .map_err(|e| e.tensor(name))?;
        Ok(Some(values))
    };
    facts.rope_freqs = take(ROPE_FREQS)?;
    facts.rope_factors = match (take(ROPE_SHORT)?, take(ROPE_LONG)?) {
        (Some(short), Some(long)) => Some((short, long)),
        (None, None) => None,
        (None, _) => return Err(missing(ROPE_SHORT)),
        (_, None) => return Err(missing(ROPE_LONG)),
    };
    Ok(skipped)
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::Missing, "not in the file").tensor(name)
}

/// Finds every tensor of the family in `stored`, in model order,
/// and the config fields that follow.
///
/// Errors: `Missing`, `Shape`, `Unsupported` (a tensor that the family does not have would change
/// the computation; biases in only some places).
fn match_tensors(
    family: &Family,
    dims: &Dims,
    stored: &mut BTreeMap<&str, &Stored>,
    facts: &mut FromTensors,
) -> Result<Vec<(TensorInfo, Place)>> {
    let mut found = Vec::new();
    // Number of optional biases found and possible, of the attention and of the feed-forward part.
    let mut biases = [(0usize, 0usize); 2];
    facts.tied = !stored.contains_key("output.weight");
    for expected in family.expected(dims) {
        let found_here = stored.remove(expected.gguf.as_str());
        if !expected.required && expected.gguf.ends_with(".bias") {
            let part = &mut biases[usize::from(expected.hf.contains(".mlp."))];
            *part = (part.0 + usize::from(found_here.is_some()), part.1 + 1);
        }
        match found_here {
            Some(stored) => found.push(matched(expected, stored)?),
            None if expected.required => return Err(missing(&expected.gguf)),
            None => {}
        }
    }
    if let Some(name) = stored.keys().next() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "not a tensor of {} with {} layers",
                family.class, dims.layers
            ),
        )
        .tensor(*name));
    }
    let keys = [family.keys.attention_bias, family.keys.mlp_bias];
    for ((seen, possible), has_key) in biases.into_iter().zip(keys) {
        // All of a part or none, and none that the config would not tell of.
        if seen != 0 && (seen != possible || !has_key) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{seen} of {possible} biases, which no {} has", family.class),
            ));
        }
    }
    facts.attention_bias = biases[0].0 > 0;
    facts.mlp_bias = biases[1].0 > 0;
    found.sort_by(|a, b| sort_key(&a.0.name).cmp(&sort_key(&b.0.name)));
    Ok(found)
}

/// Matches a tensor of the file with the expected tensor of the model.
fn matched(expected: ExpectedTensor, stored: &Stored) -> Result<(TensorInfo, Place)> {
    let entry = &stored.entry;
    if entry.shape != expected.shape {
        return Err(Error::new(
            ErrorKind::Shape,
            format!("shape {:?}, expected {:?}", entry.shape, expected.shape),
        )
        .tensor(&entry.name));
    }
    // Vectors are read value by value, which blocks do not allow; llama.cpp never quantizes them.
    if entry.shape.len() == 1 && entry.kind.block_values() != 1 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("a vector of type {}", entry.kind.name()),
        )
        .tensor(&entry.name));
    }
    let info = TensorInfo {
        name: expected.hf,
        shape: expected.shape,
        dtype: entry.kind.source_dtype(),
    };
    let place = Place {
        kind: entry.kind,
        order: expected.order,
        part: stored.part,
        bytes: entry.bytes.clone(),
    };
    Ok((info, place))
}

/// Returns `torch_dtype`.
///
/// It is the type of the matrices if they all have the same plain type, else F32, which holds
/// dequantized values exactly.
fn torch_dtype(found: &[(TensorInfo, Place)]) -> &'static str {
    let mut matrices = found.iter().filter(|(info, _)| info.shape.len() > 1);
    let first = matrices.next().map(|(_, place)| place.kind);
    match first {
        Some(GgmlType::Float(dtype)) if matrices.all(|(_, p)| p.kind == GgmlType::Float(dtype)) => {
            dtype.torch_name()
        }
        _ => FloatType::F32.torch_name(),
    }
}

#[cfg(test)]
mod tests;

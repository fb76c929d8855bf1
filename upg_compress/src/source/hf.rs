//! Models as Hugging Face directories: `config.json`,
//! tokenizer files and safetensors weights.
#![forbid(unsafe_code)]

mod compressed_tensors;
mod directory;
mod names;
mod stored;
mod text_part;

use super::model::{
    FloatType, RawTensor, SkippedTensor, Source, SourceDtype, TensorInfo, check_rows, fill_rows,
    sort_key, tensor_at,
};
use compressed_tensors::{Compression, Gathered, Storage, without_compression};
use directory::{INDEX, Index, SINGLE, model_name, no_config, read_index};
use names::named;
use safetensors::Dtype;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use stored::{Stored, Tensors};
use text_part::text_part;
use upg_kernel::format::container::Container;
use upg_kernel::inference::model_dir::{
    MAX_STAND_IN, ModelFiles, TEXTS, check_link, check_stand_in, parse_object,
};
use upg_kernel::inference::weights::{EMBEDDING, HEAD};
use upg_kernel::{Error, ErrorKind, MappedFile, OpenOptions, Result};

/// Hugging Face model directory. Its weight files are mapped, not read,
/// unless options say otherwise.
#[derive(Debug)]
pub struct HfSource {
    dir: PathBuf,
    name: String,
    files: ModelFiles,
    shards: Vec<MappedFile>,
    tensors: Vec<TensorInfo>,
    storage: Vec<Storage>,
    skipped: Vec<SkippedTensor>,
}

impl HfSource {
    /// Opens a directory: reads the texts, maps the shards and checks their headers.
    ///
    /// Errors: `Missing` (no config, no weights, a missing shard or indexed tensor), `Malformed`
    /// (JSON or safetensors headers, shard names with a path in them), `Unsupported` (quantized
    /// checkpoints other than the supported formats of `compressed-tensors`, pickled weights,
    /// dtypes other than BF16, F16, F32), `TooLarge`; `Shape` and `Invalid` for compressed weights
    /// with inconsistent parts.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(dir, OpenOptions::default())
    }

    /// Runs [`HfSource::open`] with options. Errors: also those of [`MappedFile::read`].
    pub fn open_with(dir: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let dir = dir.as_ref();
        let mut files = ModelFiles::read(dir)?;
        let Some(config_json) = &files.config_json else {
            return Err(no_config(dir));
        };
        let config_path = dir.join("config.json");
        let mut config = parse_object(config_json, &config_path)?;
        let text_part = text_part(&config).map_err(|e| e.at(&config_path))?;
        let is_multimodal = text_part.is_some();
        if let Some(text_part) = text_part {
            files.config_json = Some(format!("{text_part:#}\n"));
            config = text_part;
        }
        let compression = Compression::of(&config).map_err(|e| e.at(&config_path))?;
        if compression.is_some() {
            files.config_json = Some(without_compression(&config));
        }
        let mut source = Self {
            dir: dir.to_path_buf(),
            name: model_name(dir),
            files,
            shards: Vec::new(),
            tensors: Vec::new(),
            storage: Vec::new(),
            skipped: Vec::new(),
        };
        let tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let stored = source.map_shards(dir, options, tied)?;
        let found = named(stored, is_multimodal).map_err(|e| e.at(dir))?;
        if let Some(prefix) = &found.prefix {
            let prefix = prefix.escape_debug();
            log::warn!("the tensors of this model are under '{prefix}', which becomes 'model.'");
        }
        source.skipped.extend(found.skipped);
        let mut stored = found.tensors;
        if tied {
            source.skip_tied_head(&mut stored, dir)?;
        }
        let gathered = match compression {
            Some(compression) => {
                let gathered = compression.gather(&mut stored, &|stored| source.bytes(stored));
                gathered.map_err(|e| e.at(dir))?
            }
            None => Vec::new(),
        };
        source.list(stored, gathered)?;
        Ok(source)
    }

    /// Maps every weight file and collects its tensors by name.
    fn map_shards(&mut self, dir: &Path, options: OpenOptions, tied: bool) -> Result<Tensors> {
        let Some(index) = read_index(dir)? else {
            return self.map_shard(&dir.join(SINGLE), options);
        };
        let mut all = BTreeMap::new();
        for (shard, number) in &index.shards {
            let path = dir.join(shard);
            let is_missing = std::fs::symlink_metadata(&path).is_err();
            if tied && is_missing && index.names(*number).all(is_head) {
                continue;
            }
            for (name, stored) in self.map_shard(&path, options)? {
                if index.tensors.get(&name) == Some(number) {
                    all.insert(name, stored);
                } else {
                    self.skip(name, "not in the index of this shard");
                }
            }
        }
        self.check_listed(dir, &index, &all, tied)?;
        Ok(all)
    }

    /// Checks that all tensors of the index are there. A `tied` head may be missing.
    fn check_listed(&mut self, dir: &Path, index: &Index, all: &Tensors, tied: bool) -> Result<()> {
        for (name, &shard) in &index.tensors {
            if all.contains_key(name) {
                continue;
            }
            if tied && is_head(name) {
                let reason = "tied to the embeddings; the index lists it, but no file has it";
                self.skip(name.clone(), reason);
                continue;
            }
            return Err(Error::new(
                ErrorKind::Missing,
                format!("the index places it in this shard, which does not have it (see {INDEX})"),
            )
            .at(dir.join(index.shard(shard)))
            .tensor(name)
            .hint("download the model again"));
        }
        Ok(())
    }

    /// Opens one weight file; [`Container`] checks that offsets,
    /// shapes and length are consistent.
    fn map_shard(&mut self, path: &Path, options: OpenOptions) -> Result<Tensors> {
        let map = match MappedFile::open_with(path, options) {
            Err(_) if !path.exists() => {
                check_link(path)?;
                return Err(
                    Error::new(ErrorKind::Missing, "this weight file is missing")
                        .at(path)
                        .hint("download the rest of the model"),
                );
            }
            opened => opened?,
        };
        let table = Container::read(&map).map_err(|e| {
            // A copy: a mapped file may change while it is looked at.
            let start = map
                .get(..map.len().min(MAX_STAND_IN + 1))
                .map(<[u8]>::to_vec);
            let stand_in = check_stand_in(path, &start.unwrap_or_default()).err();
            stand_in.unwrap_or_else(|| {
                e.at(path)
                    .hint("download it again: the download may be unfinished")
            })
        })?;
        let mut found = BTreeMap::new();
        for tensor in table.iter() {
            let stored = Stored {
                shard: self.shards.len(),
                dtype: tensor.dtype,
                shape: tensor.shape.to_vec(),
                bytes: tensor.range,
            };
            found.insert(tensor.name.to_owned(), stored);
        }
        self.shards.push(map);
        Ok(found)
    }

    fn skip(&mut self, name: String, reason: &'static str) {
        self.skipped.push(SkippedTensor { name, reason });
    }

    /// Removes a stored head that equals the embeddings to which the config ties it.
    fn skip_tied_head(&mut self, stored: &mut Tensors, dir: &Path) -> Result<()> {
        let (Some(embeddings), Some(head)) = (stored.get(EMBEDDING), stored.get(HEAD)) else {
            return Ok(());
        };
        let bytes = |s: &Stored| self.shards.get(s.shard)?.get(s.bytes.clone());
        if head.dtype != embeddings.dtype
            || head.shape != embeddings.shape
            || bytes(head) != bytes(embeddings)
        {
            let message = "differs from the embeddings, though config.json ties the two";
            return Err(Error::new(ErrorKind::Invalid, message)
                .at(dir)
                .tensor(HEAD)
                .hint("set tie_word_embeddings to false in config.json if it was trained"));
        }
        stored.remove(HEAD);
        self.skip(HEAD.to_owned(), "equal to the embeddings it is tied to");
        Ok(())
    }

    /// Builds the ordered list of tensors from the plain ones left and the gathered ones.
    fn list(&mut self, stored: Tensors, gathered: Vec<Gathered>) -> Result<()> {
        let mut listed = gathered;
        for (name, stored) in stored {
            let dtype = match stored.dtype {
                Dtype::BF16 => FloatType::Bf16,
                Dtype::F16 => FloatType::F16,
                Dtype::F32 => FloatType::F32,
                other => {
                    let path = self.shards.get(stored.shard).map(MappedFile::path);
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("dtype {other:?}, expected BF16, F16 or F32"),
                    )
                    .at(path.unwrap_or(Path::new("")))
                    .tensor(name)
                    .hint("pass the original, unquantized model"));
                }
            };
            if stored.shape.contains(&0) {
                return Err(Error::new(
                    ErrorKind::Shape,
                    format!("shape {:?} has no weights", stored.shape),
                )
                .tensor(name));
            }
            listed.push(Gathered {
                name,
                shape: stored.shape.clone(),
                storage: Storage::Plain(dtype, stored),
            });
        }
        listed.sort_by(|a, b| sort_key(&a.name).cmp(&sort_key(&b.name)));
        for Gathered {
            name,
            shape,
            storage,
        } in listed
        {
            let dtype = match &storage {
                Storage::Plain(float, _) => SourceDtype::Float(*float),
                Storage::Bitmask(bitmask) => SourceDtype::Float(bitmask.float),
                Storage::Packed(_) => SourceDtype::Quantized("pack-quantized"),
            };
            self.tensors.push(TensorInfo { name, shape, dtype });
            self.storage.push(storage);
        }
        Ok(())
    }

    /// Returns the mapped bytes of a stored tensor.
    fn bytes(&self, stored: &Stored) -> Result<&[u8]> {
        let shard = self.shards.get(stored.shard);
        let bytes = shard.and_then(|shard| shard.get(stored.bytes.clone()));
        bytes.ok_or_else(|| Error::new(ErrorKind::Malformed, "outside its file"))
    }

    fn read_rows(
        &self,
        tensor: &TensorInfo,
        storage: &Storage,
        rows: Range<usize>,
    ) -> Result<Vec<f32>> {
        let cols = tensor.cols();
        match storage {
            Storage::Plain(float, stored) => {
                let bytes = self.bytes(stored)?;
                fill_rows(rows, cols, usize::MAX, |first, out| {
                    let start = first * cols * float.size();
                    let end = start + out.len() * float.size();
                    float.to_f32(bytes.get(start..end).unwrap_or_default(), out)
                })
            }
            Storage::Bitmask(bitmask) if tensor.shape.len() == 1 => {
                let (size, mut out) = (bitmask.float.size(), vec![0.0; rows.len()]);
                let bytes = bitmask.dense(&|stored| self.bytes(stored))?;
                let of_rows = bytes.get(rows.start * size..rows.end * size);
                bitmask
                    .float
                    .to_f32(of_rows.unwrap_or_default(), &mut out)?;
                Ok(out)
            }
            Storage::Bitmask(bitmask) => {
                let stored = bitmask.rows(&|stored| self.bytes(stored))?;
                fill_rows(rows, cols, 1, |row, out| {
                    let mut bytes = vec![0; cols * bitmask.float.size()];
                    stored.read(row, &mut bytes)?;
                    bitmask.float.to_f32(&bytes, out)
                })
            }
            Storage::Packed(packed) => {
                let stored = packed.rows(&|stored| self.bytes(stored))?;
                fill_rows(rows, cols, 1, |row, out| stored.read(row, out))
            }
        }
    }
}

/// Returns whether a tensor is the output head, under any prefix.
fn is_head(name: &str) -> bool {
    name.strip_suffix(HEAD)
        .is_some_and(|prefix| prefix.is_empty() || prefix.ends_with('.'))
}

impl Source for HfSource {
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
        let shards = self.shards.iter().map(|s| s.path().to_path_buf());
        let named = [SINGLE, INDEX].into_iter().chain(TEXTS);
        shards
            .chain(named.map(|name| self.dir.join(name)))
            .collect()
    }

    fn read_rows_f32(&self, index: usize, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = tensor_at(&self.tensors, index)?;
        check_rows(tensor, &rows)?;
        let read = self.read_rows(tensor, &self.storage[index], rows);
        read.map_err(|e| e.tensor(&tensor.name))
    }

    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>> {
        let tensor = tensor_at(&self.tensors, index)?;
        let raw = || match &self.storage[index] {
            Storage::Plain(dtype, stored) => Ok(RawTensor {
                dtype: *dtype,
                bytes: Cow::Borrowed(self.bytes(stored)?),
            }),
            Storage::Bitmask(bitmask) => Ok(RawTensor {
                dtype: bitmask.float,
                bytes: Cow::Owned(bitmask.dense(&|stored| self.bytes(stored))?),
            }),
            Storage::Packed(_) => Ok(RawTensor::of_f32(&self.read_f32(index)?)),
        };
        raw().map_err(|e: Error| e.tensor(&tensor.name))
    }
}

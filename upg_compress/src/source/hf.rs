//! Models as Hugging Face directories: `config.json`, tokenizer files and safetensors weights.
#![forbid(unsafe_code)]

use super::{
    FloatType, ModelFiles, RawTensor, SkippedTensor, Source, SourceDtype, TensorInfo, check_rows,
    fill_rows, sort_key, tensor_at,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use upg_kernel::inference::chat_template::default_template;
use upg_kernel::{Error, ErrorKind, MappedFile, Result};

/// Largest config-like text that is read: the real ones stay under 1 MB.
const MAX_TEXT: u64 = 16 << 20;

/// Largest `tokenizer.json` and weight index: the real ones stay under 40 MB.
const MAX_BLOB: u64 = 256 << 20;

/// What else belongs to a directory.
const TEXTS: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// A Hugging Face model directory; its weight files are mapped, not read.
#[derive(Debug)]
pub struct HfSource {
    dir: PathBuf,
    name: String,
    files: ModelFiles,
    shards: Vec<MappedFile>,
    tensors: Vec<TensorInfo>,
    places: Vec<Place>,
    skipped: Vec<SkippedTensor>,
}

/// Where the bytes of a tensor are. Checked at open: `bytes` lies inside the shard.
#[derive(Debug, Clone)]
struct Place {
    shard: usize,
    dtype: FloatType,
    bytes: Range<usize>,
}

/// A tensor as a shard's header lists it.
struct Stored {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl HfSource {
    /// Opens a directory: reads the texts, maps the shards and checks their headers.
    ///
    /// Errors: `Missing` (no config, no weights, a shard or an indexed tensor that is not there),
    /// `Malformed` (JSON or safetensors headers, shard names with a path in them), `Unsupported`
    /// (quantized checkpoints, pickled weights, dtypes other than BF16, F16, F32), `TooLarge`.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let files = read_files(dir)?;
        let config = parse_object(&files.config_json, &dir.join("config.json"))?;
        if let Some(method) = config.get("quantization_config").filter(|q| !q.is_null()) {
            let method = method.get("quant_method").and_then(Value::as_str);
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("weights already quantized ({})", method.unwrap_or("?")),
            )
            .at(dir.join("config.json"))
            .hint("pass the original model with BF16, F16 or F32 weights"));
        }
        let mut source = Self {
            dir: dir.to_path_buf(),
            name: model_name(dir),
            files,
            shards: Vec::new(),
            tensors: Vec::new(),
            places: Vec::new(),
            skipped: Vec::new(),
        };
        let mut stored = source.map_shards(dir)?;
        source.skip_unused(&mut stored, &config, dir)?;
        source.list(stored)?;
        Ok(source)
    }

    /// Maps every weight file and gathers its tensors by name.
    fn map_shards(&mut self, dir: &Path) -> Result<BTreeMap<String, Stored>> {
        let Some(index) = read_index(dir)? else {
            return self.map_shard(&dir.join(SINGLE));
        };
        let shards: BTreeSet<&String> = index.values().collect();
        let mut all = BTreeMap::new();
        for shard in shards {
            let path = dir.join(shard);
            for (name, stored) in self.map_shard(&path)? {
                if index.get(&name) == Some(shard) {
                    all.insert(name, stored);
                } else {
                    self.skip(name, "not in the index of this shard");
                }
            }
        }
        match index.iter().find(|(name, _)| !all.contains_key(*name)) {
            None => Ok(all),
            Some((name, shard)) => Err(Error::new(
                ErrorKind::Missing,
                format!("the index places it in this shard, which does not have it (see {INDEX})"),
            )
            .at(dir.join(shard))
            .tensor(name)
            .hint("download the model again")),
        }
    }

    /// Maps one weight file; the safetensors crate checks that offsets, shapes and length agree.
    fn map_shard(&mut self, path: &Path) -> Result<BTreeMap<String, Stored>> {
        let map = match MappedFile::open(path) {
            Err(_) if !path.exists() => {
                return Err(
                    Error::new(ErrorKind::Missing, "this weight file is missing")
                        .at(path)
                        .hint("download the rest of the model"),
                );
            }
            opened => opened?,
        };
        let malformed = |e: String| {
            Error::new(
                ErrorKind::Malformed,
                format!("not a whole safetensors file: {e}"),
            )
            .at(path)
            .hint("download it again (an unfinished download, or a git-lfs pointer?)")
        };
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| malformed(e.to_string()))?;
        let base = header + size_of::<u64>();
        let mut found = BTreeMap::new();
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            let bytes = base + start..base + end;
            if map.get(bytes.clone()).is_none() {
                return Err(malformed(format!("'{name}' is outside of it")));
            }
            let stored = Stored {
                shard: self.shards.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            found.insert(name, stored);
        }
        self.shards.push(map);
        Ok(found)
    }

    fn skip(&mut self, name: String, reason: &'static str) {
        self.skipped.push(SkippedTensor { name, reason });
    }

    /// Takes out what no model computes with: rotary tables, and the head that the config ties to
    /// the embeddings.
    fn skip_unused(
        &mut self,
        stored: &mut BTreeMap<String, Stored>,
        config: &Value,
        dir: &Path,
    ) -> Result<()> {
        let tables: Vec<String> = stored
            .keys()
            .filter(|name| name.contains(".rotary_emb."))
            .cloned()
            .collect();
        for name in tables {
            stored.remove(&name);
            self.skip(name, "a rotary table, computed from the config");
        }
        let head_name = "lm_head.weight";
        let tied = config.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let embeddings = stored.get("model.embed_tokens.weight");
        if let (true, Some(embeddings), Some(head)) = (tied, embeddings, stored.get(head_name)) {
            let bytes = |s: &Stored| self.shards.get(s.shard)?.get(s.bytes.clone());
            if head.dtype != embeddings.dtype
                || head.shape != embeddings.shape
                || bytes(head) != bytes(embeddings)
            {
                let message = "differs from the embeddings, though config.json ties the two";
                return Err(Error::new(ErrorKind::Invalid, message)
                    .at(dir)
                    .tensor(head_name)
                    .hint("set tie_word_embeddings to false in config.json if it was trained"));
            }
            stored.remove(head_name);
            self.skip(
                head_name.to_owned(),
                "equal to the embeddings it is tied to",
            );
        }
        Ok(())
    }

    /// Turns what is left into the list of tensors, in order.
    fn list(&mut self, stored: BTreeMap<String, Stored>) -> Result<()> {
        let mut stored: Vec<(String, Stored)> = stored.into_iter().collect();
        stored.sort_by(|a, b| sort_key(&a.0).cmp(&sort_key(&b.0)));
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
            self.tensors.push(TensorInfo {
                name,
                shape: stored.shape,
                dtype: SourceDtype::Float(dtype),
            });
            self.places.push(Place {
                shard: stored.shard,
                dtype,
                bytes: stored.bytes,
            });
        }
        Ok(())
    }

    /// The type and the mapped bytes of a tensor.
    fn bytes(&self, index: usize) -> Result<(FloatType, &[u8])> {
        let tensor = tensor_at(&self.tensors, index)?;
        self.places
            .get(index)
            .and_then(|p| Some((p.dtype, self.shards.get(p.shard)?.get(p.bytes.clone())?)))
            .ok_or_else(|| {
                Error::new(ErrorKind::Malformed, "outside its file").tensor(&tensor.name)
            })
    }
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
        let (dtype, bytes) = self.bytes(index)?;
        let row_bytes = tensor.cols() * dtype.size();
        fill_rows(rows, tensor.cols(), usize::MAX, |first, out| {
            let start = first * row_bytes;
            let end = start + out.len() * dtype.size();
            dtype.to_f32(bytes.get(start..end).unwrap_or_default(), out)
        })
        .map_err(|e| e.tensor(&tensor.name))
    }

    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>> {
        let (dtype, bytes) = self.bytes(index)?;
        Ok(RawTensor {
            dtype,
            bytes: Cow::Borrowed(bytes),
        })
    }
}

/// Tensor name to shard file from the index; `None` if the weights are in one file.
fn read_index(dir: &Path) -> Result<Option<BTreeMap<String, String>>> {
    if dir.join(SINGLE).exists() {
        return Ok(None);
    }
    let path = dir.join(INDEX);
    let Some(text) = read_text(&path, MAX_BLOB)? else {
        return Err(no_weights(dir));
    };
    let index = parse_object(&text, &path)?;
    let malformed = |message: String| Error::new(ErrorKind::Malformed, message).at(&path);
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("no object 'weight_map'".to_owned()))?;
    let mut shards = BTreeMap::new();
    for (name, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        // The index comes from a stranger: a name with a path in it could reach any file.
        let plain = shard.ends_with(".safetensors") && !shard.contains(['/', '\\', ':', '\0']);
        if !plain {
            return Err(
                malformed(format!("shard {shard:?} is not a plain .safetensors name")).tensor(name),
            );
        }
        shards.insert(name.clone(), shard.to_owned());
    }
    Ok(Some(shards))
}

/// The error for a directory without weights, by what is there instead.
fn no_weights(dir: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let find = |test: &dyn Fn(&str) -> bool| names.iter().find(|n| test(n));
    let pickled = |n: &str| n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth");
    let missing = |found: &str| {
        Error::new(
            ErrorKind::Missing,
            format!("neither {SINGLE} nor {INDEX}{found}"),
        )
    };
    if let Some(name) = find(&|n| n.starts_with("adapter_")) {
        return missing(&format!("; {name} belongs to an adapter"))
            .at(dir)
            .hint("merge the adapter into its base model first");
    }
    if let Some(name) = find(&|n| n.ends_with(".safetensors")) {
        return missing(&format!(", but {name}"))
            .at(dir)
            .hint(format!("rename it to {SINGLE} if it is the whole model"));
    }
    if let Some(name) = find(&pickled) {
        return Error::new(
            ErrorKind::Unsupported,
            format!("the weights are pickled ({name})"),
        )
        .at(dir)
        .hint("convert them: model.save_pretrained(DIR, safe_serialization=True)");
    }
    missing("")
        .at(dir)
        .hint("download the model's .safetensors files too")
}

/// Reads config, tokenizer and template.
fn read_files(dir: &Path) -> Result<ModelFiles> {
    let text = |name: &str| read_text(&dir.join(name), MAX_TEXT);
    let Some(config_json) = text("config.json")? else {
        return Err(no_config(dir));
    };
    let tokenizer_config_json = text("tokenizer_config.json")?;
    let mut chat_template = text("chat_template.jinja")?;
    if let (None, Some(json)) = (&chat_template, &tokenizer_config_json) {
        let config = parse_object(json, &dir.join("tokenizer_config.json"))?;
        chat_template = default_template(&config)?.map(str::to_owned);
    }
    Ok(ModelFiles {
        config_json,
        generation_config_json: text("generation_config.json")?,
        tokenizer_json: read_capped(&dir.join("tokenizer.json"), MAX_BLOB)?,
        tokenizer_config_json,
        special_tokens_map_json: text("special_tokens_map.json")?,
        chat_template,
    })
}

fn no_config(dir: &Path) -> Error {
    let gguf = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .min();
    let hint = match gguf {
        Some(file) => format!("pass the GGUF file itself: {}", file.display()),
        None => "pass a Hugging Face model directory or a .gguf file".to_owned(),
    };
    Error::new(ErrorKind::Missing, "no config.json in this directory")
        .at(dir)
        .hint(hint)
}

/// The name of the directory; for a snapshot in the Hugging Face cache, the name of the model.
fn model_name(dir: &Path) -> String {
    // Not canonicalized before the cache is recognized: its files are links, its directories not.
    let dir: PathBuf = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    let cached = dir
        .ancestors()
        .filter_map(|a| a.file_name()?.to_str()?.strip_prefix("models--"))
        .next();
    if let Some(name) = cached {
        return name.replace("--", "/");
    }
    let plain = dir.file_name().map(|n| n.to_string_lossy().into_owned());
    plain.unwrap_or_else(|| "model".to_owned())
}

/// A JSON object, or a `Malformed` error.
fn parse_object(text: &str, path: &Path) -> Result<Value> {
    let malformed = |m: String| Error::new(ErrorKind::Malformed, m).at(path);
    let value: Value =
        serde_json::from_str(text).map_err(|e| malformed(format!("not JSON: {e}")))?;
    if !value.is_object() {
        return Err(malformed("not a JSON object".to_owned()));
    }
    Ok(value)
}

fn read_text(path: &Path, cap: u64) -> Result<Option<String>> {
    let Some(bytes) = read_capped(path, cap)? else {
        return Ok(None);
    };
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| Error::new(ErrorKind::Malformed, "not UTF-8 text").at(path))
}

/// A whole file of at most `cap` bytes; `None` if there is none.
fn read_capped(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    let io = |e| Error::io("cannot read", path, e);
    // Before it is opened: opening a pipe waits for its other end.
    let metadata = match std::fs::metadata(path) {
        Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
        metadata => metadata.map_err(io)?,
    };
    if !metadata.is_file() {
        return Err(io(std::io::Error::other("not a regular file")));
    }
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(cap + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > cap {
        return Err(Error::new(ErrorKind::TooLarge, format!("more than {cap} bytes")).at(path));
    }
    Ok(Some(bytes))
}

//! Files of a model directory: their sizes and limits, and errors if one is missing.
#![forbid(unsafe_code)]

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use upg_kernel::format::container::MOST_TENSORS;
use upg_kernel::format::json::error as json_error;
use upg_kernel::inference::model_dir::read_text;
use upg_kernel::support::PartName;
use upg_kernel::{Error, ErrorKind, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Maximum index in bytes: that of a model with 90,000 tensors has 9 MB.
const MAX_INDEX: u64 = 64 << 20;

/// Maximum name of a shard in bytes, the limit of file systems.
const MAX_SHARD_NAME: usize = 255;

/// Index of a sharded model: the shard of each tensor.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// Shard files with their numbers.
    pub shards: BTreeMap<String, u32>,
    /// Tensors with the numbers of their shards.
    pub tensors: BTreeMap<String, u32>,
}

impl Index {
    /// Returns the file of shard `number`.
    pub fn shard(&self, number: u32) -> &str {
        let found = self.shards.iter().find(|(_, found)| **found == number);
        found.map_or("", |(name, _)| name)
    }

    /// Returns the names of the tensors in shard `number`.
    pub fn names(&self, number: u32) -> impl Iterator<Item = &str> {
        let inside = self
            .tensors
            .iter()
            .filter(move |(_, found)| **found == number);
        inside.map(|(name, _)| name.as_str())
    }

    fn add(&mut self, name: String, shard: &str) {
        let number = match self.shards.get(shard) {
            Some(&number) => number,
            None => {
                let number = self.shards.len() as u32;
                self.shards.insert(shard.to_owned(), number);
                number
            }
        };
        self.tensors.insert(name, number);
    }
}

/// Reads the index; `None` if the weights are in one file.
///
/// Memory: the text, and at most twice as much. Errors: `Malformed`; `TooLarge` for more tensors
/// than a file may have.
pub(super) fn read_index(dir: &Path) -> Result<Option<Index>> {
    // Also for a link that points to nothing, which is refused when it is opened.
    if std::fs::symlink_metadata(dir.join(SINGLE)).is_ok() {
        return Ok(None);
    }
    let path = dir.join(INDEX);
    let Some(text) = read_text(&path, MAX_INDEX)? else {
        return Err(no_weights(dir));
    };
    let mut reader = IndexReader::default();
    let mut json = serde_json::Deserializer::from_str(&text);
    let read = reader.deserialize(&mut json).and_then(|()| json.end());
    let refused = reader.refused.take();
    read.map_err(|e| {
        refused
            .unwrap_or_else(|| json_error("not JSON", e))
            .at(&path)
    })?;
    match reader.has_map {
        true => Ok(Some(reader.index)),
        false => Err(Error::new(ErrorKind::Malformed, "no object 'weight_map'").at(&path)),
    }
}

/// Reader of an index; `refused` is the reason for giving up.
#[derive(Default)]
struct IndexReader {
    index: Index,
    has_map: bool,
    refused: Option<Error>,
}

impl IndexReader {
    fn entry(&mut self, name: String, shard: &str) -> Result<()> {
        // The index is untrusted: a name with a path in it could reach any file.
        let is_plain = shard.ends_with(".safetensors") && !shard.contains(['/', '\\', ':', '\0']);
        if !is_plain || shard.len() > MAX_SHARD_NAME {
            let shown: String = shard.chars().take(MAX_SHARD_NAME).collect();
            let message = format!("shard {shown:?} is not a plain .safetensors name");
            return Err(Error::new(ErrorKind::Malformed, message).tensor(name));
        }
        if self.index.tensors.len() == MOST_TENSORS {
            let message = format!("more than {MOST_TENSORS} tensors");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
        self.index.add(name, shard);
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for &mut IndexReader {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut IndexReader {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<Cow<'_, str>>()? {
            match &*key {
                "weight_map" => {
                    self.has_map = true;
                    map.next_value_seed(WeightMap(&mut *self))?;
                }
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

/// Reader of the object `weight_map`.
struct WeightMap<'a>(&'a mut IndexReader);

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object 'weight_map' of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, shard)) = map.next_entry::<String, Cow<'_, str>>()? {
            if let Err(e) = self.0.entry(name, &shard) {
                self.0.refused = Some(e);
                return Err(A::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

/// Returns the error for a directory without weights, according to its files.
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
    if let Some(gguf) = gguf_hint(dir) {
        let message = format!("neither {SINGLE} nor {INDEX}, but a GGUF file");
        return Error::new(ErrorKind::Missing, message).at(dir).hint(gguf);
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

/// Returns the error for a directory without config.
pub(super) fn no_config(dir: &Path) -> Error {
    let hint = gguf_hint(dir);
    let hint = hint.unwrap_or_else(|| "pass a Hugging Face model directory or a .gguf file".into());
    Error::new(ErrorKind::Missing, "no config.json in this directory")
        .at(dir)
        .hint(hint)
}

/// Most GGUF files that a hint names.
const MOST_NAMED: usize = 8;

/// Returns which GGUF file of a directory to pass; none if it has none.
///
/// The projectors of multimodal models are no models, and the rest of a split file is not passed.
fn gguf_hint(dir: &Path) -> Option<String> {
    let is_rest = |stem: &str| PartName::of(stem).is_some_and(|part| part.number > 1);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("gguf"))
        })
        .filter(|path| {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            !stem.contains("mmproj") && !is_rest(&stem)
        })
        .collect();
    files.sort();
    let names = files
        .iter()
        .take(MOST_NAMED)
        .map(|path| path.display().to_string());
    let names = names.collect::<Vec<_>>().join(", ");
    match files.len() {
        0 => None,
        1 => Some(format!("pass the GGUF file itself: {names}")),
        n if n > MOST_NAMED => Some(format!("pass one of the {n} GGUF files: {names}, ...")),
        _ => Some(format!("pass one of the GGUF files: {names}")),
    }
}

/// Returns the name of the directory; for a snapshot in the Hugging Face cache, the name of
/// the model.
pub(super) fn model_name(dir: &Path) -> String {
    // Not canonicalized before the cache is recognized:
    // its files are links, its directories are not.
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

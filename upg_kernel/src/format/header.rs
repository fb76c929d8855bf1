//! Opening a file: the header, and every check that needs no large read.
#![forbid(unsafe_code)]

use super::checksums::{self, Recorded};
use super::container::Entry;
use super::rules::{CHECKSUM, PAD_PREFIX, TOKENIZER};
use super::tensors::{LayerArrays, Tensors, array_name};
use super::{checksum, index, json, rules};
use crate::codec::layer::{ArraySpec, LayerInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::{MappedFile, OpenOptions};
use crate::matrix::Matrix;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The value of the metadata key `format`.
pub(super) const FORMAT: &str = "upg";
/// The key of the checksums of all tensors.
pub(super) const CHECKSUMS: &str = "checksums";

/// An open UPG file: its metadata, its layers and its uncompressed tensors, all read in place.
///
/// Opening reads the header, the scales and the pointers, nothing else: the time does not grow
/// with the weights. `upg_format_v2.md` lists the checks in "When a reader checks".
pub struct UpgFile {
    tensors: Tensors,
    layers: Vec<LayerInfo>,
    matrices: Vec<OnceLock<Box<Matrix>>>,
    /// Layer ids in ascending order of names.
    by_name: Vec<u32>,
}

impl UpgFile {
    /// Maps and checks `path`.
    ///
    /// Errors: `Io`; `Malformed` if it is not safetensors or cut short; `Unsupported` for a file
    /// of version 1; `Unsupported`, `Missing`, `Shape`, `Invalid`, `TooLarge` or `Checksum` with
    /// the broken rule.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// Like [`UpgFile::open`], with options. A file that is read instead of mapped is verified
    /// first: the bytes that are used later are those with the right checksums.
    ///
    /// Cost of reading: the file in memory, read once, and the computing of [`UpgFile::verify`].
    /// Errors: those of [`UpgFile::open`], [`MappedFile::read`] and [`UpgFile::verify`].
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        Self::checked(MappedFile::open_with(path, options)?, options)
    }

    /// Like [`UpgFile::open_with`], for a file in memory.
    pub(crate) fn checked(file: MappedFile, options: OpenOptions) -> Result<Self> {
        let file = Arc::new(file);
        let check = || {
            let upg = Self::from_mapped(Arc::clone(&file))?;
            if !options.mmap {
                upg.verify(&|_| {})?;
            }
            Ok(upg)
        };
        check().map_err(|e: Error| e.at(file.path()))
    }

    fn from_mapped(file: Arc<MappedFile>) -> Result<Self> {
        if begins_as_pickle(&file) {
            let message = "a Python pickle: a UPG file of version 1, if it is one";
            return Err(Error::new(ErrorKind::Unsupported, message)
                .hint("convert it once: upg convert OLD NEW.safetensors"));
        }
        let tensors = Tensors::read(file)?;
        check_identity(tensors.metadata())?;
        let upg = Self::indexed(tensors)?;
        upg.check_names()?;
        // The error is that of the first bad layer, whatever the order of the threads.
        let layers = (0..upg.layers.len()).into_par_iter();
        match layers.find_map_first(|i| check_layer(&upg.tensors, i, &upg.layers[i]).err()) {
            Some(e) => Err(e),
            None => Ok(upg),
        }
    }

    fn indexed(tensors: Tensors) -> Result<Self> {
        let metadata = tensors.metadata();
        let table = tensors
            .iter()
            .map(|t| (t.name, t.dtype.to_string(), t.shape));
        let (found, recorded) = (
            checksum::table(table, metadata),
            required(metadata, CHECKSUM)?,
        );
        if found != recorded {
            let recorded = json::cut(recorded);
            let message = format!("header checksum is {found}, recorded is {recorded}");
            return Err(Error::new(ErrorKind::Checksum, message)
                .rule(rules::TABLE_CHECKSUM)
                .hint("the file is damaged or was edited: fetch or compress it again"));
        }
        let layers = index::parse(
            required(metadata, "layers")?,
            required(metadata, "num_layers")?,
        )?;
        let mut by_name: Vec<u32> = (0..layers.len() as u32).collect();
        by_name.sort_unstable_by(|&a, &b| layers[a as usize].name.cmp(&layers[b as usize].name));
        Ok(Self {
            tensors,
            matrices: layers.iter().map(|_| OnceLock::new()).collect(),
            layers,
            by_name,
        })
    }

    /// Checks that every tensor is an array of a layer, the tokenizer, padding, or uncompressed.
    fn check_names(&self) -> Result<()> {
        for entry in self.tensors.iter() {
            let is_known = match entry.name {
                name if self.is_array(name)? => true,
                name if name == TOKENIZER || name.starts_with(PAD_PREFIX) => {
                    entry.dtype == Dtype::U8
                }
                name => is_kept(&entry) && self.layer_id(name).is_none(),
            };
            if !is_known {
                let message = format!("{} {:?} is no part of a UPG file", entry.dtype, entry.shape);
                return Err(Error::new(ErrorKind::Unsupported, message)
                    .rule(rules::KEPT)
                    .tensor(entry.name));
            }
        }
        Ok(())
    }

    /// Returns whether a layer has an array of this name.
    fn is_array(&self, name: &str) -> Result<bool> {
        let parts = name
            .strip_prefix(rules::LAYER_PREFIX)
            .and_then(|rest| rest.split_once('_'));
        let Some((number, suffix)) = parts else {
            return Ok(false);
        };
        let index = number.parse().unwrap_or(usize::MAX);
        let Some(layer) = self.layers.get(index) else {
            return Ok(false);
        };
        let mut specs = layer.arrays()?.into_iter();
        // A number can be spelled in several ways; one of them is the name.
        Ok(specs.any(|spec| spec.suffix == suffix) && array_name(index, suffix) == name)
    }

    /// The compressed matrices; the position in the list is the layer id.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// The layer id of a source tensor.
    pub fn layer_id(&self, name: &str) -> Option<usize> {
        let name_of = |&id: &u32| self.layers[id as usize].name.as_str().cmp(name);
        let found = self.by_name.binary_search_by(name_of);
        found.ok().map(|at| self.by_name[at] as usize)
    }

    /// The matrix of layer `id`; the first call checks the bits and columns of a sparse one.
    ///
    /// Errors (`Argument`): no such layer; (`Shape`, `Invalid`): the file breaks a rule.
    pub fn matrix(&self, id: usize) -> Result<&Matrix> {
        let (Some(layer), Some(cell)) = (self.layers.get(id), self.matrices.get(id)) else {
            let message = format!("no layer {id}, the file has {}", self.layers.len());
            return Err(Error::new(ErrorKind::Argument, message).at(self.path()));
        };
        if let Some(matrix) = cell.get() {
            return Ok(matrix);
        }
        let tensors = &self.tensors;
        let matrix = layer
            .matrix(&LayerArrays { tensors, index: id })
            .map_err(|e| e.tensor(&layer.name).at(self.path()))?;
        Ok(cell.get_or_init(|| Box::new(matrix)))
    }

    /// A metadata text, for example `config.json` or `model`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.all_metadata().get(key).map(String::as_str)
    }

    /// All metadata.
    pub fn all_metadata(&self) -> &BTreeMap<String, String> {
        self.tensors.metadata()
    }

    /// The bytes of `tokenizer.json` in the map, if the file has one.
    ///
    /// They are for copying: another process may change the file. Parsers take
    /// [`UpgFile::tokenizer_text`].
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.bytes(TOKENIZER)
    }

    /// A copy of the text of `tokenizer.json`, if the file has one.
    ///
    /// Errors: `TooLarge` above [`MAX_TOKENIZER_BYTES`](super::MAX_TOKENIZER_BYTES), before
    /// anything is copied; `Malformed` for what is not UTF-8.
    pub fn tokenizer_text(&self) -> Result<Option<String>> {
        let Some(bytes) = self.tokenizer_json() else {
            return Ok(None);
        };
        rules::tokenizer_bytes(bytes.len()).map_err(|e| e.at(self.path()))?;
        let text = String::from_utf8(bytes.to_vec());
        text.map(Some).map_err(|_| {
            Error::new(ErrorKind::Malformed, "not UTF-8 text")
                .at(self.path())
                .tensor(TOKENIZER)
        })
    }

    /// Names, dtypes and shapes of the uncompressed tensors, in order of names.
    pub fn kept(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let kept = self.tensors.iter().filter(is_kept);
        kept.map(|t| (t.name, t.dtype, t.shape))
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        self.tensors.file().path()
    }

    /// The bytes of a tensor, by its name in the file.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.tensors.bytes(name)
    }

    pub(super) fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Reads everything: every tensor against its checksum, every rule of every layer.
    ///
    /// `progress` gets the bytes done so far. Cost: one pass over the file, tensors in parallel.
    pub fn verify(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let recorded = required(self.all_metadata(), CHECKSUMS)?;
        let recorded =
            checksums::read(recorded, self.tensors.table()).map_err(|e| e.at(self.path()))?;
        let done = std::sync::atomic::AtomicU64::new(0);
        let tensors: Vec<(Entry<'_>, Recorded)> = self.tensors.iter().zip(recorded).collect();
        let check = |(entry, recorded): &(Entry<'_>, Recorded)| {
            let found = checksum::data(&self.tensors.file()[entry.range.clone()]);
            if !recorded.is(&found) {
                let message = format!("checksum is {found}, recorded is {recorded}");
                return Some(
                    Error::new(ErrorKind::Checksum, message)
                        .rule(rules::TENSOR_CHECKSUM)
                        .tensor(entry.name)
                        .at(self.path())
                        .hint("the file is damaged: fetch or compress it again"),
                );
            }
            let bytes = entry.range.len() as u64;
            progress(done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed) + bytes);
            None
        };
        if let Some(e) = tensors.par_iter().find_map_first(check) {
            return Err(e);
        }
        let layers = (0..self.layers.len()).into_par_iter();
        match layers.find_map_first(|id| self.matrix(id).err()) {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }
}

/// Checks the arrays of a layer, then its scales and pointers (rules 7, 9 and 10).
fn check_layer(tensors: &Tensors, index: usize, layer: &LayerInfo) -> Result<()> {
    let arrays = LayerArrays { tensors, index };
    for spec in layer.arrays()? {
        let name = arrays.name(spec.suffix);
        let entry = tensors.entry(&name).ok_or_else(|| {
            let message = format!(
                "not in the file, {} '{}' needs it",
                layer.encoding_name(),
                layer.name
            );
            Error::new(ErrorKind::Missing, message)
                .rule(rules::ARRAYS)
                .tensor(&name)
        })?;
        check_entry(&entry, &spec).map_err(|e| e.tensor(&name))?;
    }
    layer.check_opened(&arrays)
}

fn check_entry(entry: &Entry<'_>, spec: &ArraySpec) -> Result<()> {
    if entry.dtype == spec.dtype && spec.allows(entry.shape) {
        return Ok(());
    }
    Err(rules::shape(format!(
        "{} {:?}, expected {} {}",
        entry.dtype,
        entry.shape,
        spec.dtype,
        spec.expected()
    )))
}

/// Returns whether a file that begins with `start` is a pickle of protocol 2 to 5.
///
/// Two bytes say so; but the length of a safetensors header may have them too.
pub(crate) fn begins_as_pickle(start: &[u8]) -> bool {
    let is_safetensors = matches!(start, [_, _, _, _, 0, 0, 0, 0, b'{', ..]);
    matches!(start, [0x80, 2..=5, ..]) && !is_safetensors
}

fn is_kept(entry: &Entry<'_>) -> bool {
    let is_float = matches!(entry.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
    is_float && rules::name(entry.name, rules::KEPT).is_ok()
}

fn required<'a>(metadata: &'a BTreeMap<String, String>, key: &str) -> Result<&'a str> {
    metadata.get(key).map(String::as_str).ok_or_else(|| {
        Error::new(ErrorKind::Missing, format!("no '{key}' in the metadata")).rule(rules::METADATA)
    })
}

fn check_identity(metadata: &BTreeMap<String, String>) -> Result<()> {
    if metadata.get("format").map(String::as_str) != Some(FORMAT) {
        return Err(Error::new(
            ErrorKind::Malformed,
            "a safetensors file, but not a UPG file",
        )
        .rule(rules::METADATA)
        .hint("make one with `upg compress MODEL_DIRECTORY -o OUT.safetensors`"));
    }
    let version = required(metadata, "version")?;
    let minor = version.strip_prefix("2.").unwrap_or_default();
    let is_number = minor.bytes().all(|b| b.is_ascii_digit())
        && (minor == "0" || !minor.starts_with('0'))
        && minor.parse::<u16>().is_ok();
    if !is_number {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("format version '{}'", json::cut(version)),
        )
        .rule(rules::VERSION)
        .hint("this build reads version 2.x"));
    }
    for key in [
        "model",
        "compression_ratio",
        "bits_per_weight",
        "recipe",
        CHECKSUMS,
    ] {
        required(metadata, key)?;
    }
    Ok(())
}

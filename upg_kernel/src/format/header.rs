//! Opening a file: the header, and every check that needs no large read.
#![forbid(unsafe_code)]

use super::index::{self, Encoding, LayerInfo};
use super::rules::{CHECKSUM, PAD_PREFIX, TOKENIZER};
use super::{checksum, container, layout, rules};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::{MappedFile, OpenOptions};
use crate::matrix::{Matrix, checked_scales, strips};
use crate::v1;
use bytemuck::Pod;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use tempfile::TempDir;

/// The value of the metadata key `format`.
pub(super) const FORMAT: &str = "upg";
/// The key of the checksums of all tensors.
pub(super) const CHECKSUMS: &str = "checksums";

/// Where a tensor lies in the file.
#[derive(Debug, Clone)]
pub(super) struct TensorEntry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// An open UPG file: its metadata, its layers and its uncompressed tensors, all read in place.
///
/// Opening reads the header, the scales and the pointers, nothing else: the time does not grow
/// with the weights. What is checked when, is listed in `upg_format_v2.md`, "When a reader checks".
pub struct UpgFile {
    file: Arc<MappedFile>,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorEntry>,
    layers: Vec<LayerInfo>,
    matrices: Vec<OnceLock<Matrix>>,
    by_name: HashMap<String, usize>,
    /// The folder of a file that is to be removed with this.
    temporary: Option<TempDir>,
}

impl UpgFile {
    /// Maps and checks `path`.
    ///
    /// Errors: `Io`; `Malformed` if it is not safetensors or cut short; `Unsupported`, `Missing`,
    /// `Shape`, `Invalid`, `TooLarge` or `Checksum` with the broken rule.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// [`UpgFile::open`] with options. A file that is read, not mapped, is verified before anything else is done with it:
    /// what is used later is what had the right checksums.
    ///
    /// Cost of reading: the file in memory, read once, and the computing of [`UpgFile::verify`]. Errors: those of
    /// [`UpgFile::open`], [`MappedFile::read`] and [`UpgFile::verify`].
    pub fn open_with(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let file = Arc::new(MappedFile::open_with(path, options)?);
        if v1::begins_as_pickle(&file) {
            return Err(v1::not_converted().at(path));
        }
        Self::checked(file, options).map_err(|e| e.at(path))
    }

    fn checked(file: Arc<MappedFile>, options: OpenOptions) -> Result<Self> {
        let upg = Self::from_mapped(file)?;
        if !options.mmap {
            upg.verify(&|_| {})?;
        }
        Ok(upg)
    }

    fn from_mapped(file: Arc<MappedFile>) -> Result<Self> {
        let (tensors, metadata) = read_table(&file)?;
        check_identity(&metadata)?;
        let upg = Self::indexed(file, metadata, tensors)?;
        upg.check_names()?;
        // The first bad layer, not the one that some thread comes to first.
        let layers = (0..upg.layers.len()).into_par_iter();
        match layers.find_map_first(|i| upg.check_layer(i).err()) {
            Some(e) => Err(e),
            None => Ok(upg),
        }
    }

    fn indexed(
        file: Arc<MappedFile>,
        metadata: BTreeMap<String, String>,
        tensors: BTreeMap<String, TensorEntry>,
    ) -> Result<Self> {
        let table = tensors
            .iter()
            .map(|(name, t)| (name.as_str(), t.dtype.to_string(), t.shape.as_slice()));
        let (found, recorded) = (
            checksum::table(table, &metadata),
            required(&metadata, CHECKSUM)?,
        );
        if found != recorded {
            let message = format!("header checksum is {found}, recorded is {recorded}");
            return Err(Error::new(ErrorKind::Checksum, message)
                .rule(rules::TABLE_CHECKSUM)
                .hint("the file is damaged or was edited: fetch or compress it again"));
        }
        let layers = index::parse(
            required(&metadata, "layers")?,
            required(&metadata, "num_layers")?,
        )?;
        let by_name = layers
            .iter()
            .enumerate()
            .map(|(i, l)| (l.name.clone(), i))
            .collect();
        Ok(Self {
            file,
            metadata,
            tensors,
            matrices: layers.iter().map(|_| OnceLock::new()).collect(),
            layers,
            by_name,
            temporary: None,
        })
    }

    /// [`UpgFile::open`] for a file in a temporary folder, which goes with it, made of the one at `shown_as`.
    pub(crate) fn open_temporary(
        path: &Path,
        shown_as: &Path,
        temporary: TempDir,
        options: OpenOptions,
    ) -> Result<Self> {
        let file = Arc::new(MappedFile::open_with(path, options)?.shown_as(shown_as));
        let mut upg = Self::checked(file, options).map_err(|e| e.at(shown_as))?;
        upg.temporary = Some(temporary);
        Ok(upg)
    }

    /// Whether it was made of a file of version 1, for as long as this is open.
    pub fn is_temporary(&self) -> bool {
        self.temporary.is_some()
    }

    /// Shapes of all arrays, scales and pointers.
    fn check_layer(&self, index: usize) -> Result<()> {
        let layer = &self.layers[index];
        layout::check(self, index, layer)?;
        let scales_name = layout::array_name(index, "scales");
        let scales = self.array::<f32>(&scales_name)?;
        checked_scales(&scales, layer.rows).map_err(|e| e.tensor(scales_name))?;
        let (codes, of, n) = match layer.encoding()? {
            Encoding::MdCsr => ("values", "row", layer.rows),
            Encoding::S8 => ("values", "strip", strips::count(layer.rows)),
            Encoding::S4 => ("codes", "strip", strips::count(layer.rows)),
            _ => return Ok(()),
        };
        let codes = self.entry(&layout::array_name(index, codes));
        let stored = codes.map_or(0, |t| t.range.len());
        let pointers_name = layout::array_name(index, &format!("{of}_pointers"));
        let pointers = self.array::<u32>(&pointers_name)?;
        rules::pointers(&pointers, of, n, stored).map_err(|e| e.tensor(pointers_name))
    }

    /// Every tensor has a place: an array of a layer, the tokenizer, padding, or kept as it was.
    fn check_names(&self) -> Result<()> {
        let mut arrays = HashSet::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for spec in layout::arrays(layer)? {
                arrays.insert(layout::array_name(index, spec.suffix));
            }
        }
        for (name, entry) in &self.tensors {
            let known = match name.as_str() {
                name if arrays.contains(name) => true,
                name if name == TOKENIZER || name.starts_with(PAD_PREFIX) => {
                    entry.dtype == Dtype::U8
                }
                name => is_kept(name, entry) && !self.by_name.contains_key(name),
            };
            if !known {
                let message = format!("{} {:?} is no part of a UPG file", entry.dtype, entry.shape);
                return Err(Error::new(ErrorKind::Unsupported, message)
                    .rule(rules::KEPT)
                    .tensor(name));
            }
        }
        Ok(())
    }

    /// The compressed matrices; the position in the list is the layer id.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// The layer id of a source tensor.
    pub fn layer_id(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The matrix of layer `id`; the first call checks the bits and columns of a sparse one.
    ///
    /// Errors (`Argument`): no such layer; (`Shape`, `Invalid`): the file breaks a rule.
    pub fn matrix(&self, id: usize) -> Result<&Matrix> {
        let (Some(layer), Some(cell)) = (self.layers.get(id), self.matrices.get(id)) else {
            let message = format!("no layer {id}, the file has {}", self.layers.len());
            return Err(Error::new(ErrorKind::Argument, message).at(self.file.path()));
        };
        if let Some(matrix) = cell.get() {
            return Ok(matrix);
        }
        let matrix = layout::matrix(self, id, layer)
            .map_err(|e| e.tensor(&layer.name).at(self.file.path()))?;
        Ok(cell.get_or_init(|| matrix))
    }

    /// A metadata text, for example `config.json` or `model`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// All metadata.
    pub fn all_metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The text of `tokenizer.json`, if the file has one.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.entry(TOKENIZER).map(|t| &self.file[t.range.clone()])
    }

    /// Names, dtypes and shapes of the tensors that are kept as they were, in order of names.
    pub fn kept(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.tensors
            .iter()
            .filter(|(name, entry)| is_kept(name, entry))
            .map(|(name, t)| (name.as_str(), t.dtype, t.shape.as_slice()))
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The bytes of a tensor, by its name in the file.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entry(name).map(|t| &self.file[t.range.clone()])
    }

    pub(super) fn mapped(&self) -> &MappedFile {
        &self.file
    }

    pub(super) fn entry(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.get(name)
    }

    /// A tensor as values of `T`, in place; the caller has checked its dtype.
    pub(crate) fn array<T: Pod>(&self, name: &str) -> Result<Array<T>> {
        let entry = self
            .entry(name)
            .ok_or_else(|| Error::new(ErrorKind::Missing, "not in the file").tensor(name))?;
        Array::mapped(&self.file, entry.range.clone())
            .map_err(|e| e.rule(rules::ALIGNMENT).tensor(name))
    }

    /// Reads everything: every tensor against its checksum, every rule of every layer.
    ///
    /// `progress` gets the bytes done so far. Cost: one pass over the file, tensors in parallel.
    pub fn verify(&self, progress: &(dyn Fn(u64) + Sync)) -> Result<()> {
        let recorded: HashMap<String, String> =
            serde_json::from_str(required(&self.metadata, CHECKSUMS)?).map_err(|e| {
                Error::new(ErrorKind::Invalid, format!("metadata '{CHECKSUMS}': {e}"))
                    .rule(rules::TENSOR_CHECKSUM)
                    .at(self.path())
            })?;
        let done = std::sync::atomic::AtomicU64::new(0);
        let tensors: Vec<_> = self.tensors.iter().collect();
        let check = |(name, entry): &(&String, &TensorEntry)| {
            let found = checksum::data(&self.file[entry.range.clone()]);
            if recorded.get(*name) != Some(&found) {
                let recorded = recorded.get(*name).map_or("missing", String::as_str);
                let message = format!("checksum is {found}, recorded is {recorded}");
                return Some(
                    Error::new(ErrorKind::Checksum, message)
                        .rule(rules::TENSOR_CHECKSUM)
                        .tensor(*name)
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

fn is_kept(name: &str, entry: &TensorEntry) -> bool {
    let is_float = matches!(entry.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32);
    is_float && rules::name(name, rules::KEPT).is_ok()
}

type Table = (BTreeMap<String, TensorEntry>, BTreeMap<String, String>);

fn read_table(file: &MappedFile) -> Result<Table> {
    let malformed =
        |message: String| Error::new(ErrorKind::Malformed, message).rule(rules::CONTAINER);
    let (header_len, header) = container::read_header(file)
        .map_err(|e| malformed(format!("not a whole safetensors file: {e}")).with_source(e))?;
    let start = header_len + size_of::<u64>();
    let mut tensors = BTreeMap::new();
    for (name, info) in header.tensors() {
        let offset = |o: usize| start.checked_add(o).filter(|&end| end <= file.len());
        let (Some(begin), Some(end)) = (offset(info.data_offsets.0), offset(info.data_offsets.1))
        else {
            return Err(malformed("lies outside the file".into()).tensor(name));
        };
        if name.chars().any(char::is_control) {
            return Err(malformed("a name with control characters".into()).tensor(name));
        }
        let element = info.dtype.bitsize().div_ceil(8);
        if !begin.is_multiple_of(element) {
            let message = format!("starts at byte {begin}, no multiple of {element}");
            return Err(Error::new(ErrorKind::Malformed, message)
                .rule(rules::ALIGNMENT)
                .tensor(name));
        }
        let entry = TensorEntry {
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: begin..end,
        };
        tensors.insert(name, entry);
    }
    let metadata = header.metadata().clone().unwrap_or_default();
    Ok((tensors, metadata.into_iter().collect()))
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
            format!("format version '{version}'"),
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

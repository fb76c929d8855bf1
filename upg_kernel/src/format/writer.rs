//! Writing a file: tensor by tensor, the header last, whole or not at all.
#![forbid(unsafe_code)]

use super::header::{CHECKSUMS, FORMAT};
use super::rules::{CHECKSUM, PAD_PREFIX};
use super::tensors::array_name;
use super::{checksum, rules};
use crate::atomic_file::AtomicFile;
use crate::codec::encoding::Encoding;
use crate::codec::layer::LayerInfo;
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// Every tensor starts at a multiple of this, counted from the start of the file.
pub const ALIGNMENT: u64 = 64;

/// Readers refuse more (rule 1); less a rounding up.
const LARGEST_HEADER: u64 = 100_000_000 - ALIGNMENT;

/// Bytes of a header entry beside the name: dtype, a shape of two and two offsets, its checksum,
/// and a padding tensor with the same.
const ENTRY_BYTES: usize = 330;

/// Bytes of a layer's description that are known only when it is encoded.
const LAYER_BYTES: usize = 80;

const COMPRESSION_RATIO: &str = "compression_ratio";
const BITS_PER_WEIGHT: &str = "bits_per_weight";

/// Room in the header for these two.
const FIGURE_DIGITS: usize = 24;

/// Makes room for [`insert_figures`] in metadata whose size is asked for before.
pub fn reserve_figures(metadata: &mut BTreeMap<String, String>) {
    for key in [COMPRESSION_RATIO, BITS_PER_WEIGHT] {
        metadata.insert(key.to_owned(), "0".repeat(FIGURE_DIGITS));
    }
}

/// Inserts the compression ratio and the bits per weight of a file into its metadata.
pub fn insert_figures(metadata: &mut BTreeMap<String, String>, file_bytes: u64, weights: u64) {
    let (bytes, weights) = (file_bytes as f64, weights as f64);
    let ratio = format!("{:.4}", 4.0 * weights / bytes);
    metadata.insert(COMPRESSION_RATIO.to_owned(), ratio);
    let bits = format!("{:.4}", 8.0 * bytes / weights);
    metadata.insert(BITS_PER_WEIGHT.to_owned(), bits);
}

/// Returns an upper bound for the bytes of the header of a file.
///
/// It has these layers, other tensors of these names, and this metadata beside that of
/// [`FileWriter::finish`].
///
/// Errors: `TooLarge` for more layers than a reader takes; those of the layers.
pub fn header_capacity<'a>(
    layers: &[LayerInfo],
    other: impl Iterator<Item = &'a str>,
    metadata: &BTreeMap<String, String>,
) -> Result<usize> {
    if layers.len() > rules::MOST_LAYERS {
        let message = format!(
            "{} compressed matrices, at most {}",
            layers.len(),
            rules::MOST_LAYERS
        );
        return Err(Error::new(ErrorKind::TooLarge, message)
            .rule(rules::LAYERS)
            .hint("keep some of them uncompressed"));
    }
    let entry = |name: &str| 2 * escaped(name).len() + ENTRY_BYTES;
    let mut bytes = 2048 + escaped(metadata).len() + other.map(entry).sum::<usize>();
    for (index, layer) in layers.iter().enumerate() {
        // Twice escaped: the list of layers is JSON inside a JSON string.
        bytes += escaped(&escaped(layer)).len() + LAYER_BYTES;
        for spec in layer.arrays()? {
            bytes += entry(&array_name(index, spec.suffix));
        }
    }
    Ok(bytes)
}

/// Returns where the first tensor of a file with this `header_capacity` starts.
pub fn header_bytes(header_capacity: usize) -> u64 {
    (8 + header_capacity as u64).next_multiple_of(ALIGNMENT)
}

/// Checks that a file can have an uncompressed tensor of this name (`Invalid`, rule 14).
pub fn check_kept_name(name: &str) -> Result<()> {
    rules::name(name, rules::KEPT)
}

/// A written array: everything but its name and place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenArray {
    /// The shape in the file.
    pub shape: Vec<usize>,
    /// Bytes of its values.
    pub bytes: u64,
    /// Checksum of its bytes ([`checksum_of`](super::checksum_of)).
    pub checksum: String,
}

/// Writes a UPG file.
///
/// The data goes to a temporary file beside the target. [`FileWriter::finish`] moves it to the
/// target; if that is never reached nothing is left.
///
/// The bytes depend only on what is passed. Memory: one buffer of 1 MiB and the table of tensors.
pub struct FileWriter {
    out: AtomicFile,
    capacity: u64,
    position: u64,
    tensors: Vec<Written>,
    pads: usize,
}

struct Written {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    begin: u64,
    end: u64,
    checksum: String,
}

impl FileWriter {
    /// Starts a file at `path` with room for a header of `header_capacity` bytes.
    ///
    /// Errors: `Io` if the folder cannot be written to; `TooLarge` if no reader takes such a
    /// header.
    pub fn create(path: impl AsRef<Path>, header_capacity: usize) -> Result<Self> {
        Self::new(AtomicFile::create(path)?, header_capacity)
    }

    /// Like [`FileWriter::create`], with a file that was started elsewhere.
    pub fn new(mut out: AtomicFile, header_capacity: usize) -> Result<Self> {
        if header_capacity as u64 > LARGEST_HEADER {
            let message = format!("a header of {header_capacity} bytes, at most {LARGEST_HEADER}");
            return Err(Error::new(ErrorKind::TooLarge, message).at(out.path()));
        }
        let data = header_bytes(header_capacity);
        let capacity = data - 8;
        out.seek(SeekFrom::Start(data))
            .map_err(|e| Error::io("cannot write", out.path(), e))?;
        Ok(Self {
            out,
            capacity,
            position: 0,
            tensors: Vec::new(),
            pads: 0,
        })
    }

    /// Appends one tensor. Errors: `Io`; `Shape` if `bytes` do not fit dtype and shape.
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<WrittenArray> {
        if byte_len(dtype, shape) != Some(bytes.len() as u64) {
            let message = format!("{} bytes for {dtype} {shape:?}", bytes.len());
            return Err(Error::new(ErrorKind::Shape, message).tensor(name));
        }
        self.align()?;
        let checksum = checksum::data(bytes);
        self.write(bytes)?;
        self.list(name, dtype, shape, bytes.len() as u64, &checksum);
        Ok(WrittenArray {
            shape: shape.to_vec(),
            bytes: bytes.len() as u64,
            checksum,
        })
    }

    /// Writes zeros up to where a tensor may start.
    fn align(&mut self) -> Result<()> {
        let misaligned = self.position % ALIGNMENT;
        if misaligned == 0 {
            return Ok(());
        }
        let zeros = &[0u8; ALIGNMENT as usize][misaligned as usize..];
        self.write(zeros)?;
        let pad = format!("{PAD_PREFIX}{}", self.pads);
        self.pads += 1;
        let len = zeros.len();
        self.list(&pad, Dtype::U8, &[len], len as u64, &checksum::data(zeros));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out
            .write_all(bytes)
            .map_err(|e| Error::io("cannot write", self.out.path(), e))
    }

    /// Lists a tensor of `len` bytes whose data are at the end of the file.
    fn list(&mut self, name: &str, dtype: Dtype, shape: &[usize], len: u64, checksum: &str) {
        let begin = self.position;
        self.position += len;
        self.tensors.push(Written {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            begin,
            end: self.position,
            checksum: checksum.to_owned(),
        });
    }

    /// Appends the arrays of layer `index`. Errors: as [`FileWriter::tensor`]; `Argument` if
    /// `matrix` is not what `layer` describes; those of [`LayerInfo::check`].
    pub fn layer(
        &mut self,
        index: usize,
        layer: &LayerInfo,
        matrix: &Matrix,
    ) -> Result<Vec<WrittenArray>> {
        layer.check()?;
        let matrix = matrix.stored();
        if let (Some(rotation), Some(size)) = (matrix.rotation(), layer.hadamard)
            && rotation.size() != size
        {
            let message = format!("described with 'hadamard' {size}");
            return Err(Error::new(ErrorKind::Argument, message).tensor(&layer.name));
        }
        let mut written = Vec::new();
        for spec in layer.arrays()? {
            let bytes = matrix.array(spec.suffix).ok_or_else(|| {
                let message = format!("not stored as {}", layer.encoding_name());
                Error::new(ErrorKind::Argument, message).tensor(&layer.name)
            })?;
            let counted = bytes.len() * 8 / spec.dtype.bitsize();
            let name = array_name(index, spec.suffix);
            written.push(self.tensor(&name, spec.dtype, &spec.shape(counted), bytes)?);
        }
        Ok(written)
    }

    /// Takes over a tensor of an earlier run, instead of [`FileWriter::tensor`].
    ///
    /// Returns `false` if the file ([`AtomicFile::resume`]) does not have it; call
    /// [`FileWriter::cut`] then.
    ///
    /// Cost: reads these bytes. Errors: `Io`.
    pub fn restore_tensor(
        &mut self,
        name: &str,
        dtype: Dtype,
        array: &WrittenArray,
    ) -> Result<bool> {
        let len = array.bytes;
        if byte_len(dtype, &array.shape) != Some(len) {
            return Ok(false);
        }
        let start = self.end();
        self.align()?;
        let found = checksum::read(&mut self.out, len)
            .map_err(|e| Error::io("cannot read", self.out.path(), e))?;
        if found.as_ref() != Some(&array.checksum) {
            self.forget(start);
            return Ok(false);
        }
        self.list(name, dtype, &array.shape, len, &array.checksum);
        Ok(true)
    }

    /// Like [`FileWriter::restore_tensor`], for all arrays of a layer.
    ///
    /// Errors: `Io`; those of [`LayerInfo::check`].
    pub fn restore_layer(
        &mut self,
        index: usize,
        layer: &LayerInfo,
        written: &[WrittenArray],
    ) -> Result<bool> {
        layer.check()?;
        let specs = layer.arrays()?;
        let fits = specs.len() == written.len()
            && specs.iter().zip(written).all(|(s, w)| s.allows(&w.shape));
        if !fits {
            return Ok(false);
        }
        let start = self.end();
        for (spec, array) in specs.iter().zip(written) {
            let name = array_name(index, spec.suffix);
            if !self.restore_tensor(&name, spec.dtype, array)? {
                self.forget(start);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The end of the list of tensors, for [`FileWriter::forget`].
    fn end(&self) -> (u64, usize, usize) {
        (self.position, self.tensors.len(), self.pads)
    }

    fn forget(&mut self, (position, tensors, pads): (u64, usize, usize)) {
        self.position = position;
        self.tensors.truncate(tensors);
        self.pads = pads;
    }

    /// Truncates the file after the last tensor that was written or taken over. Errors: `Io`.
    pub fn cut(&mut self) -> Result<()> {
        let len = self.file_len();
        self.out.truncate(len)
    }

    /// Brings everything so far to disk. Errors: `Io`.
    pub fn sync(&mut self) -> Result<()> {
        self.out.sync()
    }

    /// Bytes that the finished file will have.
    pub fn file_len(&self) -> u64 {
        8 + self.capacity + self.position
    }

    /// Writes the header, flushes everything to disk and puts the file in its place.
    ///
    /// `metadata` is completed with `format`, `version`, `num_layers`, `layers` and the checksums.
    /// The version is the lowest that has the encodings of all layers. Errors: `Io`; `TooLarge` if
    /// the header exceeds its capacity; `Unsupported` for an unknown encoding.
    pub fn finish(self, metadata: BTreeMap<String, String>, layers: &[LayerInfo]) -> Result<()> {
        self.complete(metadata, layers)?.commit()
    }

    /// [`FileWriter::finish`] without putting the file in its place.
    pub(crate) fn complete(
        self,
        mut metadata: BTreeMap<String, String>,
        layers: &[LayerInfo],
    ) -> Result<AtomicFile> {
        let minors = layers.iter().map(|l| l.encoding().map(Encoding::minor));
        let minor = minors.collect::<Result<Vec<_>>>()?.into_iter().max();
        let json = |e: serde_json::Error| Error::new(ErrorKind::Argument, e.to_string());
        metadata.insert("format".into(), FORMAT.into());
        metadata.insert("version".into(), format!("2.{}", minor.unwrap_or(0)));
        metadata.insert("num_layers".into(), layers.len().to_string());
        metadata.insert(
            "layers".into(),
            serde_json::to_string(layers).map_err(json)?,
        );
        let checksums: BTreeMap<_, _> = self
            .tensors
            .iter()
            .map(|t| (&t.name, &t.checksum))
            .collect();
        metadata.insert(
            CHECKSUMS.into(),
            serde_json::to_string(&checksums).map_err(json)?,
        );
        let by_name: BTreeMap<_, _> = self.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let table = by_name
            .iter()
            .map(|(name, t)| (*name, t.dtype.to_string(), t.shape.as_slice()));
        metadata.insert(CHECKSUM.into(), checksum::table(table, &metadata));

        let mut header = self.header(&metadata)?;
        if header.len() as u64 > self.capacity {
            let message = format!(
                "a header of {} bytes, room for {}",
                header.len(),
                self.capacity
            );
            return Err(Error::new(ErrorKind::TooLarge, message).at(self.out.path()));
        }
        header.resize(self.capacity as usize, b' ');
        let mut out = self.out;
        out.seek(SeekFrom::Start(0))
            .and_then(|_| out.write_all(&self.capacity.to_le_bytes()))
            .and_then(|()| out.write_all(&header))
            .map_err(|e| Error::io("cannot write", out.path(), e))?;
        Ok(out)
    }

    fn header(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!(metadata));
        for t in &self.tensors {
            let entry = serde_json::json!({
                "dtype": t.dtype.to_string(),
                "shape": t.shape,
                "data_offsets": [t.begin, t.end],
            });
            if header.insert(t.name.clone(), entry).is_some() {
                return Err(Error::new(ErrorKind::Argument, "written twice").tensor(&t.name));
            }
        }
        serde_json::to_vec(&header).map_err(|e| Error::new(ErrorKind::Argument, e.to_string()))
    }
}

/// Bytes of a tensor; `None` if they are no whole number, or too many to count.
fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<u64> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

fn escaped(value: &(impl Serialize + ?Sized)) -> String {
    serde_json::json!(value).to_string()
}

//! Bounded reader of the header of a GGUF file.
//!
//! candle's `gguf_file::Content` is not used for these reasons. It expands arrays into 32-byte
//! values (a `u8` array of n bytes takes 32 n bytes of memory), divides by an alignment of 0,
//! multiplies dimensions unchecked, replaces bytes that are not UTF-8, silently accepts a repeated
//! key or tensor, and refuses a newer quantized type without naming the tensor. Here only names are
//! copied: a value is a place in the mapped file, checked once. Memory stays below a small multiple
//! of the number of keys and tensors, which is limited. candle dequantizes the blocks.
//!
//! Source: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3.
#![forbid(unsafe_code)]

use super::types::GgmlType;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum metadata keys and tensors; real files have about 50 and, for 126 layers, 1,140.
pub(super) const MAX_COUNT: u64 = 1 << 16;

/// Maximum bytes of the header, which is copied; with the largest vocabularies it has about 20 MB.
const MAX_HEADER: usize = 256 << 20;

/// Maximum key or tensor name in bytes; ggml's own limits are 65,535 and 64.
const MAX_NAME: usize = 1 << 12;

/// Maximum nesting of arrays; no nested ones are in use.
const MAX_DEPTH: usize = 4;

const DEFAULT_ALIGNMENT: u64 = 32;

/// Metadata value: a number, or the place of a longer value in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array(Array),
}

/// Array whose elements were all checked to be inside the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Array {
    kind: u32,
    count: usize,
    start: usize,
}

/// Tensor as listed in the file.
///
/// Checked: `bytes` is inside the file, starts on a multiple of 8
/// and holds exactly the blocks of `shape`.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Shape in the usual order, unlike that of ggml: the last dimension is contiguous.
    pub(super) shape: Vec<usize>,
    pub(super) kind: GgmlType,
    pub(super) bytes: Range<usize>,
}

/// Checked header.
#[derive(Debug)]
pub(super) struct Header {
    values: BTreeMap<String, Value>,
    pub(super) tensors: Vec<Entry>,
    /// End of the header: all texts are before it.
    pub(super) end: usize,
}

/// Tensor description before the start of the data is known.
struct Described {
    name: String,
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl Header {
    /// Reads the header of `file`. Cost: one walk over the metadata.
    ///
    /// Errors: `Malformed`, `Unsupported` (version, tensor type), `TooLarge`.
    pub(super) fn read(file: &[u8]) -> Result<Self> {
        let mut cursor = Cursor {
            file: &file[..file.len().min(MAX_HEADER)],
            at: 0,
        };
        if cursor.take(4)? != b"GGUF" {
            return Err(malformed("not a GGUF file"));
        }
        let version = cursor.u32()?;
        if !matches!(version, 2 | 3) {
            let big_endian = if version & 0xffff == 0 {
                " (big-endian?)"
            } else {
                ""
            };
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("GGUF version {version}{big_endian}, expected 2 or 3"),
            )
            .hint("convert the original model again with a current llama.cpp"));
        }
        let tensor_count = cursor.count("tensors")?;
        let key_count = cursor.count("metadata keys")?;
        let mut values = BTreeMap::new();
        for _ in 0..key_count {
            let key = cursor.name()?;
            let kind = cursor.u32()?;
            let value = cursor
                .value(kind, 0)
                .map_err(|e| Error::new(e.kind(), format!("metadata key {key:?}: {e}")))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(malformed(format!("metadata key {key:?} twice")));
            }
        }
        let described = cursor.tensors(tensor_count)?;
        let alignment = match values.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Int(n)) => u64::try_from(*n).unwrap_or(0),
            Some(_) => 0,
        };
        // A multiple of 8 by the specification; blocks are cast in place, with an alignment of at
        // most 4 bytes.
        if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
            return Err(malformed(
                "general.alignment is not a power of two from 8 on",
            ));
        }
        let start = (cursor.at as u64).next_multiple_of(alignment);
        let tensors = described
            .into_iter()
            .map(|t| t.place(start, alignment, file.len()))
            .collect::<Result<_>>()?;
        Ok(Self {
            values,
            tensors,
            end: cursor.at,
        })
    }

    /// Returns the value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }
}

impl Described {
    /// Checks type, shape and place; returns the byte range in the file.
    fn place(self, start: u64, alignment: u64, file_len: usize) -> Result<Entry> {
        let Self {
            name,
            dims,
            kind,
            offset,
        } = self;
        let placed = place(&dims, kind, offset, start, alignment, file_len);
        match placed {
            Ok((kind, shape, bytes)) => Ok(Entry {
                name,
                shape,
                kind,
                bytes,
            }),
            Err(e) => Err(e.tensor(name)),
        }
    }
}

fn place(
    dims: &[u64],
    kind: u32,
    offset: u64,
    start: u64,
    alignment: u64,
    file_len: usize,
) -> Result<(GgmlType, Vec<usize>, Range<usize>)> {
    let kind = GgmlType::from_number(kind)?;
    let bad_shape = || malformed(format!("bad dimensions {dims:?} for type {}", kind.name()));
    let mut shape = Vec::with_capacity(dims.len());
    let mut weights = 1usize;
    for &dim in dims.iter().rev() {
        let dim = usize::try_from(dim).map_err(|_| bad_shape())?;
        weights = weights.checked_mul(dim).ok_or_else(bad_shape)?;
        shape.push(dim);
    }
    let cols = shape.last().copied().unwrap_or(0);
    if weights == 0 || !cols.is_multiple_of(kind.block_values()) {
        return Err(bad_shape());
    }
    let len = (weights / kind.block_values()).checked_mul(kind.block_bytes());
    let range = len.and_then(|len| {
        let first = usize::try_from(start.checked_add(offset)?).ok()?;
        let end = first.checked_add(len)?;
        (end <= file_len).then_some(first..end)
    });
    if !offset.is_multiple_of(alignment) {
        return Err(malformed(format!(
            "offset {offset} is not aligned to {alignment}"
        )));
    }
    let range = range.ok_or_else(|| {
        malformed(format!(
            "{dims:?} {} values at offset {offset} reach past the end of the file",
            kind.name()
        ))
        .hint("the file is cut short: get it again")
    })?;
    Ok((kind, shape, range))
}

/// Metadata value types, by their numbers in the file.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Returns the bytes of a value of a fixed size.
fn fixed_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let rest = self.file.get(self.at..).unwrap_or_default();
        let taken = rest.get(..len).ok_or_else(|| {
            let end = self.file.len();
            match end {
                MAX_HEADER => Error::new(
                    ErrorKind::TooLarge,
                    format!("a header of over {} MiB", MAX_HEADER >> 20),
                ),
                _ => malformed(format!(
                    "the header ends at byte {end}, {len} more bytes expected"
                )),
            }
        })?;
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn count(&mut self, what: &str) -> Result<u64> {
        let count = self.u64()?;
        if count > MAX_COUNT {
            return Err(Error::new(
                ErrorKind::TooLarge,
                format!("{count} {what}, at most {MAX_COUNT}"),
            ));
        }
        Ok(count)
    }

    /// Reads a length-prefixed string, as a place in the file.
    fn text(&mut self) -> Result<Range<usize>> {
        let len = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let start = self.at;
        self.take(len)?;
        Ok(start..self.at)
    }

    fn name(&mut self) -> Result<String> {
        let range = self.text()?;
        let bytes = self.file.get(range).unwrap_or_default();
        if bytes.len() > MAX_NAME {
            return Err(malformed(format!("a name of {} bytes", bytes.len())));
        }
        // Copied first: mapped bytes may change after they were found to be UTF-8.
        String::from_utf8(bytes.to_vec()).map_err(|_| malformed("a name is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            STRING => Value::Text(self.text()?),
            ARRAY => Value::Array(self.elements(depth)?),
            _ => {
                let size = fixed_size(kind)
                    .ok_or_else(|| malformed(format!("unknown value type {kind}")))?;
                scalar(kind, self.take(size)?)?
            }
        })
    }

    /// Reads an array: walks over the elements with their own lengths, skips the rest.
    fn elements(&mut self, depth: usize) -> Result<Array> {
        let kind = self.u32()?;
        let count = usize::try_from(self.u64()?).unwrap_or(usize::MAX);
        let start = self.at;
        if let Some(size) = fixed_size(kind) {
            self.take(count.saturating_mul(size))?;
        } else if kind == STRING || (kind == ARRAY && depth < MAX_DEPTH) {
            // Every element takes bytes, so a wrong count ends at the end of the file.
            for _ in 0..count {
                self.value(kind, depth + 1)?;
            }
        } else {
            return Err(malformed(format!("array of type {kind} at depth {depth}")));
        }
        Ok(Array { kind, count, start })
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<Described>> {
        let mut names = HashSet::new();
        let mut tensors = Vec::new();
        for _ in 0..count {
            let name = self.name()?;
            let dims = self.u32()?;
            if !(1..=4).contains(&dims) {
                return Err(malformed(format!("{dims} dimensions")).tensor(name));
            }
            let dims = (0..dims).map(|_| self.u64()).collect::<Result<_>>()?;
            if !names.insert(name.clone()) {
                return Err(malformed("listed twice").tensor(name));
            }
            tensors.push(Described {
                name,
                dims,
                kind: self.u32()?,
                offset: self.u64()?,
            });
        }
        Ok(tensors)
    }
}

/// Returns a value of a fixed size from its bytes.
fn scalar(kind: u32, bytes: &[u8]) -> Result<Value> {
    let mut wide = [0u8; 8];
    for (to, from) in wide.iter_mut().zip(bytes) {
        *to = *from;
    }
    let bits = u64::from_le_bytes(wide);
    Ok(match kind {
        0 | 2 | 4 | 10 => Value::Int(bits.into()),
        1 => Value::Int((bits as i8).into()),
        3 => Value::Int((bits as i16).into()),
        5 => Value::Int((bits as i32).into()),
        11 => Value::Int((bits as i64).into()),
        6 => Value::Float(shortest(f32::from_bits(bits as u32))),
        12 => Value::Float(f64::from_bits(bits)),
        7 if bits <= 1 => Value::Bool(bits == 1),
        _ => return Err(malformed(format!("{bits} as a value of type {kind}"))),
    })
}

/// Returns the f64 with the shortest decimal form that rounds to this f32.
///
/// This is 1e-5 instead of 9.99999974e-6, as in the config before the conversion.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::NAN)
}

impl Array {
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Calls `each` with every element; arrays of arrays are an error.
    pub(super) fn for_each(
        &self,
        file: &[u8],
        mut each: impl FnMut(Value) -> Result<()>,
    ) -> Result<()> {
        let mut cursor = Cursor {
            file,
            at: self.start,
        };
        for _ in 0..self.count {
            each(cursor.value(self.kind, MAX_DEPTH)?)?;
        }
        Ok(())
    }
}

pub(super) fn malformed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Malformed, message)
}

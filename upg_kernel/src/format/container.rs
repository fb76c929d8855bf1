//! The header of a safetensors file, read within bounds.
//!
//! The crate `safetensors` takes up to 18 times the bytes of a header. Here each byte of it is read
//! once, from a map that another process may be writing to, and goes into a compact table. Memory:
//! at most 4 times the header, and 4 MiB.
#![forbid(unsafe_code)]

use super::json;
use crate::error::{Error, ErrorKind, Result};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::value::{Error as TextError, StrDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, IntoDeserializer, MapAccess, SeqAccess,
    Visitor,
};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::fmt;
use std::io::{BufReader, Read};
use std::ops::Range;

/// Largest header in bytes, as in every reader of safetensors.
pub const MOST_HEADER_BYTES: usize = 100_000_000;
/// Most tensors of a file: three parts for each of 3 matrices of 256 experts in 400 layers are
/// 921,600.
pub const MOST_TENSORS: usize = 1 << 20;
/// Longest name of a tensor in bytes; real ones stay below 200.
pub const MOST_NAME_BYTES: usize = 1 << 12;
/// Most dimensions of a tensor; the weights of models have up to 5.
pub const MOST_DIMS: usize = 16;
/// Most metadata keys: some writers describe each of 10,000 tensors there.
pub const MOST_METADATA: usize = 1 << 16;

/// The key of the metadata.
const METADATA: &str = "__metadata__";
/// Bytes of the number before the header.
const LENGTH_BYTES: usize = size_of::<u64>();

/// The tensors of a safetensors file by their names, and its metadata.
#[derive(Debug)]
pub struct Container {
    /// All names, one after the other.
    names: String,
    /// All shapes, one after the other.
    dims: Vec<usize>,
    /// Ascending by their names.
    slots: Vec<Slot>,
    metadata: BTreeMap<String, String>,
}

/// A tensor of a [`Container`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry<'a> {
    /// The name, without control characters.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: Dtype,
    /// The sizes of its dimensions.
    pub shape: &'a [usize],
    /// Bytes of the file: inside it, as many as the shape asks for, those of no other tensor.
    pub range: Range<usize>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    name: u32,
    name_len: u16,
    dtype: Dtype,
    rank: u8,
    dims: u32,
    begin: usize,
    end: usize,
}

impl Container {
    /// Reads the header of `file`, which is a whole safetensors file.
    ///
    /// Time is linear in the header but for sorting. Errors: `Malformed` for what is no safetensors
    /// file, with tensors that overlap, leave gaps, do not fit their shape or are listed twice;
    /// `TooLarge` above the caps of this module.
    pub fn read(file: &[u8]) -> Result<Self> {
        let header = header_of(file)?;
        // Not from the slice: its texts would be borrowed from bytes that may change meanwhile.
        Self::parse(header, header.len(), file.len())
    }

    /// Reads the header of a safetensors file of `file_len` bytes, without a map and without the
    /// rest of the file.
    ///
    /// Errors: as [`Container::read`]; `Malformed` also if `file` cannot be read.
    pub fn read_from(mut file: impl Read, file_len: u64) -> Result<Self> {
        let mut length = [0; LENGTH_BYTES];
        file.read_exact(&mut length)
            .map_err(|e| structure(&e).with_source(e))?;
        let following = file_len.saturating_sub(LENGTH_BYTES as u64);
        let length = header_length(length, following)?;
        let file_len = usize::try_from(file_len).map_err(|e| structure(e).with_source(e))?;
        let header = BufReader::new(file.take(length as u64));
        Self::parse(header, length, file_len)
    }

    fn parse(header: impl Read, length: usize, file_len: usize) -> Result<Self> {
        let mut container = Self {
            names: String::new(),
            dims: Vec::new(),
            slots: Vec::new(),
            metadata: BTreeMap::new(),
        };
        let mut refused = None;
        let mut json = serde_json::Deserializer::from_reader(header);
        let table = Table {
            container: &mut container,
            refused: &mut refused,
        };
        let read = table.deserialize(&mut json).and_then(|()| json.end());
        read.map_err(|e| refused.unwrap_or_else(|| json::error(WHAT, e)))?;
        container.sort()?;
        container.place(LENGTH_BYTES + length, file_len)?;
        Ok(container)
    }

    /// The tensor `name`. Cost: logarithmic.
    pub fn get(&self, name: &str) -> Option<Entry<'_>> {
        let at = self.position(name)?;
        Some(self.entry(&self.slots[at]))
    }

    /// The position of the tensor `name` in [`Container::iter`].
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        let found = self
            .slots
            .binary_search_by(|slot| self.name(slot).cmp(name));
        found.ok()
    }

    /// All tensors in ascending order of their names.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Entry<'_>> {
        self.slots.iter().map(|slot| self.entry(slot))
    }

    /// The metadata by their keys.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    fn name(&self, slot: &Slot) -> &str {
        let start = slot.name as usize;
        &self.names[start..start + usize::from(slot.name_len)]
    }

    fn entry(&self, slot: &Slot) -> Entry<'_> {
        let dims = slot.dims as usize;
        Entry {
            name: self.name(slot),
            dtype: slot.dtype,
            shape: &self.dims[dims..dims + usize::from(slot.rank)],
            range: slot.begin..slot.end,
        }
    }

    /// Sorts by names. Errors (`Malformed`): two are alike.
    fn sort(&mut self) -> Result<()> {
        let mut slots = std::mem::take(&mut self.slots);
        slots.sort_unstable_by(|a, b| self.name(a).cmp(self.name(b)));
        self.slots = slots;
        let twice = self
            .slots
            .windows(2)
            .find(|pair| self.name(&pair[0]) == self.name(&pair[1]));
        match twice {
            None => Ok(()),
            Some(pair) => Err(structure("is listed twice").tensor(self.name(&pair[0]))),
        }
    }

    /// Checks that the tensors are all of the file from `start` to `end`, and counts their places
    /// from its first byte.
    fn place(&mut self, start: usize, end: usize) -> Result<()> {
        let mut order: Vec<u32> = (0..self.slots.len() as u32).collect();
        order.sort_unstable_by_key(|&i| (self.slots[i as usize].begin, self.slots[i as usize].end));
        let mut next = 0;
        for at in order {
            let slot = self.slots[at as usize];
            let entry = self.entry(&slot);
            let bits = entry
                .shape
                .iter()
                .try_fold(slot.dtype.bitsize(), |n, &d| n.checked_mul(d));
            let bytes = bits
                .filter(|bits| bits.is_multiple_of(8))
                .map(|bits| bits / 8);
            let wrong = |message: String| Err(structure(message).tensor(entry.name));
            if slot.begin != next || slot.end < slot.begin {
                return wrong(format!(
                    "is at {}..{}, expected from {next} on",
                    slot.begin, slot.end
                ));
            }
            if bytes != Some(slot.end - slot.begin) {
                let (dtype, shape) = (slot.dtype, entry.shape);
                return wrong(format!(
                    "has {} bytes for {dtype} {shape:?}",
                    slot.end - slot.begin
                ));
            }
            if slot.end > end - start {
                return wrong(format!("ends at {}, the data at {}", slot.end, end - start));
            }
            next = slot.end;
            let slot = &mut self.slots[at as usize];
            (slot.begin, slot.end) = (start + slot.begin, start + slot.end);
        }
        match end - start - next {
            0 => Ok(()),
            more => Err(structure(format!("{more} bytes after the last tensor"))),
        }
    }
}

/// Beginning of the messages about a file that is refused.
const WHAT: &str = "not a whole safetensors file";

fn structure(message: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Malformed, format!("{WHAT}: {message}"))
}

/// The JSON of the header, which is not looked at.
fn header_of(file: &[u8]) -> Result<&[u8]> {
    let (length, rest) = file
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or_else(|| structure(format!("{} bytes", file.len())))?;
    header_length(*length, rest.len() as u64).map(|length| &rest[..length])
}

/// The length that a file begins with, in which `following` bytes come after that.
fn header_length(length: [u8; LENGTH_BYTES], following: u64) -> Result<usize> {
    let length = u64::from_le_bytes(length);
    if length > MOST_HEADER_BYTES as u64 {
        let message = format!("a header of {length} bytes, at most {MOST_HEADER_BYTES}");
        return Err(structure(message));
    }
    if length > following {
        let message = format!("a header of {length} bytes, {following} follow");
        return Err(structure(message));
    }
    Ok(length as usize)
}

/// Reads the object that a header is into `container`; `refused` is why it was given up.
struct Table<'a> {
    container: &'a mut Container,
    refused: &'a mut Option<Error>,
}

impl Table<'_> {
    /// Gives up.
    fn refuse<E: serde::de::Error>(&mut self, error: Error) -> E {
        *self.refused = Some(error);
        E::custom("refused")
    }

    fn too_many<E: serde::de::Error>(&mut self, what: &str, most: usize) -> E {
        let message = format!("{WHAT}: more than {most} {what}");
        self.refuse(Error::new(ErrorKind::TooLarge, message))
    }

    /// The name and value of a tensor; the name is read already.
    fn tensor<'de, A: MapAccess<'de>>(
        &mut self,
        name: Range<usize>,
        map: &mut A,
    ) -> Result<(), A::Error> {
        if self.container.slots.len() == MOST_TENSORS {
            return Err(self.too_many("tensors", MOST_TENSORS));
        }
        let dims = self.container.dims.len();
        let info = map.next_value_seed(Info(&mut *self))?;
        let rank = self.container.dims.len() - dims;
        self.container.slots.push(Slot {
            name: name.start as u32,
            name_len: name.len() as u16,
            dtype: info.0,
            rank: rank as u8,
            dims: dims as u32,
            begin: info.1.0,
            end: info.1.1,
        });
        Ok(())
    }

    fn metadata<'de, A: MapAccess<'de>>(&mut self, map: &mut A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if self.container.metadata.len() == MOST_METADATA {
                return Err(self.too_many("metadata keys", MOST_METADATA));
            }
            match self.container.metadata.entry(key) {
                MapEntry::Vacant(place) => {
                    place.insert(map.next_value()?);
                }
                MapEntry::Occupied(_) => return Err(A::Error::custom("a metadata key twice")),
            }
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Table<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Table<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut has_metadata = false;
        while let Some(name) = map.next_key_seed(Name(&mut self))? {
            match name {
                Some(name) => self.tensor(name, &mut map)?,
                None if has_metadata => return Err(A::Error::custom("metadata twice")),
                None => {
                    has_metadata = true;
                    map.next_value_seed(Metadata(&mut self))?;
                }
            }
        }
        Ok(())
    }
}

/// Adds a name to the table; `None` for that of the metadata.
struct Name<'a, 'b>(&'a mut Table<'b>);

impl<'de> DeserializeSeed<'de> for Name<'_, '_> {
    type Value = Option<Range<usize>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for Name<'_, '_> {
    type Value = Option<Range<usize>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Self::Value, E> {
        if name == METADATA {
            return Ok(None);
        }
        if name.len() > MOST_NAME_BYTES {
            let message = format!(
                "{WHAT}: a name of {} bytes, at most {MOST_NAME_BYTES}",
                name.len()
            );
            return Err(self.0.refuse(Error::new(ErrorKind::TooLarge, message)));
        }
        if name.chars().any(char::is_control) {
            return Err(self
                .0
                .refuse(structure("a name with control characters").tensor(name)));
        }
        let names = &mut self.0.container.names;
        let start = names.len();
        names.push_str(name);
        Ok(Some(start..names.len()))
    }
}

/// Reads the metadata, an object of texts or `null`.
struct Metadata<'a, 'b>(&'a mut Table<'b>);

impl<'de> DeserializeSeed<'de> for Metadata<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Metadata<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        self.0.metadata(&mut map)
    }
}

/// Reads type, place and, into the table, shape of a tensor.
struct Info<'a, 'b>(&'a mut Table<'b>);

/// The type of a tensor, and where its bytes begin and end.
type DtypeAndRange = (Dtype, (usize, usize));

impl<'de> DeserializeSeed<'de> for Info<'_, '_> {
    type Value = DtypeAndRange;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<DtypeAndRange, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Info<'_, '_> {
    type Value = DtypeAndRange;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DtypeAndRange, A::Error> {
        const KEYS: [&str; 3] = ["dtype", "shape", "data_offsets"];
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key_seed(json::OneOf(&KEYS))? {
            let is_first = match key {
                Some("dtype") => dtype.replace(map.next_value_seed(Type)?).is_none(),
                Some("shape") => shape
                    .replace(map.next_value_seed(Shape(&mut *self.0))?)
                    .is_none(),
                Some(_) => offsets.replace(map.next_value()?).is_none(),
                None => map.next_value::<IgnoredAny>().map(|_| true)?,
            };
            if !is_first {
                return Err(A::Error::custom("a field of a tensor twice"));
            }
        }
        match (dtype, shape, offsets) {
            (Some(dtype), Some(()), Some(offsets)) => Ok((dtype, offsets)),
            _ => Err(A::Error::custom(
                "a tensor without dtype, shape or data_offsets",
            )),
        }
    }
}

/// Reads a type, by a text that is not kept.
struct Type;

impl<'de> DeserializeSeed<'de> for Type {
    type Value = Dtype;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Dtype, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for Type {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a type")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Dtype, E> {
        const LONGEST: usize = 16;
        let known = || {
            let name: StrDeserializer<'_, TextError> = name.into_deserializer();
            Dtype::deserialize(name).ok()
        };
        let dtype = if name.len() <= LONGEST { known() } else { None };
        dtype.ok_or_else(|| E::custom("a dtype that is not known"))
    }
}

/// Adds a shape to the table.
struct Shape<'a, 'b>(&'a mut Table<'b>);

impl<'de> DeserializeSeed<'de> for Shape<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut rank = 0;
        while let Some(size) = list.next_element()? {
            if rank == MOST_DIMS {
                return Err(self.0.too_many("dimensions of a tensor", MOST_DIMS));
            }
            self.0.container.dims.push(size);
            rank += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

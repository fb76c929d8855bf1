//! The list of the checksums of all tensors in the metadata (rule 15).
#![forbid(unsafe_code)]

use super::checksum::{self, DIGEST_BYTES};
use super::container::Container;
use super::{json, rules};
use crate::error::{Error, ErrorKind, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::fmt;

/// The checksum that is recorded for a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Recorded {
    Missing,
    Checksum([u8; DIGEST_BYTES]),
    /// A text that is no checksum.
    Other,
}

impl Recorded {
    /// Returns whether the recorded checksum is `found`.
    pub fn is(&self, found: &str) -> bool {
        *self != Self::Missing && *self == Self::of(found)
    }

    fn of(text: &str) -> Self {
        checksum::parsed(text).map_or(Self::Other, Self::Checksum)
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("missing"),
            Self::Checksum(bytes) => f.write_str(&checksum::hex(bytes)),
            Self::Other => f.write_str("no checksum"),
        }
    }
}

/// Reads the checksums of the tensors of `table`, in its order; others are passed over.
///
/// Memory: 17 bytes for each tensor. Errors (`Invalid`): no JSON object of texts, or one that has a
/// tensor twice.
pub(super) fn read(text: &str, table: &Container) -> Result<Vec<Recorded>> {
    json::parse(text, Sums(table)).map_err(|e| {
        let message = json::message("metadata 'checksums'", &e);
        Error::new(ErrorKind::Invalid, message)
            .with_source(e)
            .rule(rules::TENSOR_CHECKSUM)
    })
}

struct Sums<'a>(&'a Container);

impl<'de> DeserializeSeed<'de> for Sums<'_> {
    type Value = Vec<Recorded>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Sums<'_> {
    type Value = Vec<Recorded>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of checksums")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = vec![Recorded::Missing; self.0.iter().len()];
        while let Some(position) = map.next_key_seed(Position(self.0))? {
            let Some(position) = position else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if found[position] != Recorded::Missing {
                return Err(A::Error::custom("a tensor twice"));
            }
            found[position] = map.next_value_seed(Sum)?;
        }
        Ok(found)
    }
}

/// The position of a tensor by its name, which is not kept.
struct Position<'a>(&'a Container);

impl<'de> DeserializeSeed<'de> for Position<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for Position<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.position(name))
    }
}

/// A checksum, by a text that is not kept.
struct Sum;

impl<'de> DeserializeSeed<'de> for Sum {
    type Value = Recorded;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Recorded, D::Error> {
        from.deserialize_str(self)
    }
}

impl Visitor<'_> for Sum {
    type Value = Recorded;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a checksum")
    }

    fn visit_str<E>(self, text: &str) -> Result<Recorded, E> {
        Ok(Recorded::of(text))
    }
}

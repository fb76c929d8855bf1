//! The list of compressed matrices in the metadata of a file.
#![forbid(unsafe_code)]

use super::{json, rules};
use crate::codec::layer::LayerInfo;
use crate::error::{Error, ErrorKind, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use std::collections::HashSet;
use std::fmt;

/// Parses and checks the `layers` and `num_layers` metadata (rules 5 and 6).
///
/// Memory: at most twice the text, and 24 MB.
pub(super) fn parse(layers: &str, num_layers: &str) -> Result<Vec<LayerInfo>> {
    let bad = |message: String| Error::new(ErrorKind::Invalid, message).rule(rules::LAYERS);
    let layers = json::parse(layers, Listed)
        .map_err(|e| bad(json::message("metadata 'layers'", &e)).with_source(e))?;
    if num_layers != layers.len().to_string() {
        return Err(bad(format!(
            "metadata 'num_layers' is '{}', 'layers' lists {}",
            json::cut(num_layers),
            layers.len(),
        )));
    }
    let mut names = HashSet::new();
    for layer in &layers {
        layer.check().map_err(|e| e.tensor(&layer.name))?;
        if !names.insert(layer.name.as_str()) {
            return Err(bad("listed twice in metadata 'layers'".into()).tensor(&layer.name));
        }
    }
    Ok(layers)
}

/// A list of at most [`rules::MOST_LAYERS`] layers.
struct Listed;

impl<'de> DeserializeSeed<'de> for Listed {
    type Value = Vec<LayerInfo>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Listed {
    type Value = Vec<LayerInfo>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of layers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut layers = Vec::new();
        while let Some(layer) = list.next_element()? {
            if layers.len() == rules::MOST_LAYERS {
                let most = rules::MOST_LAYERS;
                return Err(A::Error::custom(format_args!("more than {most} layers")));
            }
            layers.push(layer);
        }
        Ok(layers)
    }
}

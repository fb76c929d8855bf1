//! Whether a file has the arrays of its layers, with their dtypes and shapes (rule 7).
#![forbid(unsafe_code)]

use super::container::Entry;
use super::rules;
use super::tensors::{LayerArrays, Tensors};
use crate::codec::layer::{ArraySpec, LayerInfo};
use crate::error::{Error, ErrorKind, Result};

/// Checks presence, dtype and shape of every array of a layer, then its scales and pointers (rules 7, 9 and 10).
pub(super) fn check(tensors: &Tensors, index: usize, layer: &LayerInfo) -> Result<()> {
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

//! The tensors of an open file by name, read in place.
#![forbid(unsafe_code)]

use super::container::{Container, Entry};
use super::rules::{self, LAYER_PREFIX};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::MappedFile;
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A file in memory and its table.
pub(crate) struct Tensors {
    file: Arc<MappedFile>,
    table: Container,
}

impl Tensors {
    /// Reads the table. Errors: those of [`Container::read`]; `Malformed` (rule 8) for a tensor
    /// that starts in the middle of an element.
    pub fn read(file: Arc<MappedFile>) -> Result<Self> {
        let table = Container::read(&file).map_err(|e| e.rule(rules::CONTAINER))?;
        for entry in table.iter() {
            let element = entry.dtype.bitsize().div_ceil(8);
            let begin = entry.range.start;
            if !begin.is_multiple_of(element) {
                let message = format!("starts at byte {begin}, no multiple of {element}");
                return Err(Error::new(ErrorKind::Malformed, message)
                    .rule(rules::ALIGNMENT)
                    .tensor(entry.name));
            }
        }
        Ok(Self { file, table })
    }

    /// The whole file.
    pub fn file(&self) -> &MappedFile {
        &self.file
    }

    pub fn table(&self) -> &Container {
        &self.table
    }

    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.table.metadata()
    }

    /// All tensors in order of names.
    pub fn iter(&self) -> impl Iterator<Item = Entry<'_>> {
        self.table.iter()
    }

    pub fn entry(&self, name: &str) -> Option<Entry<'_>> {
        self.table.get(name)
    }

    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.entry(name).map(|entry| &self.file[entry.range])
    }

    /// A tensor as values of `T`, in place; the caller has checked its dtype. Errors: `Missing`;
    /// `Malformed` (rule 8).
    pub fn array<T: Pod>(&self, name: &str) -> Result<Array<T>> {
        let entry = self
            .entry(name)
            .ok_or_else(|| Error::new(ErrorKind::Missing, "not in the file").tensor(name))?;
        Array::mapped(&self.file, entry.range).map_err(|e| e.rule(rules::ALIGNMENT).tensor(name))
    }
}

/// Returns `layer_{index}_{suffix}`, the name of an array in the file.
pub(super) fn array_name(index: usize, suffix: &str) -> String {
    format!("{LAYER_PREFIX}{index}_{suffix}")
}

/// The arrays of one layer.
pub(crate) struct LayerArrays<'a> {
    pub(super) tensors: &'a Tensors,
    pub(super) index: usize,
}

impl LayerArrays<'_> {
    /// Name of an array in the file.
    pub fn name(&self, suffix: &str) -> String {
        array_name(self.index, suffix)
    }

    /// An array as values of `T`, in place. Errors: those of [`Tensors::array`].
    pub fn get<T: Pod>(&self, suffix: &str) -> Result<Array<T>> {
        self.tensors.array(&self.name(suffix))
    }

    /// Number of elements of an array; 0 if it is missing.
    pub fn len(&self, suffix: &str) -> usize {
        let entry = self.tensors.entry(&self.name(suffix));
        entry.map_or(0, |t| t.shape.iter().product())
    }
}

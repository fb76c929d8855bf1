//! Objects that a pickle creates.
//!
//! Objects are indices into one list. So a file can neither nest them deeper than a stack nor
//! create a cycle that is never freed, and a list that holds itself a million times is one list.
#![forbid(unsafe_code)]

use super::bytes::Bytes;
use super::globals::Global;
use super::lists::{Number, Run};
use super::numpy::{Dtype, NdArray};
use std::sync::Arc;

/// Maximum dimensions of an array of a version 1 file.
const MOST_DIMENSIONS: usize = 4;

/// Index of an object in the list of [`Objects`].
pub(super) type Id = usize;

/// Object of a pickle.
#[derive(Debug)]
pub(super) enum Object {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    /// Consecutive numbers of a list or tuple.
    Run(Box<Run>),
    Text {
        text: Arc<str>,
        /// Location in the file.
        place: Bytes,
    },
    /// Text that is too long to be read.
    LongText(Bytes),
    Bytes(Bytes),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// Dict in file order; keys are unique.
    Dict(Vec<(Arc<str>, Id)>),
    Global(Global),
    Dtype(Dtype),
    /// Array before its state is set.
    NewArray,
    Array(Box<NdArray>),
    /// A csr_matrix before its state is set.
    NewCsr,
    Csr(Box<Csr>),
}

impl From<Number> for Object {
    fn from(number: Number) -> Self {
        match number {
            Number::Bool(value) => Self::Bool(value),
            Number::Int(n) => Self::Int(n),
            Number::Float(n) => Self::Float(n),
        }
    }
}

/// Parts of a scipy.sparse.csr_matrix.
#[derive(Debug, Clone)]
pub(super) struct Csr {
    pub shape: Vec<u64>,
    /// Index of an array, as are the two others.
    pub data: Id,
    pub indices: Id,
    pub indptr: Id,
}

/// All objects of a pickle, by index.
#[derive(Default)]
pub(super) struct Objects(Vec<Object>);

impl Objects {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn push(&mut self, object: Object) {
        self.0.push(object);
    }

    pub(super) fn get_mut(&mut self, id: Id) -> &mut Object {
        &mut self.0[id]
    }

    pub(super) fn get(&self, id: Id) -> &Object {
        &self.0[id]
    }

    pub(super) fn put(&mut self, id: Id, object: Object) {
        self.0[id] = object;
    }

    pub(super) fn text(&self, id: Id) -> Option<&Arc<str>> {
        match self.get(id) {
            Object::Text { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Returns the items of a list or tuple.
    pub(super) fn items(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Object::Tuple(items) | Object::List(items) => Some(items),
            _ => None,
        }
    }

    /// Returns the length of a list or tuple with these items, counting each number of a run.
    fn count(&self, items: &[Id]) -> u64 {
        let count = |&id: &Id| match self.get(id) {
            Object::Run(run) => run.count,
            _ => 1,
        };
        items.iter().map(count).sum()
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            Object::Tuple(items) => Some(items),
            _ => None,
        }
    }

    /// Returns the numbers of a tuple or list of non-negative numbers.
    pub(super) fn sizes(&self, id: Id) -> Option<Vec<u64>> {
        let items = self.items(id)?;
        if items.len() > MOST_DIMENSIONS {
            return None;
        }
        let size = |&id: &Id| match self.get(id) {
            Object::Int(n) => u64::try_from(*n).ok(),
            _ => None,
        };
        items.iter().map(size).collect()
    }

    /// Describes an object briefly, for messages.
    pub(super) fn describe(&self, id: Id) -> String {
        match self.get(id) {
            Object::None => "None".to_owned(),
            Object::Bool(value) => format!("the truth value {value}"),
            Object::Int(n) => format!("the number {n}"),
            Object::Float(n) => format!("the number {n:?}"),
            Object::Run(run) => run.to_string(),
            Object::Text { text, .. } if text.len() <= 80 => format!("the text '{text}'"),
            Object::Text { .. } | Object::LongText(_) => "a long text".to_owned(),
            Object::Bytes(bytes) => format!("{} bytes", bytes.len),
            Object::Tuple(items) => format!("a tuple of {}", self.count(items)),
            Object::List(items) => format!("a list of {}", self.count(items)),
            Object::Dict(items) if items.len() <= 32 && items.iter().all(|i| i.0.len() <= 80) => {
                let mut keys: Vec<&str> = items.iter().map(|(key, _)| &**key).collect();
                keys.sort_unstable();
                format!("a dict of [{}]", keys.join(", "))
            }
            Object::Dict(items) => format!("a dict of {} keys", items.len()),
            Object::Global(global) => format!("the global '{global}'"),
            Object::Dtype(dtype) => format!("the dtype {dtype}"),
            Object::NewArray => "an array without numbers".to_owned(),
            Object::Array(array) => array.to_string(),
            Object::NewCsr => "a csr_matrix without its parts".to_owned(),
            Object::Csr(csr) => format!("a csr_matrix {:?}", csr.shape),
        }
    }
}

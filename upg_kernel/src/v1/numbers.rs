//! Numbers of a part of a tensor, in an array or a list.
#![forbid(unsafe_code)]

use super::bytes::Files;
use super::lists::{ListReader, NumberList};
use super::numpy::{ArrayReader, NdArray};
use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// Array, or a list in place of one.
#[derive(Debug, Clone)]
pub(super) enum Numbers {
    Array(NdArray),
    List(Arc<NumberList>),
}

impl Numbers {
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Array(array) => array.len(),
            Self::List(list) => list.len(),
        }
    }

    /// Returns whether at most one of its dimensions differs from 1.
    /// A list of lists has no others.
    pub(super) fn is_row(&self) -> bool {
        match self {
            Self::Array(array) => array.shape.iter().filter(|&&d| d != 1).count() <= 1,
            Self::List(_) => true,
        }
    }

    /// Checks for one dimension of integers.
    ///
    /// Errors (`Shape`): not one dimension; (`Unsupported`): not integers.
    pub(super) fn check_integers(&self, name: &str) -> Result<()> {
        match self {
            Self::Array(array) => array.check_integers(name),
            Self::List(list) => list.check_integers(name),
        }
    }

    /// Returns a reader of its integers.
    pub(super) fn integers<'a>(&self, files: &'a Files) -> Integers<'a> {
        match self {
            Self::Array(array) => Integers::Array(array.integers(files)),
            Self::List(list) => Integers::List(ListReader::new(list, files)),
        }
    }

    /// Returns all numbers. Memory: 4 bytes each. Errors: those of reading.
    pub(super) fn floats(&self, files: &Files) -> Result<Vec<f32>> {
        match self {
            Self::Array(array) => array.floats(files),
            Self::List(list) => list.floats(files),
        }
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Array(array) => array.fmt(f),
            Self::List(list) => list.fmt(f),
        }
    }
}

/// Reader of the integers of [`Numbers`], from first to last.
pub(super) enum Integers<'a> {
    Array(ArrayReader<'a>),
    List(ListReader<'a>),
}

impl Integers<'_> {
    /// Replaces the content of `out` by the next `n` integers. Errors: those of reading.
    pub(super) fn take(&mut self, n: usize, out: &mut Vec<i64>) -> Result<()> {
        match self {
            Self::Array(reader) => reader.take(n, out),
            Self::List(reader) => reader.take(n, out),
        }
    }

    /// Checks that nothing is left.
    ///
    /// Errors (`Malformed`): an array has more bytes than its numbers. The length of a list is the
    /// number of its items.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Self::Array(reader) => reader.finish(),
            Self::List(_) => Ok(()),
        }
    }
}

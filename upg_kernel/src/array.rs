//! One-dimensional typed storage, either owned or a range of a mapped file.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::mapped::MappedFile;
use bytemuck::Pod;
use std::ops::{Deref, Range};
use std::sync::Arc;

/// Read-only `[T]` in a `Vec` or in a [`MappedFile`] (mapped or read),
/// without a lifetime parameter.
///
/// A clone of an array in a file copies nothing. The file is little-endian, as is every platform
/// that UPG supports.
#[derive(Clone)]
pub struct Array<T: Pod>(Storage<T>);

#[derive(Clone)]
enum Storage<T> {
    Owned(Arc<Vec<T>>),
    Mapped(Arc<MappedFile>, Range<usize>),
}

impl<T: Pod> Array<T> {
    /// Returns the bytes `range` of `file` as values of `T`, in place.
    ///
    /// Errors (`Malformed`): the range is outside the file, not aligned to `T`, or not a whole
    /// number of `T`s.
    pub fn mapped(file: &Arc<MappedFile>, range: Range<usize>) -> Result<Self> {
        let bytes = file.get(range.clone()).ok_or_else(|| {
            Error::new(
                ErrorKind::Malformed,
                format!(
                    "bytes {range:?} are outside the file of {} bytes",
                    file.len()
                ),
            )
        })?;
        bytemuck::try_cast_slice::<u8, T>(bytes).map_err(|e| {
            Error::new(
                ErrorKind::Malformed,
                format!(
                    "bytes {range:?} are not values of {} bytes: {e}",
                    size_of::<T>()
                ),
            )
        })?;
        Ok(Self(Storage::Mapped(Arc::clone(file), range)))
    }

    /// Returns the file and the offset of the first byte in it; `None` for owned memory.
    pub(crate) fn place(&self) -> Option<(&Arc<MappedFile>, usize)> {
        match &self.0 {
            Storage::Owned(_) => None,
            Storage::Mapped(file, range) => Some((file, range.start)),
        }
    }
}

impl<T: Pod> From<Vec<T>> for Array<T> {
    fn from(values: Vec<T>) -> Self {
        Self(Storage::Owned(Arc::new(values)))
    }
}

/// Compares values, independent of their storage.
impl<T: Pod + PartialEq> PartialEq for Array<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T: Pod> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match &self.0 {
            Storage::Owned(values) => values,
            // `mapped` has checked range, length and alignment; the memory of a file never moves.
            Storage::Mapped(file, range) => bytemuck::cast_slice(&file[range.clone()]),
        }
    }
}

impl<T: Pod> std::fmt::Debug for Array<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = match &self.0 {
            Storage::Owned(_) => "owned",
            Storage::Mapped(..) => "mapped",
        };
        write!(
            f,
            "Array<{}>[{}; {place}]",
            std::any::type_name::<T>(),
            self.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_values_are_read_in_place_and_checked_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [1u8, 0, 0, 0, 2, 0, 0, 0, 3]).unwrap();
        let file = Arc::new(MappedFile::open(&path).unwrap());
        assert_eq!(*Array::<u32>::mapped(&file, 0..8).unwrap(), [1, 2]);
        for bad in [0..9, 1..5, 8..12] {
            let e = Array::<u32>::mapped(&file, bad).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Malformed);
        }
        let reversed = Range { start: 8, end: 4 };
        assert!(Array::<u32>::mapped(&file, reversed).is_err());
    }
}

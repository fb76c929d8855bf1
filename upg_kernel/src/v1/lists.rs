//! Lists of numbers, which plain Python has in place of numpy arrays.
//!
//! Long ones stay in their file, as arrays do: a run of numbers is kept as its place in the pickle.
#![forbid(unsafe_code)]

use super::bytes::{Bytes, BytesReader, Files};
use super::objects::{Id, Object, Objects};
use crate::error::{Error, ErrorKind, Result};
use std::fmt;
use std::sync::Arc;

/// Number that an opcode pushes on the stack.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Number {
    Bool(bool),
    Int(i64),
    Float(f64),
}

impl Number {
    pub(super) fn has_opcode(opcode: u8) -> bool {
        matches!(opcode, b'J' | b'K' | b'M' | b'G' | 0x88..=0x8A)
    }

    /// Reads the number of `opcode`, whose bytes `fill` supplies.
    ///
    /// Errors: those of `fill`; `TooLarge` for more than 8 bytes;
    /// `Malformed` if the opcode has no number.
    pub(super) fn read(opcode: u8, mut fill: impl FnMut(&mut [u8]) -> Result<()>) -> Result<Self> {
        let mut bytes = [0; 8];
        let mut read = |len: usize| -> Result<[u8; 8]> {
            fill(&mut bytes[..len])?;
            Ok(bytes)
        };
        let first = |bytes: [u8; 8]| [bytes[0], bytes[1], bytes[2], bytes[3]];
        Ok(match opcode {
            0x88 | 0x89 => Self::Bool(opcode == 0x88),
            b'K' => Self::Int(read(1)?[0].into()),
            b'M' => Self::Int(u32::from_le_bytes(first(read(2)?)).into()),
            b'J' => Self::Int(i32::from_le_bytes(first(read(4)?)).into()),
            b'G' => Self::Float(f64::from_be_bytes(read(8)?)),
            0x8A => {
                let len = read(1)?[0];
                if len > 8 {
                    let message = format!("a number of {len} bytes");
                    return Err(Error::new(ErrorKind::TooLarge, message));
                }
                let bytes = read(len.into())?;
                // Sign extension.
                let unused = 64 - 8 * u32::from(len);
                let shifted = i64::from_le_bytes(bytes).checked_shl(unused);
                Self::Int(shifted.map_or(0, |n| n >> unused))
            }
            _ => return Err(changed()),
        })
    }
}

/// Consecutive numbers in the pickle, each with its opcode.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub bytes: Bytes,
    pub count: u64,
    pub has_floats: bool,
    pub has_bools: bool,
}

impl Run {
    /// Creates a run that starts at `start`.
    pub(super) fn new(start: u64) -> Self {
        let bytes = Bytes {
            file: 0,
            start,
            len: 0,
            latin1: false,
        };
        Self {
            bytes,
            count: 0,
            has_floats: false,
            has_bools: false,
        }
    }

    /// Adds a number that ends at `end`.
    pub(super) fn add(&mut self, number: Number, end: u64) {
        self.bytes.len = end - self.bytes.start;
        self.count += 1;
        self.has_floats |= matches!(number, Number::Float(_));
        self.has_bools |= matches!(number, Number::Bool(_));
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match (self.has_bools, self.has_floats) {
            (true, _) => "numbers and truth values",
            (false, true) => "numbers",
            (false, false) => "integers",
        };
        write!(f, "{} {kind}", self.count)
    }
}

/// List or tuple in place of an array: of numbers, of one list of them, or of lists of one
/// number each.
#[derive(Debug)]
pub(super) struct NumberList {
    items: Vec<Item>,
    len: u64,
    has_floats: bool,
    is_flat: bool,
    /// Short description of the list.
    described: String,
}

#[derive(Debug)]
enum Item {
    Int(i64),
    Float(f64),
    // Boxed, because a list may contain one number two million times.
    Run(Box<Run>),
}

impl NumberList {
    /// Reads the list or tuple `id`; `name` is for errors.
    ///
    /// Memory: 16 bytes per item. Errors (`Unsupported`): an item is not a number.
    pub(super) fn new(objects: &Objects, id: Id, name: &str) -> Result<Self> {
        let outer = objects.items(id).unwrap_or(&[]);
        let is_flat = outer.iter().all(|&item| objects.items(item).is_none());
        let mut list = Self {
            items: Vec::with_capacity(outer.len()),
            len: 0,
            has_floats: false,
            is_flat,
            described: objects.describe(id),
        };
        for &item in outer {
            let numbers = match (objects.items(item), outer.len()) {
                (Some(only), 1) => only,
                (Some(one @ [_]), _) => one,
                (Some(_), _) => return Err(list.odd(objects, item, name)),
                (None, _) if !is_flat => return Err(list.odd(objects, item, name)),
                (None, _) => std::slice::from_ref(&item),
            };
            for &number in numbers {
                if !list.push(objects.get(number)) {
                    return Err(list.odd(objects, number, name));
                }
            }
        }
        Ok(list)
    }

    /// Adds an object; returns `false` if it is not a number.
    fn push(&mut self, object: &Object) -> bool {
        let (item, count) = match object {
            Object::Int(n) => (Item::Int(*n), 1),
            Object::Float(n) => (Item::Float(*n), 1),
            Object::Run(run) if !run.has_bools => (Item::Run(run.clone()), run.count),
            _ => return false,
        };
        self.has_floats |= match &item {
            Item::Int(_) => false,
            Item::Float(_) => true,
            Item::Run(run) => run.has_floats,
        };
        self.items.push(item);
        self.len += count;
        true
    }

    fn odd(&self, objects: &Objects, item: Id, name: &str) -> Error {
        let found = objects.describe(item);
        let message = format!("'{name}' is {self} with {found} in it, expected numbers");
        Error::new(ErrorKind::Unsupported, message)
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Checks for a list of integers.
    ///
    /// Errors (`Shape`): a list of lists; (`Unsupported`): not only integers.
    pub(super) fn check_integers(&self, name: &str) -> Result<()> {
        let (kind, expected) = match (self.is_flat, self.has_floats) {
            (true, false) => return Ok(()),
            (true, true) => (
                ErrorKind::Unsupported,
                "with floats in it, expected integers",
            ),
            (false, _) => (ErrorKind::Shape, "with lists in it, expected one dimension"),
        };
        Err(Error::new(kind, format!("'{name}' is {self} {expected}")))
    }

    /// Returns all numbers, each rounded separately. Memory: 4 bytes each. Errors:
    /// those of reading.
    pub(super) fn floats(self: &Arc<Self>, files: &Files) -> Result<Vec<f32>> {
        let mut reader = ListReader::new(self, files);
        let rounded = |number| match number {
            Number::Int(n) => Ok(n as f32),
            Number::Float(n) => Ok(n as f32),
            Number::Bool(_) => Err(changed()),
        };
        (0..self.len).map(|_| rounded(reader.next()?)).collect()
    }
}

impl fmt::Display for NumberList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.described)
    }
}

/// Reader of the numbers of a list, from first to last.
pub(super) struct ListReader<'a> {
    files: &'a Files,
    list: Arc<NumberList>,
    /// Number of items begun.
    begun: usize,
    /// Current run, and the remaining count of its numbers.
    run: Option<(BytesReader<'a>, u64)>,
}

impl<'a> ListReader<'a> {
    pub(super) fn new(list: &Arc<NumberList>, files: &'a Files) -> Self {
        Self {
            files,
            list: Arc::clone(list),
            begun: 0,
            run: None,
        }
    }

    fn next(&mut self) -> Result<Number> {
        loop {
            if let Some((reader, left)) = &mut self.run
                && *left > 0
            {
                *left -= 1;
                let mut opcode = [0];
                reader.fill(&mut opcode)?;
                return Number::read(opcode[0], |out| reader.fill(out));
            }
            let item = self.list.items.get(self.begun).ok_or_else(changed)?;
            self.begun += 1;
            match item {
                Item::Int(n) => return Ok(Number::Int(*n)),
                Item::Float(n) => return Ok(Number::Float(*n)),
                Item::Run(run) => self.run = Some((self.files.reader(&run.bytes), run.count)),
            }
        }
    }

    /// Replaces the content of `out` by the next `n` numbers. Errors: those of reading.
    pub(super) fn take(&mut self, n: usize, out: &mut Vec<i64>) -> Result<()> {
        out.clear();
        for _ in 0..n {
            match self.next()? {
                Number::Int(n) => out.push(n),
                _ => return Err(changed()),
            }
        }
        Ok(())
    }
}

/// Returns the error for a number that differs from the one that was checked before.
fn changed() -> Error {
    let message = "a list was changed while it was read";
    Error::new(ErrorKind::Malformed, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Number> {
        let mut at = 1;
        Number::read(bytes[0], |out| {
            out.copy_from_slice(&bytes[at..at + out.len()]);
            at += out.len();
            Ok(())
        })
    }

    #[test]
    fn numbers_of_every_opcode() {
        for (bytes, expected) in [
            (&b"\x88"[..], Number::Bool(true)),
            (b"\x89", Number::Bool(false)),
            (b"K\xFF", Number::Int(255)),
            (b"M\xFE\xFF", Number::Int(65_534)),
            (b"J\xFE\xFF\xFF\xFF", Number::Int(-2)),
            (b"G\xBF\xE0\0\0\0\0\0\0", Number::Float(-0.5)),
            (b"\x8A\0", Number::Int(0)),
            (b"\x8A\x01\x80", Number::Int(-128)),
            (b"\x8A\x02\xFF\0", Number::Int(255)),
            (b"\x8A\x08\0\0\0\0\0\0\0\x80", Number::Int(i64::MIN)),
        ] {
            assert!(Number::has_opcode(bytes[0]));
            assert_eq!(read(bytes).unwrap(), expected, "{bytes:?}");
        }
        let e = read(b"\x8A\x09").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TooLarge);
        for other in (0..=255).filter(|&opcode| !Number::has_opcode(opcode)) {
            assert!(read(&[other]).is_err(), "{other}");
        }
    }
}

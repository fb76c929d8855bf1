//! numpy arrays of a pickle: their descriptions and numbers.
#![forbid(unsafe_code)]

use super::bytes::{Bytes, BytesReader, Files};
use super::objects::Object;
use crate::error::{Error, ErrorKind, Result};
use std::fmt;

/// Bytes of numbers that are read at once.
const CHUNK: usize = 1 << 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Int,
    Uint,
    Float,
    /// Boolean, only as a single number.
    Bool,
}

/// Data type of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Dtype {
    kind: Kind,
    size: usize,
    big_endian: bool,
}

impl Dtype {
    /// Parses numpy's code, for example `i4`; `None` except for integers and floats
    /// of 1 to 8 bytes.
    pub(super) fn parse(code: &str) -> Option<Self> {
        let (kind, size) = match code {
            "i1" => (Kind::Int, 1),
            "i2" => (Kind::Int, 2),
            "i4" => (Kind::Int, 4),
            "i8" => (Kind::Int, 8),
            "u1" => (Kind::Uint, 1),
            "u2" => (Kind::Uint, 2),
            "u4" => (Kind::Uint, 4),
            "u8" => (Kind::Uint, 8),
            "b1" => (Kind::Bool, 1),
            "f2" => (Kind::Float, 2),
            "f4" => (Kind::Float, 4),
            "f8" => (Kind::Float, 8),
            _ => return None,
        };
        Some(Self {
            kind,
            size,
            big_endian: false,
        })
    }

    /// Sets the byte order of numpy's sign; `None` for an unknown sign.
    pub(super) fn ordered(mut self, sign: &str) -> Option<Self> {
        self.big_endian = match sign {
            "<" | "=" | "|" => false,
            ">" => true,
            _ => return None,
        };
        Some(self)
    }

    pub(super) fn is_integer(self) -> bool {
        matches!(self.kind, Kind::Int | Kind::Uint)
    }

    /// Returns a number of `bytes`, which has the size of the type.
    fn little_endian(self, bytes: &[u8]) -> [u8; 8] {
        let mut out = [0; 8];
        out[..self.size].copy_from_slice(bytes);
        if self.big_endian {
            out[..self.size].reverse();
        }
        out
    }

    /// Appends integers; those above the largest i64 are clamped.
    fn integers(self, bytes: &[u8], out: &mut Vec<i64>) {
        // Fast paths for the usual types, which are most of a file.
        match (self.kind, self.size, self.big_endian) {
            (Kind::Int, 1, _) => out.extend(bytes.iter().map(|&b| i64::from(b as i8))),
            (Kind::Uint, 2, false) => {
                let numbers = bytes.as_chunks().0;
                out.extend(numbers.iter().map(|&b| i64::from(u16::from_le_bytes(b))));
            }
            (Kind::Int, 4, false) => {
                let numbers = bytes.as_chunks().0;
                out.extend(numbers.iter().map(|&b| i64::from(i32::from_le_bytes(b))));
            }
            _ => out.extend(bytes.chunks_exact(self.size).map(|b| self.integer(b))),
        }
    }

    fn integer(self, bytes: &[u8]) -> i64 {
        let bits = u64::from_le_bytes(self.little_endian(bytes));
        if self.kind != Kind::Int {
            return i64::try_from(bits).unwrap_or(i64::MAX);
        }
        // Sign extension.
        let unused = 64 - 8 * self.size as u32;
        (bits << unused) as i64 >> unused
    }

    /// Converts the number to the precision of the scales of a UPG file.
    fn float(self, bytes: &[u8]) -> f32 {
        let raw = self.little_endian(bytes);
        match (self.kind, self.size) {
            (Kind::Float, 2) => half::f16::from_le_bytes([raw[0], raw[1]]).to_f32(),
            (Kind::Float, 4) => f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]),
            (Kind::Float, _) => f64::from_le_bytes(raw) as f32,
            (Kind::Uint | Kind::Bool, _) => u64::from_le_bytes(raw) as f32,
            (Kind::Int, _) => self.integer(bytes) as f32,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Int => "int",
            Kind::Uint => "uint",
            Kind::Float => "float",
            Kind::Bool => return f.write_str("bool"),
        };
        write!(f, "{kind}{}", 8 * self.size)
    }
}

/// Array whose numbers are still in their file.
#[derive(Debug, Clone)]
pub(super) struct NdArray {
    pub dtype: Dtype,
    pub shape: Vec<u64>,
    pub bytes: Bytes,
}

impl NdArray {
    /// Creates an array.
    ///
    /// Errors (`Malformed`): the number of bytes does not match type and shape; (`Unsupported`): a
    /// column-major array in which more than one dimension differs from 1.
    pub(super) fn new(dtype: Dtype, shape: Vec<u64>, fortran: bool, bytes: Bytes) -> Result<Self> {
        let numbers = match shape.contains(&0) {
            true => Some(0),
            false => shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d)),
        };
        let asked = numbers.and_then(|n| n.checked_mul(dtype.size as u64));
        // Characters take one byte or two.
        let fits = asked.is_some_and(|asked| match bytes.latin1 {
            true => asked <= bytes.len && bytes.len <= asked.saturating_mul(2),
            false => asked == bytes.len,
        });
        if !fits {
            let message = format!("an array of {dtype} {shape:?} has {} bytes", bytes.len);
            return Err(Error::new(ErrorKind::Malformed, message));
        }
        if fortran && shape.iter().filter(|&&d| d != 1).count() > 1 {
            let message = format!("an array of {dtype} {shape:?} in the order of Fortran");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(Self {
            dtype,
            shape,
            bytes,
        })
    }

    /// Returns the number of elements.
    pub(super) fn len(&self) -> u64 {
        match self.shape.contains(&0) {
            true => 0,
            false => self.shape.iter().product(),
        }
    }

    /// Returns its only number as a Python object.
    pub(super) fn scalar(&self, files: &Files) -> Result<Object> {
        let mut bytes = vec![0; self.dtype.size];
        let mut reader = files.reader(&self.bytes);
        reader.fill(&mut bytes)?;
        reader.finish()?;
        let raw = self.dtype.little_endian(&bytes);
        Ok(match (self.dtype.kind, self.dtype.size) {
            (Kind::Float, 8) => Object::Float(f64::from_le_bytes(raw)),
            (Kind::Float, _) => Object::Float(self.dtype.float(&bytes).into()),
            (Kind::Bool, _) => Object::Bool(raw[0] != 0),
            (Kind::Uint | Kind::Int, _) => Object::Int(self.dtype.integer(&bytes)),
        })
    }

    /// Checks for one dimension of integers.
    ///
    /// Errors (`Shape`): not one dimension; (`Unsupported`): not integers.
    pub(super) fn check_integers(&self, name: &str) -> Result<()> {
        if !self.dtype.is_integer() {
            let message = format!("'{name}' is {self}, expected integers");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if self.shape.len() != 1 {
            let message = format!("'{name}' is {self}, expected one dimension");
            return Err(Error::new(ErrorKind::Shape, message));
        }
        Ok(())
    }

    /// Returns a reader of its integers.
    pub(super) fn integers<'a>(&self, files: &'a Files) -> ArrayReader<'a> {
        ArrayReader {
            reader: files.reader(&self.bytes),
            dtype: self.dtype,
            bytes: Vec::new(),
        }
    }

    /// Returns all numbers. Memory: 4 bytes each. Errors: those of reading.
    pub(super) fn floats(&self, files: &Files) -> Result<Vec<f32>> {
        if self.dtype.kind == Kind::Bool {
            let message = format!("{self}, expected numbers");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let (mut reader, size) = (files.reader(&self.bytes), self.dtype.size);
        let mut left = self.len() as usize;
        let mut out = Vec::with_capacity(left);
        let mut bytes = vec![0; CHUNK];
        while left > 0 {
            let n = left.min(CHUNK / size);
            reader.fill(&mut bytes[..n * size])?;
            let numbers = bytes[..n * size].chunks_exact(size);
            out.extend(numbers.map(|b| self.dtype.float(b)));
            left -= n;
        }
        reader.finish()?;
        Ok(out)
    }
}

impl fmt::Display for NdArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an array of {} {:?}", self.dtype, self.shape)
    }
}

/// Reader of the integers of an array, from first to last.
pub(super) struct ArrayReader<'a> {
    reader: BytesReader<'a>,
    dtype: Dtype,
    bytes: Vec<u8>,
}

impl ArrayReader<'_> {
    /// Replaces the content of `out` by the next `n` integers. Errors: those of reading.
    pub(super) fn take(&mut self, n: usize, out: &mut Vec<i64>) -> Result<()> {
        out.clear();
        self.bytes.resize(n * self.dtype.size, 0);
        self.reader.fill(&mut self.bytes)?;
        self.dtype.integers(&self.bytes, out);
        Ok(())
    }

    /// Checks that nothing is left. Errors (`Malformed`): there are more bytes.
    pub(super) fn finish(self) -> Result<()> {
        self.reader.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_type_in_both_orders() {
        for (code, bytes, expected) in [
            ("i1", &[0xFE][..], -2.0),
            ("u1", &[0xFE], 254.0),
            ("i2", &[0xFE, 0xFF], -2.0),
            ("u2", &[0x10, 0x27], 10_000.0),
            ("i4", &[0xFE, 0xFF, 0xFF, 0xFF], -2.0),
            ("u4", &[0, 0, 0, 0x80], 2_147_483_648.0),
            (
                "i8",
                &[0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF],
                -2.0,
            ),
            ("u8", &[1, 0, 0, 0, 0, 0, 0, 0], 1.0),
            ("f2", &[0, 0x38], 0.5),
            ("f4", &[0, 0, 0, 0x3F], 0.5),
            ("f8", &[0, 0, 0, 0, 0, 0, 0xE0, 0xBF], -0.5),
        ] {
            let little = Dtype::parse(code).unwrap();
            let big = little.ordered(">").unwrap();
            let reversed: Vec<u8> = bytes.iter().rev().copied().collect();
            for (dtype, bytes) in [(little, bytes), (big, &reversed)] {
                assert_eq!(f64::from(dtype.float(bytes)), expected, "{code}");
                if dtype.is_integer() {
                    let mut out = Vec::new();
                    dtype.integers(bytes, &mut out);
                    assert_eq!(out, [expected as i64], "{code}");
                }
            }
        }
        let mut out = Vec::new();
        Dtype::parse("u8").unwrap().integers(&[0xFF; 8], &mut out);
        assert_eq!(out, [i64::MAX]);
        for code in ["O8", "V4", "f16", "c8", "S1", ""] {
            assert_eq!(Dtype::parse(code), None, "{code}");
        }
    }
}

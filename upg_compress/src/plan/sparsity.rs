//! Matrices with so many zeros that it pays to store the others only.
#![forbid(unsafe_code)]

use crate::source::Source;
use std::fmt;
use std::str::FromStr;
use upg_kernel::format::Encoding;
use upg_kernel::matrix::BITMAP_GROUP;
use upg_kernel::{Error, ErrorKind, Result};

/// Rows whose zeros are counted, evenly spread over the matrix.
///
/// Reading all of a model twice would cost more than a choice that is a few percent off.
const SAMPLE_ROWS: usize = 64;

/// Least part of the bytes that sparse storage has to save.
///
/// Products with `s8` and `s4` take more time for each byte.
const WORTH: f64 = 0.1;

/// Storage of matrices with many zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Sparse {
    /// `s8` instead of `q8`, `s4` instead of `q4`, where that saves a tenth of the bytes.
    ///
    /// This is the case from about 23 % zeros on with `q8`, from 33 % on with `q4`.
    #[default]
    Auto,
    /// Encodings stay what they are.
    Never,
}

/// The names of the choices.
const NAMES: [(&str, Sparse); 2] = [("auto", Sparse::Auto), ("never", Sparse::Never)];

impl fmt::Display for Sparse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, sparse)| sparse == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl FromStr for Sparse {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = NAMES.iter().find(|(name, _)| *name == text);
        found.map(|(_, sparse)| *sparse).ok_or_else(|| {
            let message = format!("'{text}' is not known here");
            Error::new(ErrorKind::Argument, message).hint("choose auto or never")
        })
    }
}

/// The encoding that keeps zeros with as many bits for the other weights.
pub(crate) fn sparse_form(encoding: Encoding) -> Option<Encoding> {
    match encoding {
        Encoding::Q8 => Some(Encoding::S8),
        Encoding::Q4 => Some(Encoding::S4),
        _ => None,
    }
}

/// Returns the [`sparse_form`] of an `encoding` if tensor `index` has enough zeros for it.
///
/// `group` is the number of columns that share a prime in the dense form. Reads up to 64 rows.
/// Errors: those of the source.
pub(crate) fn sparse_if_smaller(
    source: &dyn Source,
    index: usize,
    encoding: Encoding,
    group: usize,
) -> Result<Option<Encoding>> {
    let Some(sparse) = sparse_form(encoding) else {
        return Ok(None);
    };
    let rows = source.tensors()[index].rows();
    let (mut zeros, mut weights) = (0, 0);
    for row in (0..rows).step_by(rows.div_ceil(SAMPLE_ROWS).max(1)) {
        let row = source.read_rows_f32(index, row..row + 1)?;
        zeros += row.iter().filter(|w| **w == 0.0).count();
        weights += row.len();
    }
    let kept = 1.0 - zeros as f64 / weights.max(1) as f64;
    let pays = sparse_bits(encoding, kept) <= (1.0 - WORTH) * dense_bits(encoding, group);
    Ok(pays.then_some(sparse))
}

/// Bits of a level.
fn level_bits(encoding: Encoding) -> f64 {
    if encoding == Encoding::Q8 { 8.0 } else { 4.0 }
}

/// Bits for each weight, with a prime for each group.
fn dense_bits(encoding: Encoding, group: usize) -> f64 {
    level_bits(encoding) + 8.0 / group as f64
}

/// Bits of each weight in the sparse form: one of the bitmap, and levels for the share that is not
/// zero.
///
/// The half bytes at the ends of words, at most 2 % of the whole, are not counted.
fn sparse_bits(encoding: Encoding, kept: f64) -> f64 {
    1.0 + 8.0 / BITMAP_GROUP as f64 + level_bits(encoding) * kept
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shares of zeros that the documentation states.
    #[test]
    fn a_tenth_is_saved_from_these_shares_of_zeros_on() {
        for (encoding, group, zeros) in [(Encoding::Q8, 64, 0.227), (Encoding::Q4, 32, 0.325)] {
            let dense = dense_bits(encoding, group);
            let saved = |zeros: f64| 1.0 - sparse_bits(encoding, 1.0 - zeros) / dense;
            assert!(saved(zeros - 0.01) < WORTH && saved(zeros + 0.01) > WORTH);
        }
    }

    #[test]
    fn choices_have_names() {
        for (name, sparse) in NAMES {
            assert_eq!(
                (sparse.to_string().as_str(), name.parse().unwrap()),
                (name, sparse)
            );
        }
        let e = "always".parse::<Sparse>().unwrap_err();
        assert!(e.to_string().contains("auto or never"), "{e}");
    }
}

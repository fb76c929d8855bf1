//! Sparse storage for matrices with many zeros.
#![forbid(unsafe_code)]

use crate::source::Source;
use std::fmt;
use std::str::FromStr;
use upg_kernel::matrix::BITMAP_GROUP;
use upg_kernel::{Error, ErrorKind, Result};

/// Rows sampled to count zeros, evenly spread over the matrix.
///
/// Reading the whole model twice would cost more than a choice that is a few percent off.
const SAMPLE_ROWS: usize = 64;

/// Minimum fraction of the bytes that sparse storage must save.
///
/// Products with `s8` and `s4` take more time per byte.
const WORTH: f64 = 0.1;

/// Storage of matrices with many zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Sparse {
    /// `s8` instead of `q8`, and `s4` instead of `q4`, where this saves a tenth of the bytes.
    ///
    /// This is the case from about 23 % zeros on with `q8`, and from 33 % on with `q4`.
    #[default]
    Auto,
    /// Encodings stay unchanged.
    Never,
}

/// Names of the choices.
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

/// Returns whether tensor `index` has enough zeros for the sparse form of its encoding.
///
/// `group` is the number of columns that share a prime in the dense form. Reads up to 64 rows.
/// Errors: those of the source.
pub(crate) fn pays(
    source: &dyn Source,
    index: usize,
    level_bits: f64,
    group: usize,
) -> Result<bool> {
    let rows = source.tensors()[index].rows();
    let (mut zeros, mut weights) = (0, 0);
    for row in (0..rows).step_by(rows.div_ceil(SAMPLE_ROWS).max(1)) {
        let row = source.read_rows_f32(index, row..row + 1)?;
        zeros += row.iter().filter(|w| **w == 0.0).count();
        weights += row.len();
    }
    let kept = 1.0 - zeros as f64 / weights.max(1) as f64;
    Ok(sparse_bits(level_bits, kept) <= (1.0 - WORTH) * dense_bits(level_bits, group))
}

/// Bits for each weight, with a prime for each group.
fn dense_bits(level_bits: f64, group: usize) -> f64 {
    level_bits + 8.0 / group as f64
}

/// Returns the bits per weight in the sparse form.
///
/// The half bytes at the ends of words, at most 2 % of the whole, are not counted.
fn sparse_bits(level_bits: f64, kept: f64) -> f64 {
    1.0 + 8.0 / BITMAP_GROUP as f64 + level_bits * kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::matrix::encoder;
    use upg_kernel::format::Encoding;

    /// Shares of zeros as documented.
    #[test]
    fn a_tenth_is_saved_from_these_shares_of_zeros_on() {
        for (encoding, group, zeros) in [(Encoding::Q8, 64, 0.227), (Encoding::Q4, 32, 0.325)] {
            let bits = encoder(encoding).sparse.unwrap().1;
            let dense = dense_bits(bits, group);
            let saved = |zeros: f64| 1.0 - sparse_bits(bits, 1.0 - zeros) / dense;
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

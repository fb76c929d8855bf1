//! Sparse storage for matrices with many zeros.
#![forbid(unsafe_code)]

use crate::encode::matrix::{encode_matrix, errors_of};
use crate::source::Source;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use upg_kernel::format::LayerInfo;
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
    /// This is the case from about 23 % zeros on with `q8`, and from 33 % on with `q4`. Matrices
    /// with a row that an outlier would ruin in sparse form stay dense.
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

/// Most rows whose errors decide between the dense and the sparse form: evenly spread ones, and as
/// many with the largest outliers.
const CHECKED_ROWS: usize = 32;

/// Squared error of a row in sparse form, in parts of that in dense form, above which its outliers
/// ruin it.
///
/// Every stored weight has a level that is not zero, so an outlier that makes the scale of the row
/// large makes its small weights large too. The two errors of other rows differ by less than a
/// half.
const RUINED: f64 = 4.0;

/// Returns whether the sparse form of the encoding of tensor `index` is better than the dense one.
///
/// It saves [`WORTH`] of the bytes, and it ruins no row. Reads 64 rows; if they have enough zeros
/// also the whole matrix, and encodes up to 64 rows twice. Errors: those of the source, and of the
/// encoders.
pub(crate) fn pays(
    source: &dyn Source,
    index: usize,
    (dense, sparse): (&LayerInfo, &LayerInfo),
    level_bits: f64,
) -> Result<bool> {
    let rows = dense.rows;
    let (mut zeros, mut weights) = (0, 0);
    for row in (0..rows).step_by(rows.div_ceil(SAMPLE_ROWS).max(1)) {
        let row = source.read_rows_f32(index, row..row + 1)?;
        zeros += row.iter().filter(|w| **w == 0.0).count();
        weights += row.len();
    }
    let kept = 1.0 - zeros as f64 / weights.max(1) as f64;
    let group = dense.group.unwrap_or(BITMAP_GROUP);
    if sparse_bits(level_bits, kept) > (1.0 - WORTH) * dense_bits(level_bits, group) {
        return Ok(false);
    }
    let checked = checked_rows(source, index, dense)?;
    let mut values = Vec::with_capacity(checked.len() * dense.cols);
    for row in checked {
        values.extend(source.read_rows_f32(index, row..row + 1)?);
    }
    let errors = |layer| squared_errors(&values, layer).map_err(|e| e.tensor(&dense.name));
    Ok(!is_any_ruined(&errors(dense)?, &errors(sparse)?))
}

/// Returns up to [`CHECKED_ROWS`] rows with the largest outliers and as many others, in order.
fn checked_rows(source: &dyn Source, index: usize, layer: &LayerInfo) -> Result<BTreeSet<usize>> {
    let mut peaks = Vec::with_capacity(layer.rows);
    for first in (0..layer.rows).step_by(SAMPLE_ROWS) {
        let end = layer.rows.min(first + SAMPLE_ROWS);
        let values = source.read_rows_f32(index, first..end)?;
        let rows = values.chunks_exact(layer.cols.max(1));
        peaks.extend(rows.zip(first..).map(|(row, number)| (peak(row), number)));
    }
    // In the order of the rows where peaks are equal.
    peaks.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let spread = (0..layer.rows).step_by(layer.rows.div_ceil(CHECKED_ROWS).max(1));
    let largest = peaks.into_iter().take(CHECKED_ROWS).map(|(_, row)| row);
    Ok(largest.chain(spread).collect())
}

/// Returns the largest magnitude of a row in parts of the mean one of its weights other than zero.
fn peak(row: &[f32]) -> f64 {
    let nonzero = || row.iter().map(|w| f64::from(w.abs())).filter(|w| *w > 0.0);
    let sum: f64 = nonzero().sum();
    match sum > 0.0 {
        true => nonzero().fold(0.0, f64::max) * nonzero().count() as f64 / sum,
        false => 0.0,
    }
}

/// Returns the squared error of each row of `values`, encoded like those of `layer`.
fn squared_errors(values: &[f32], layer: &LayerInfo) -> Result<Vec<f64>> {
    let mut sample = layer.clone();
    sample.rows = values.len() / layer.cols.max(1);
    let matrix = encode_matrix(values, &sample, 0, None, &())?;
    let errors = errors_of(values, &matrix)?;
    let squares = |row: &[f32]| row.iter().map(|e| f64::from(*e).powi(2)).sum();
    Ok(errors
        .chunks_exact(layer.cols.max(1))
        .map(squares)
        .collect())
}

/// Returns whether a row has a far larger error in sparse form, also than other rows in dense form.
fn is_any_ruined(dense: &[f64], sparse: &[f64]) -> bool {
    let mean = dense.iter().sum::<f64>() / dense.len().max(1) as f64;
    let mut rows = dense.iter().zip(sparse);
    rows.any(|(dense, sparse)| *sparse > RUINED * dense.max(mean))
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

//! The encoders of `q8` and `q4`: a level for every weight, a prime for every group of columns.
#![forbid(unsafe_code)]

use super::encoder::{DefaultEmbedding, Encoder, by_strip, cycled};
use super::rounding::levels::{Codebook, Linear8};
use super::rounding::row::EncodedRow;
use super::rounding::{encode, fit_codebook, levels, primes, scales};
use crate::sensitivity::curvature::Curvature;
use rayon::prelude::*;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, count, nibble, position};
use upg_kernel::matrix::{GroupedMatrix, Levels};
use upg_kernel::{Error, ErrorKind, Matrix, Result};

pub(super) const Q8: Encoder = Encoder {
    encoding: Encoding::Q8,
    describe: |layer, group| layer.group = group.or(Some(64)),
    encode: |weights, layer, _, curvature, progress| {
        let group = group_of(layer)?;
        let matrix = round_q8(weights, layer.rows, layer.cols, group, curvature)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::Grouped(matrix))
    },
    repeat,
    scratch_bytes: |weights, _| weights,
    is_calibrated: true,
    takes_group: true,
    stores_zeros: false,
    sparse: Some((Encoding::S8, 8.0)),
    by_row: true,
    embedding: DefaultEmbedding::Q8,
};

pub(super) const Q4: Encoder = Encoder {
    encoding: Encoding::Q4,
    describe: |layer, group| layer.group = group.or(Some(32)),
    encode: |weights, layer, _, curvature, progress| {
        let group = group_of(layer)?;
        let matrix = round_q4(weights, layer.rows, layer.cols, group, curvature)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::Grouped(matrix))
    },
    sparse: Some((Encoding::S4, 4.0)),
    ..Q8
};

fn repeat(strip: &Matrix, rows: usize) -> Result<Option<Matrix>> {
    let Matrix::Grouped(m) = strip else {
        return Ok(None);
    };
    let levels = match m.levels() {
        Levels::Bytes(values) => Levels::Bytes(by_strip(values, TILE_COLS, rows)),
        Levels::Nibbles { codes, codebook } => Levels::Nibbles {
            codes: by_strip(codes, TILE_COLS, rows),
            codebook: codebook.clone(),
        },
    };
    let primes = by_strip(m.prime_indices(), 1, rows);
    let scales = cycled(m.scales(), rows).into();
    let matrix = GroupedMatrix::new(rows, strip.cols(), m.group(), levels, primes, scales)?;
    Ok(Some(Matrix::Grouped(matrix)))
}

/// Rounds a matrix `[rows, cols]` to `q8` with groups of `group` columns.
///
/// Cost: an error evaluation for each prime in the range that the largest weight of a group
/// leaves, 115 for the group with the largest weight of its row. With a `curvature` also `rows *
/// cols^2 / 2` multiplications, and what
/// [`Feedback::new`](crate::sensitivity::hessian::Feedback::new) takes. Errors: `Shape` for a
/// wrong length or the curvature of another matrix, `Invalid` for a weight that is not finite,
/// `Argument` for a group other than 32 or 64; those of `Feedback::new`.
pub fn round_q8(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
) -> Result<GroupedMatrix> {
    check_group(group)?;
    let encoded = encode(weights, rows, cols, group, curvature, false, &Linear8)?;
    pack(&encoded, cols, group, None)
}

/// Rounds a matrix to `q4`: fits a codebook to a sample of its rows, then proceeds as [`round_q8`].
///
/// Cost and errors: as [`round_q8`].
pub fn round_q4(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
) -> Result<GroupedMatrix> {
    check_group(group)?;
    let start = Codebook::gaussian();
    let codebook = fit_codebook(weights, rows, cols, group, false, start)?;
    let encoded = encode(weights, rows, cols, group, curvature, false, &codebook)?;
    pack(&encoded, cols, group, Some(&codebook))
}

/// Returns the columns of a group. Errors (`Argument`): the description has none.
fn group_of(layer: &LayerInfo) -> Result<usize> {
    layer.group.ok_or_else(|| {
        let message = "a description without 'group', expected 32 or 64 columns";
        Error::new(ErrorKind::Argument, message)
    })
}

/// Errors (`Argument`): a group of other than 32 or 64 columns.
fn check_group(group: usize) -> Result<()> {
    if matches!(group, 32 | 64) {
        return Ok(());
    }
    let message = format!("group of {group} columns, expected 32 or 64");
    Err(Error::new(ErrorKind::Argument, message))
}

/// Packs whole rows of levels, or of codes into a codebook, into strips.
fn pack(
    encoded: &[EncodedRow],
    cols: usize,
    group: usize,
    codebook: Option<&Codebook>,
) -> Result<GroupedMatrix> {
    let groups = cols.div_ceil(group);
    let len = groups * group * STRIP_ROWS / if codebook.is_some() { 2 } else { 1 };
    let mut codes = vec![0; count(encoded.len()) * len];
    let strips = codes.par_chunks_exact_mut(len.max(1));
    strips
        .zip(encoded.par_chunks(STRIP_ROWS))
        .for_each(|(strip, encoded)| {
            for (row, encoded) in encoded.iter().enumerate() {
                for (col, &code) in encoded.codes.iter().enumerate() {
                    let (byte, shift) = match codebook {
                        None => (position(row, col), 0),
                        Some(_) => nibble(row, col),
                    };
                    strip[byte] |= code << shift;
                }
            }
        });
    let (levels, primes) = (levels(codes, codebook), primes(encoded, groups).into());
    GroupedMatrix::new(
        encoded.len(),
        cols,
        group,
        levels,
        primes,
        scales(encoded).into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_other_sizes_are_refused() {
        for group in [0, 1, 48, usize::MAX] {
            for round in [round_q8, round_q4] {
                let error = round(&[1.0; 64], 1, 64, group, None).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Argument, "{error}");
            }
        }
    }
}

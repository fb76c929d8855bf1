//! Rounding to `q8 q4 s8 s4`: a prime for each group and a level for each weight, by squared error.
//!
//! With a curvature the levels are chosen again, to keep the outputs rather than the weights.
#![forbid(unsafe_code)]

mod feedback;
pub(super) mod levels;
pub(super) mod row;

use crate::sensitivity::curvature::Curvature;
use levels::{Codebook, LevelSet};
use rayon::prelude::*;
use row::{EncodedRow, encode_row, products, row_error};
use upg_kernel::matrix::Levels;
use upg_kernel::matrix::strips::{STRIP_ROWS, count};
use upg_kernel::{Error, ErrorKind, Result};

/// Rows that a codebook is fitted to.
const SAMPLE_ROWS: usize = 128;

/// Rounds of codebook fitting.
const FIT_ROUNDS: usize = 4;

/// Encodes the rows of a matrix, all weights or those that are not zero.
///
/// With a curvature the codes are then chosen again.
pub(super) fn encode<L: LevelSet>(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
    skip_zeros: bool,
    levels: &L,
) -> Result<Vec<EncodedRow>> {
    check(weights, rows, cols)?;
    let of_row = |row: usize| {
        let groups = groups_of(&weights[row * cols..(row + 1) * cols], group, skip_zeros);
        encode_row(&groups, levels)
    };
    let mut encoded: Vec<EncodedRow> = (0..rows).into_par_iter().map(of_row).collect();
    if let Some(curvature) = curvature {
        feedback::choose_again(
            weights,
            cols,
            group,
            skip_zeros,
            levels,
            curvature,
            &mut encoded,
        )?;
    }
    Ok(encoded)
}

/// Returns the weights of each group that are stored.
fn groups_of(row: &[f32], group: usize, skip_zeros: bool) -> Vec<Vec<f32>> {
    let stored = |w: &f32| !skip_zeros || *w != 0.0;
    row.chunks(group)
        .map(|g| g.iter().copied().filter(stored).collect())
        .collect()
}

/// Fits a codebook to a sample of the rows by Lloyd's iteration from `start`.
///
/// Returns `start` unless the fitted one is better there.
pub(super) fn fit_codebook(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    skip_zeros: bool,
    start: Codebook,
) -> Result<Codebook> {
    check(weights, rows, cols)?;
    let stride = rows.div_ceil(SAMPLE_ROWS).max(1);
    let sample: Vec<Vec<Vec<f32>>> = (0..rows)
        .step_by(stride)
        .map(|row| groups_of(&weights[row * cols..(row + 1) * cols], group, skip_zeros))
        .collect();
    let mut best = (f64::INFINITY, start.clone());
    let mut codebook = start;
    for _ in 0..FIT_ROUNDS {
        let encoded: Vec<EncodedRow> = sample
            .par_iter()
            .map(|row| encode_row(row, &codebook))
            .collect();
        let error: f64 = sample
            .iter()
            .zip(&encoded)
            .map(|(g, r)| row_error(g, r, &codebook))
            .sum();
        if error < best.0 {
            best = (error, codebook.clone());
        }
        let mut sums = [(0.0f64, 0.0f64); 16];
        for (groups, row) in sample.iter().zip(&encoded) {
            let stored = products(groups, row, &codebook).zip(&row.codes);
            for ((w, product), &code) in stored {
                let level = f64::from(codebook.level(code));
                if level != 0.0 {
                    let step = f64::from(row.scale) * product / level;
                    sums[usize::from(code)].0 += f64::from(w) * step;
                    sums[usize::from(code)].1 += step * step;
                }
            }
        }
        codebook = codebook.moved_to(&sums);
    }
    Ok(best.1)
}

fn check(weights: &[f32], rows: usize, cols: usize) -> Result<()> {
    if rows.checked_mul(cols) != Some(weights.len()) {
        let message = format!("{} weights for a matrix [{rows}, {cols}]", weights.len());
        return Err(Error::new(ErrorKind::Shape, message));
    }
    match weights.par_iter().position_first(|w| !w.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "the weight in row {}, column {} is {}",
                i / cols,
                i % cols,
                weights[i]
            ),
        )),
    }
}

/// Returns the arrays of packed levels, or of packed codes into a codebook.
pub(super) fn levels(codes: Vec<u8>, codebook: Option<&Codebook>) -> Levels {
    match codebook {
        None => Levels::Bytes(bytemuck::cast_vec(codes).into()),
        Some(codebook) => Levels::Nibbles {
            codes: codes.into(),
            codebook: codebook.levels().to_vec().into(),
        },
    }
}

/// Returns the prime indices of rows, `[strips, groups, 64]`.
pub(super) fn primes(encoded: &[EncodedRow], groups: usize) -> Vec<u8> {
    let mut out = vec![0; count(encoded.len()) * groups * STRIP_ROWS];
    let strips = out.chunks_exact_mut((groups * STRIP_ROWS).max(1));
    for (out, encoded) in strips.zip(encoded.chunks(STRIP_ROWS)) {
        for (row, encoded) in encoded.iter().enumerate() {
            for (group, &prime) in encoded.primes.iter().enumerate() {
                out[group * STRIP_ROWS + row] = prime;
            }
        }
    }
    out
}

/// Returns the scales of rows.
pub(super) fn scales(encoded: &[EncodedRow]) -> Vec<f32> {
    encoded.iter().map(|row| row.scale).collect()
}

//! Rounding to `q8 q4 s8 s4`: a prime for each group and a level for each weight, by squared error.
//!
//! With a curvature the levels are chosen again, to keep the outputs rather than the weights.
#![forbid(unsafe_code)]

mod feedback;
mod levels;
mod packing;
mod row;

use crate::sensitivity::curvature::Curvature;
use levels::{Codebook, Kept8, LevelSet, Linear8};
use rayon::prelude::*;
use row::{EncodedRow, encode_row, products, row_error};
use upg_kernel::matrix::strips::{STRIP_ROWS, nibble, position};
use upg_kernel::matrix::{BITMAP_GROUP, BitmapMatrix, GroupedMatrix, Levels};
use upg_kernel::{Error, ErrorKind, Result};

/// Rows that a codebook is fitted to.
const SAMPLE_ROWS: usize = 128;

/// Rounds of codebook fitting.
const FIT_ROUNDS: usize = 4;

/// Rounds a matrix `[rows, cols]` to `q8` with groups of `group` columns.
///
/// Cost: an error evaluation for each prime in the range that the largest weight of a group
/// leaves, 115 for the group with the largest weight of its row. With a `curvature` also `rows *
/// cols^2 / 2` multiplications, and what
/// [`Feedback::new`](crate::sensitivity::hessian::Feedback::new) takes. Errors: `Shape` for a
/// wrong length or the curvature of another matrix, `Invalid` for a weight that is not finite;
/// those of `Feedback::new`.
pub fn round_q8(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
) -> Result<GroupedMatrix> {
    let encoded = encode(weights, rows, cols, group, curvature, false, &Linear8)?;
    let strip = cols.div_ceil(group) * group * STRIP_ROWS;
    let values = packing::pack_all(&encoded, strip, |strip: &mut [i8], row, col, code| {
        strip[position(row, col)] = Linear8.level(code);
    });
    packing::grouped(&encoded, cols, group, Levels::Bytes(values.into()))
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
    let start = Codebook::gaussian();
    let codebook = fit_codebook(weights, rows, cols, group, false, start)?;
    let encoded = encode(weights, rows, cols, group, curvature, false, &codebook)?;
    let strip = cols.div_ceil(group) * group * STRIP_ROWS / 2;
    let codes = packing::pack_all(&encoded, strip, |strip: &mut [u8], row, col, code| {
        let (byte, shift) = nibble(row, col);
        strip[byte] |= code << shift;
    });
    let levels = Levels::Nibbles {
        codes: codes.into(),
        codebook: codebook.levels().to_vec().into(),
    };
    packing::grouped(&encoded, cols, group, levels)
}

/// Rounds the weights that are not zero to `s8`.
///
/// Their levels are not zero either: exactly the zeros of `weights` stay zero. With a `curvature`
/// levels are chosen again, the zeros stay. Cost and errors as [`round_q8`], and `TooLarge` from 4
/// GiB of codes on.
pub fn round_s8(
    weights: &[f32],
    rows: usize,
    cols: usize,
    curvature: Option<&Curvature>,
) -> Result<BitmapMatrix> {
    let encoded = encode(weights, rows, cols, BITMAP_GROUP, curvature, true, &Kept8)?;
    let pack = |codes: &[u8], out: &mut Vec<i8>| {
        out.extend(codes.iter().map(|&code| Kept8.level(code)));
    };
    let levels = |values: Vec<i8>| Levels::Bytes(values.into());
    packing::bitmap(weights, &encoded, cols, pack, levels)
}

/// Rounds the weights that are not zero to `s4`, with a codebook without a zero.
///
/// Otherwise as [`round_s8`].
pub fn round_s4(
    weights: &[f32],
    rows: usize,
    cols: usize,
    curvature: Option<&Curvature>,
) -> Result<BitmapMatrix> {
    let start = Codebook::without_zero();
    let codebook = fit_codebook(weights, rows, cols, BITMAP_GROUP, true, start)?;
    let encoded = encode(
        weights,
        rows,
        cols,
        BITMAP_GROUP,
        curvature,
        true,
        &codebook,
    )?;
    let pack = |codes: &[u8], out: &mut Vec<u8>| {
        let pairs = codes.chunks(2);
        out.extend(pairs.map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4));
    };
    let levels = |codes: Vec<u8>| Levels::Nibbles {
        codes: codes.into(),
        codebook: codebook.levels().to_vec().into(),
    };
    packing::bitmap(weights, &encoded, cols, pack, levels)
}

/// Encodes the rows of a matrix, all weights or those that are not zero.
///
/// With a curvature the codes are then chosen again.
fn encode<L: LevelSet>(
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
fn fit_codebook(
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

//! Rounding to the plain encodings: errors on Gaussian weights, exact zeros, ragged sizes.

use crate::common::{gaussian, relative_error};
use upg_compress::encode::{round_q4, round_q8, round_s4, round_s8};
use upg_kernel::Matrix;
use upg_kernel::matrix::Levels;
use upg_kernel::sparse::MdCSRMatrix;

/// Maximum relative Frobenius errors on Gaussian weights.
///
/// Measured: 0.0058, 0.0830, 0.0058, 0.0862, 0.000002.
const Q8: f64 = 0.0065;
const Q4: f64 = 0.087;
const S8: f64 = 0.0065;
const S4: f64 = 0.092;
const MDCSR: f64 = 0.00001;

/// Returns Gaussian values in which every `step`-th is 0.
fn with_zeros(n: usize, seed: u64, step: usize) -> Vec<f32> {
    let mut values = gaussian(n, seed);
    values.iter_mut().step_by(step).for_each(|w| *w = 0.0);
    values
}

/// Returns every encoding of this file, with its maximum error.
fn round_all(w: &[f32], rows: usize, cols: usize) -> Vec<(&'static str, Matrix, f64)> {
    vec![
        (
            "q8",
            Matrix::Grouped(round_q8(w, rows, cols, 64, None).unwrap()),
            Q8,
        ),
        (
            "q4",
            Matrix::Grouped(round_q4(w, rows, cols, 32, None).unwrap()),
            Q4,
        ),
        (
            "s8",
            Matrix::Bitmap(round_s8(w, rows, cols, None).unwrap()),
            S8,
        ),
        (
            "s4",
            Matrix::Bitmap(round_s4(w, rows, cols, None).unwrap()),
            S4,
        ),
        (
            "mdcsr",
            Matrix::MdCsr(MdCSRMatrix::from_dense(w, rows, cols).unwrap()),
            MDCSR,
        ),
    ]
}

#[test]
fn errors_on_gaussian_weights() {
    let (rows, cols) = (96, 1024);
    let w = with_zeros(rows * cols, 1, 3);
    for (name, matrix, limit) in round_all(&w, rows, cols) {
        let error = relative_error(&matrix.to_dense(), &w);
        println!("{name}: relative error {error:.7}");
        assert!(error < limit, "{name}: {error}");
    }
}

#[test]
fn ragged_sizes_round_and_multiply_like_their_dense_form() {
    for (rows, cols) in [
        (1, 1),
        (3, 31),
        (2, 33),
        (65, 63),
        (5, 64),
        (64, 65),
        (2, 700),
    ] {
        let w = with_zeros(rows * cols, (rows * 1000 + cols) as u64, 2);
        let x = gaussian(3 * cols, 9);
        let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (name, matrix, _) in round_all(&w, rows, cols) {
            let dense = matrix.to_dense();
            let product = matrix.spmm(&x, 3).unwrap();
            for (i, y) in product.iter().enumerate() {
                let (vector, row) = (i / rows, i % rows);
                let weights = &dense[row * cols..(row + 1) * cols];
                let vector = &x[vector * cols..(vector + 1) * cols];
                let expected: f32 = weights.iter().zip(vector).map(|(w, x)| w * x).sum();
                // Integer kernels round activations to half a step of 1/8,127 of the largest.
                let weight: f32 = weights.iter().map(|w| w.abs()).sum();
                let bound = weight * largest / 16_254.0 + 1e-5 * (1.0 + expected.abs());
                assert!((y - expected).abs() <= bound, "{name} {rows}x{cols}");
            }
            let mut one = vec![f32::NAN; cols];
            matrix.rows_into(rows - 1, &mut one).unwrap();
            assert_eq!(one, dense[(rows - 1) * cols..], "{name} {rows}x{cols}");
        }
    }
}

/// Padding of a strip is all zero bytes, so that files depend only on the weights.
#[test]
fn what_fills_up_a_strip_is_zeros() {
    let (rows, cols) = (65, 69);
    let w = gaussian(rows * cols, 8);
    // Returns whether prime index `i` has a row, with `strip` of them per strip.
    let has_row = |i: usize, strip: usize| i / strip * 64 + i % 64 < rows;
    for (group, is_q8) in [(32, true), (64, true), (32, false), (64, false)] {
        let round = if is_q8 { round_q8 } else { round_q4 };
        let m = round(&w, rows, cols, group, None).unwrap();
        let groups = cols.div_ceil(group);
        let strip = 64 * groups * group;
        let levels: Vec<u8> = match m.levels() {
            Levels::Bytes(values) => values.iter().map(|&v| v as u8).collect(),
            // Two tiles share their bytes: the first has the low halves.
            Levels::Nibbles { codes, .. } => {
                let pairs = codes.chunks_exact(256);
                let tiles = pairs.flat_map(|pair| [pair, pair]).enumerate();
                tiles
                    .flat_map(|(i, tile)| tile.iter().map(move |b| b >> (i % 2 * 4) & 15))
                    .collect()
            }
        };
        assert_eq!(levels.len(), 2 * strip);
        for (i, &level) in levels.iter().enumerate() {
            let n = i % strip;
            let (row, col) = (i / strip * 64 + n % 256 / 4, n / 256 * 4 + n % 4);
            assert!(level == 0 || (row < rows && col < cols), "{row}, {col}");
        }
        for (i, &prime) in m.prime_indices().iter().enumerate() {
            assert!(prime == 0 || has_row(i, groups * 64), "{i}");
        }
    }
    for m in [
        round_s8(&w, rows, cols, None),
        round_s4(&w, rows, cols, None),
    ] {
        let m = m.unwrap();
        let arrays = m.arrays();
        for (i, &prime) in arrays.prime_indices.iter().enumerate() {
            assert!(prime == 0 || has_row(i, 128), "{i}");
        }
        let Levels::Nibbles { codes, .. } = &arrays.levels else {
            continue;
        };
        // One word has one weight, that of the last row and column, so half of its byte is unused.
        let (mut at, mut halves) = (0, 0);
        for word in arrays.bitmap.chunks_exact(8) {
            let kept: u32 = word.iter().map(|byte| byte.count_ones()).sum();
            at += kept.div_ceil(2) as usize;
            halves += kept % 2;
            assert!(kept.is_multiple_of(2) || codes[at - 1] < 16);
        }
        assert_eq!((at, halves), (codes.len(), 1));
    }
}

#[test]
fn zeros_stay_exactly_zero_and_zero_matrices_work() {
    let (rows, cols) = (7, 130);
    let w = with_zeros(rows * cols, 5, 2);
    for (name, matrix, _) in round_all(&w, rows, cols) {
        let sparse = matches!(name, "s8" | "s4" | "mdcsr");
        for (&original, &decoded) in w.iter().zip(&matrix.to_dense()) {
            assert!(original != 0.0 || !sparse || decoded == 0.0, "{name}");
        }
    }
    for (name, matrix, _) in round_all(&vec![0.0; rows * cols], rows, cols) {
        assert!(matrix.to_dense().iter().all(|&w| w == 0.0), "{name}");
    }
}

#[test]
fn extreme_scales_neither_overflow_nor_vanish() {
    let (rows, cols) = (4, 64);
    for exponent in [-30, 0, 20] {
        let factor = 10f32.powi(exponent);
        let w: Vec<f32> = gaussian(rows * cols, 6)
            .iter()
            .map(|w| w * factor)
            .collect();
        for (name, matrix, limit) in round_all(&w, rows, cols) {
            let error = relative_error(&matrix.to_dense(), &w);
            assert!(error < 1.3 * limit, "{name} at 1e{exponent}: {error}");
        }
    }
}

#[test]
fn weights_that_are_not_numbers_are_refused_with_their_place() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut w = vec![1.0; 12];
        w[7] = bad;
        let e = round_q4(&w, 3, 4, 32, None).unwrap_err();
        assert!(e.to_string().contains("row 1, column 3"), "{e}");
        assert!(MdCSRMatrix::from_dense(&w, 3, 4).is_err());
    }
    assert!(round_q8(&[1.0; 5], 2, 3, 64, None).is_err());
}

#[test]
fn wide_gaps_are_bridged() {
    let cols = 1200;
    let mut w = vec![0.0; 2 * cols];
    for column in [0, 255, 511, 766, 1199] {
        w[column] = 0.5;
        w[2 * cols - 1] = -1.0;
    }
    let matrix = MdCSRMatrix::from_dense(&w, 2, cols).unwrap();
    // Row 0: gaps 0, 255, 256 (one bridge), 255, 433 (one); row 1: 1199 = 4 bridges and 179.
    assert_eq!(matrix.nnz(), 5 + 2 + 1 + 4);
    assert!(relative_error(&matrix.to_dense(), &w) < 1e-6);
    let x: Vec<f32> = (0..cols).map(|c| (c % 7) as f32).collect();
    let (sparse, dense) = (
        matrix.spmv(&x).unwrap(),
        Matrix::MdCsr(matrix).spmv(&x).unwrap(),
    );
    assert!(sparse.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-4));
    let csr = MdCSRMatrix::from_csr(2, 5, &[0, 2, 3], &[1, 4, 0], &[1.5, -2.0, 3.0]).unwrap();
    let dense = csr.to_dense();
    let expected = [0.0, 1.5, 0.0, 0.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0];
    assert!(
        dense
            .iter()
            .zip(expected)
            .all(|(a, b)| (a - b).abs() < 1e-5)
    );
    for (indptr, indices) in [
        ([0, 2, 2], [4, 1]),
        ([0, 2, 2], [1, 5]),
        ([0, 3, 2], [1, 2]),
    ] {
        assert!(MdCSRMatrix::from_csr(2, 5, &indptr, &indices, &[1.0, 2.0]).is_err());
    }
}

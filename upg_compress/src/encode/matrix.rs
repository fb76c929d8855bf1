//! Encoding of one matrix as its description says, and measures of its error.
#![forbid(unsafe_code)]

use super::rounding::{round_q4, round_q8, round_s4, round_s8};
use super::trellis;
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use rayon::prelude::*;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::sparse::MdCSRMatrix;
use upg_kernel::{Error, ErrorKind, Matrix, Result};

/// An encoded matrix, with what is reported of it.
pub(crate) struct Encoded {
    pub matrix: Matrix,
    pub output_error: Option<f64>,
    pub divergence: Option<f64>,
    pub seconds: f64,
}

/// Encodes `weights [rows, cols]`, row by row, as `layer` says.
///
/// `progress` advances by all of the weights. Errors: those of the encoders; `Interrupted`.
pub fn encode_matrix(
    weights: &[f32],
    layer: &LayerInfo,
    seed: u64,
    curvature: Option<&Curvature>,
    progress: &dyn Progress,
) -> Result<Matrix> {
    let (rows, cols) = (layer.rows, layer.cols);
    let group = layer.group.unwrap_or(64);
    let encoding = layer.encoding()?;
    if let Some(k) = encoding.trellis_bits() {
        let matrix = trellis::encode_with(weights, rows, cols, k, seed, curvature, progress)?;
        return Ok(Matrix::Trellis(matrix));
    }
    let matrix = match encoding {
        Encoding::MdCsr => Matrix::MdCsr(MdCSRMatrix::from_dense(weights, rows, cols)?),
        Encoding::Q8 => Matrix::Grouped(round_q8(weights, rows, cols, group, curvature)?),
        Encoding::Q4 => Matrix::Grouped(round_q4(weights, rows, cols, group, curvature)?),
        Encoding::S8 => Matrix::Bitmap(round_s8(weights, rows, cols, curvature)?),
        Encoding::S4 => Matrix::Bitmap(round_s4(weights, rows, cols, curvature)?),
        other => {
            let message = format!("no encoder for '{other}'");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    progress.advance(weights.len() as u64);
    Ok(matrix)
}

/// Returns `|decoded - original| / |original|` in the Frobenius norm, to six digits.
///
/// 0 for a zero matrix. Errors: those of the matrix.
pub fn relative_error(original: &[f32], matrix: &Matrix) -> Result<f64> {
    let cols = matrix.cols();
    // One pair of sums a row, added in order: the same for any number of threads.
    let rows: Vec<(f64, f64)> = original
        .par_chunks_exact(cols.max(1))
        .enumerate()
        .map_init(
            || vec![0.0; cols],
            |decoded, (row, original)| {
                matrix.rows_into(row, decoded)?;
                let pairs = original.iter().zip(decoded.iter());
                Ok(pairs.fold((0.0, 0.0), |(error, norm), (&a, &b)| {
                    let (a, b) = (f64::from(a), f64::from(b));
                    (error + (a - b) * (a - b), norm + a * a)
                }))
            },
        )
        .collect::<Result<_>>()?;
    let (error, norm) = rows.iter().fold((0.0, 0.0), |s, r| (s.0 + r.0, s.1 + r.1));
    Ok(to_six_digits(error, norm))
}

/// Returns `decoded - original`, row by row.
///
/// Errors: those of the matrix, and `Shape` for weights of another one.
pub(crate) fn errors_of(original: &[f32], matrix: &Matrix) -> Result<Vec<f32>> {
    let mut errors = vec![0.0; original.len()];
    let strip = STRIP_ROWS * matrix.cols().max(1);
    let strips = errors.par_chunks_mut(strip).zip(original.par_chunks(strip));
    strips
        .enumerate()
        .try_for_each(|(strip, (errors, original))| {
            matrix.rows_into(strip * STRIP_ROWS, errors)?;
            let pairs = errors.iter_mut().zip(original);
            pairs.for_each(|(error, w)| *error -= w);
            Ok(())
        })
        .map(|()| errors)
}

/// Rounds to six significant digits: such numbers survive JSON unchanged.
pub(crate) fn significant(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Returns the root of `error / norm`, to six digits after the point; 0 for a norm of 0.
pub(crate) fn to_six_digits(error: f64, norm: f64) -> f64 {
    match norm == 0.0 {
        true => 0.0,
        false => ((error.max(0.0) / norm).sqrt() * 1e6).round() / 1e6,
    }
}

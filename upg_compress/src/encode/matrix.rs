//! The table of encoders; one matrix encoded as its description says, and measures of its error.
#![forbid(unsafe_code)]

use super::encoder::Encoder;
use super::{bitmap, grouped, mdcsr, trellis};
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use rayon::prelude::*;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::{Matrix, Result};

/// An encoded matrix, with what is reported of it.
pub(crate) struct Encoded {
    pub matrix: Matrix,
    pub output_error: Option<f64>,
    pub divergence: Option<f64>,
    pub seconds: f64,
}

/// The encoders: one for each of [`Encoding::ALL`], in its order.
static ENCODERS: [Encoder; Encoding::ALL.len()] = [
    mdcsr::MDCSR,
    grouped::Q8,
    grouped::Q4,
    trellis::T2,
    trellis::T3,
    trellis::T4,
    bitmap::S8,
    bitmap::S4,
];

const _: () = {
    let mut i = 0;
    while i < ENCODERS.len() {
        assert!(
            ENCODERS[i].encoding as usize == i,
            "not in the order of Encoding::ALL"
        );
        i += 1;
    }
};

/// Returns the encoder of an encoding.
pub(crate) fn encoder(encoding: Encoding) -> &'static Encoder {
    &ENCODERS[encoding as usize]
}

/// Returns the encoder of a layer. Errors: those of [`LayerInfo::encoding`].
pub(crate) fn encoder_of(layer: &LayerInfo) -> Result<&'static Encoder> {
    layer.encoding().map(encoder)
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
    (encoder_of(layer)?.encode)(weights, layer, seed, curvature, progress)
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
        // A sum of differences may end a little below 0; what is not a number stays so.
        false if error < 0.0 => 0.0,
        false => ((error / norm).sqrt() * 1e6).round() / 1e6,
    }
}

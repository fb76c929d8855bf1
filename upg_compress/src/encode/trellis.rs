//! Rounds matrices to the trellis encodings `t2`, `t3`, `t4`.
//!
//! Rotate the input so that the weights look Gaussian, give each row a scale, then search the
//! cheapest chain of states through each strip of 64 rows (see `upg_kernel::matrix::{strips,
//! trellis}` for the layout). Sources: QuaRot (arXiv 2404.00456), QTIP (arXiv 2406.11235).
#![deny(unsafe_code)]

mod code;
mod feedback;
mod forward;
mod search;
#[allow(unsafe_code)]
mod simd;
#[cfg(test)]
mod tests;

pub use code::{Code, UNIT};
pub use search::Search;
pub use simd::Isa;

use super::encoder::{DefaultEmbedding, Encoder, cycled};
use super::panel::{Panel, StripRows};
use super::rotation::{hadamard_size, rotation};
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use crate::sensitivity::hessian::Feedback;
use rayon::prelude::*;
use upg_kernel::format::Encoding;
use upg_kernel::matrix::strips::{self, STRIP_ROWS, TILE_COLS, position};
use upg_kernel::matrix::trellis::{strip_bytes, strip_weights};
use upg_kernel::matrix::{TrellisMatrix, TrellisParts};
use upg_kernel::prime_lut::PRIME_LUT;
use upg_kernel::trellis_code::STATE_BITS;
use upg_kernel::{Error, ErrorKind, Matrix, Result};

/// The prime of every row.
///
/// One f32 scale a row holds its size, so any prime would do.
const PRIME_INDEX: u8 = 0;

/// Least weight of an error in a row.
///
/// A row as large as the average of its strip has weight 1, one twice as large 2, and so on; if
/// the costs of errors in rows are known, a row of average cost has weight 1.
///
/// The search minimizes errors relative to the scale of their row. The error of the whole matrix
/// would weigh them by the square of the scale; that takes bits away from small rows, to which a
/// model may react as strongly. The first power keeps most of the gain (0.05 dB of the whole error
/// on usual matrices, 0.5 dB where rows differ by ten times) for a third of the harm.
const LEAST_ROW_WEIGHT: f64 = 1.0 / 8.0;

/// Gain of the size of a row where errors are compensated: its targets are larger than its weights.
///
/// 1.0 measured worse with `t2` and `t3`; gains that follow the largest weights of a row measured
/// the same.
const GAIN: f64 = 1.1;

/// Squared errors of weights in codes with 2, 3 and 4 bits, in units of the variance of their row.
pub(crate) const SQUARED_ERRORS: [f64; 3] = [0.0682, 0.0177, 0.004_87];

/// Memory of a thread for the search, in bytes.
const SEARCH_BYTES: u64 = 2_400_000;

pub(super) const T2: Encoder =
    encoder::<2>(Encoding::T2, DefaultEmbedding::Q8OrQ4 { block_bits: 2.1 });
pub(super) const T3: Encoder =
    encoder::<3>(Encoding::T3, DefaultEmbedding::Q8OrQ4 { block_bits: 3.1 });
pub(super) const T4: Encoder = encoder::<4>(Encoding::T4, DefaultEmbedding::Q8);

const fn encoder<const K: u8>(encoding: Encoding, embedding: DefaultEmbedding) -> Encoder {
    Encoder {
        encoding,
        describe: |layer, _| layer.hadamard = hadamard_size(layer.cols),
        encode: |weights, layer, seed, curvature, progress| {
            let (rows, cols) = (layer.rows, layer.cols);
            let matrix = encode_with(weights, rows, cols, K, seed, curvature, progress);
            matrix.map(Matrix::Trellis)
        },
        repeat,
        scratch_bytes: |_, parts| parts * SEARCH_BYTES,
        is_calibrated: true,
        takes_group: false,
        stores_zeros: false,
        sparse: None,
        by_row: false,
        embedding,
    }
}

fn repeat(strip: &Matrix, rows: usize) -> Result<Option<Matrix>> {
    let Matrix::Trellis(m) = strip else {
        return Ok(None);
    };
    let parts = m.parts();
    let parts = TrellisParts {
        codes: cycled(&parts.codes, strips::count(rows) * parts.codes.len()).into(),
        prime_indices: cycled(&parts.prime_indices, rows).into(),
        scales: cycled(&parts.scales, rows).into(),
        ..parts.clone()
    };
    let matrix = TrellisMatrix::new(rows, strip.cols(), m.k(), parts)?;
    Ok(Some(Matrix::Trellis(matrix)))
}

/// Encodes `w [rows, cols]` (row by row, original basis) with `k` = 2, 3 or 4 bits a weight.
///
/// `signs_seed` chooses the random signs of the [`rotation`]. The result depends on the arguments
/// only, not on threads or machine. Cost: 0.31 to 0.68 microseconds a weight and thread on a core
/// of an AMD EPYC of 2024 (`cargo run --release --example trellis_speed`), strips in parallel;
/// memory per thread at most 2.4 MB and 900 bytes per column.
///
/// Errors (`Argument`): `k` is another number, the matrix is empty or `w` has another length;
/// (`Invalid`): a weight is not finite, or so large that its row overflows when rotated.
pub fn encode(
    w: &[f32],
    rows: usize,
    cols: usize,
    k: u8,
    signs_seed: u64,
) -> Result<TrellisMatrix> {
    encode_with(w, rows, cols, k, signs_seed, None, &())
}

/// Encodes like [`encode`]; with a curvature, later columns and rows compensate the errors of
/// earlier ones.
///
/// The curvature is not rotated. The predictions of the model are kept then rather than its
/// weights. `progress` advances with every strip.
///
/// Errors: also `Interrupted`, at most a strip of each thread after `progress` is cancelled;
/// `Shape` for the curvature of another matrix, and those of [`Feedback::new`].
pub fn encode_with(
    w: &[f32],
    rows: usize,
    cols: usize,
    k: u8,
    signs_seed: u64,
    curvature: Option<&Curvature>,
    progress: &dyn Progress,
) -> Result<TrellisMatrix> {
    let code = &Code::standard(k)?;
    if rows == 0 || cols == 0 || rows.checked_mul(cols) != Some(w.len()) {
        return Err(Error::new(
            ErrorKind::Argument,
            format!("{} weights for a matrix [{rows}, {cols}]", w.len()),
        ));
    }
    if let Some(i) = w.iter().position(|w| !w.is_finite()) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("weight [{}, {}] is {}", i / cols, i % cols, w[i]),
        ));
    }
    let rotation = rotation(cols, signs_seed)?;
    let feedback = curvature
        .map(|curvature| {
            curvature.check(rows, cols)?;
            Feedback::new(&curvature.inputs().rotated(&rotation), TILE_COLS)
        })
        .transpose()?;
    let too_large = || Error::new(ErrorKind::TooLarge, format!("matrix [{rows}, {cols}]"));
    let strip_bytes = strip_bytes(cols, code.k()).ok_or_else(too_large)?;
    let len = strips::count(rows)
        .checked_mul(strip_bytes)
        .ok_or_else(too_large)?;
    let (mut codes, mut scales) = (vec![0; len], vec![0.0; rows]);
    let panel_rows = curvature.map_or(STRIP_ROWS, Curvature::panel_rows);
    codes
        .par_chunks_mut(panel_rows / STRIP_ROWS * strip_bytes)
        .zip(scales.par_chunks_mut(panel_rows))
        .zip(w.par_chunks(panel_rows * cols))
        .enumerate()
        .try_for_each_init(
            || Strip::new(code, cols),
            |strip, (panel, ((codes, scales), w))| {
                let of_rows =
                    curvature.map(|curvature| curvature.feedback_of_rows(panel, feedback::ROWS));
                let mut panel = Panel::new(cols, of_rows.transpose()?.flatten());
                let strips = codes.chunks_exact_mut(strip_bytes);
                let strips = strips.zip(scales.chunks_mut(STRIP_ROWS));
                for ((codes, scales), w) in strips.zip(w.chunks(STRIP_ROWS * cols)) {
                    progress.check_interrupt()?;
                    let mut rotated = w.to_vec();
                    let rows = rotated.chunks_exact_mut(cols);
                    rows.for_each(|row| rotation.apply(row));
                    let (wanted, of_rows) = panel.next(&rotated);
                    let feedback = feedback.as_ref().map(|feedback| (feedback, of_rows));
                    strip.encode(&rotated, &wanted, feedback, scales);
                    write_stream(&strip.states, code.k(), codes);
                    panel.add(&rotated, strip.decoded(scales));
                    progress.advance(w.len() as u64);
                }
                Ok::<_, Error>(())
            },
        )?;
    if let Some(row) = scales.iter().position(|s| !s.is_finite()) {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("the weights of row {row} are too large to rotate them"),
        ));
    }
    let parts = TrellisParts {
        codes: codes.into(),
        prime_indices: vec![PRIME_INDEX; rows].into(),
        scales: scales.into(),
        rotation,
    };
    TrellisMatrix::new(rows, cols, code.k(), parts)
}

/// Up to 64 rotated rows on their way into a stream of states; its memory is used again.
struct Strip<'a> {
    cols: usize,
    search: Search<'a>,
    /// Targets in the order of the codes, as are weights and states, in units of a level.
    targets: Vec<f32>,
    weights: Vec<f32>,
    states: Vec<u16>,
}

impl<'a> Strip<'a> {
    fn new(code: &'a Code, cols: usize) -> Self {
        let len = strip_weights(cols).expect("a strip of this matrix is in memory");
        Self {
            cols,
            search: Search::new(code),
            targets: vec![0.0; len],
            weights: vec![0.0; len],
            states: vec![0; len],
        }
    }

    /// Finds states for rows `w [n, cols]` and their `scales [n]`.
    ///
    /// With feedback the targets are `wanted` and errors are weighted by their cost; without, by
    /// the sizes of the rows. A row that is not finite gets a scale that is not.
    fn encode(
        &mut self,
        w: &[f32],
        wanted: &[f32],
        feedback: Option<(&Feedback, Option<StripRows<'_>>)>,
        scales: &mut [f32],
    ) {
        let code = self.search.code();
        self.targets.fill(0.0);
        self.weights.fill(0.0);
        let mut sizes: Vec<f64> = wanted.chunks_exact(self.cols).map(rms).collect();
        let strip = feedback.as_ref().and_then(|(_, strip)| strip.as_ref());
        if let Some(strip) = strip {
            grow(&mut sizes, strip, SQUARED_ERRORS[usize::from(code.k()) - 2]);
        }
        let of_rows = row_weights(&sizes, strip.map(StripRows::costs));
        let mut levels = [0.0; STRIP_ROWS];
        let gain = if feedback.is_some() { GAIN } else { 1.0 };
        for (row, wanted) in wanted.chunks_exact(self.cols).enumerate() {
            let level = sizes[row] * gain / f64::from(code.unit());
            (levels[row], scales[row]) = (level, level as f32);
            if level == 0.0 {
                continue;
            }
            for (col, &wanted) in wanted.iter().enumerate() {
                let p = position(row, col);
                self.targets[p] = (f64::from(wanted) / level) as f32;
                self.weights[p] = of_rows[row];
            }
        }
        let prime = f64::from(PRIME_LUT[usize::from(PRIME_INDEX)]);
        if let Some((feedback, strip)) = feedback {
            let rows = strip.map(|strip| feedback::RowFeedback::new(w, &levels, &strip));
            let (targets, weights) = (&self.targets, &mut self.weights);
            let states = &mut self.states;
            let fitted =
                feedback::search(&mut self.search, targets, weights, feedback, rows, states);
            for (scale, fitted) in scales.iter_mut().zip(fitted) {
                *scale = (f64::from(*scale) * fitted.unwrap_or(1.0) / prime) as f32;
            }
            return;
        }
        self.search
            .run(None, &self.targets, &self.weights, &mut self.states)
            .expect("as many targets, weights and states");
        for (row, (w, scale)) in w.chunks_exact(self.cols).zip(scales).enumerate() {
            if !scale.is_finite() {
                continue;
            }
            let (mut along, mut squares) = (0.0, 0.0);
            for (col, &w) in w.iter().enumerate() {
                let level = f64::from(code.level(self.states[position(row, col)]));
                along += f64::from(w) * level;
                squares += level * level;
            }
            // least squares: the best scale for the levels that were chosen
            let best = along.max(0.0) / (squares.max(1.0) * prime);
            *scale = best as f32;
        }
    }

    /// The rows of the states with these scales, row by row.
    fn decoded(&self, scales: &[f32]) -> impl Iterator<Item = f32> {
        let prime = PRIME_LUT[usize::from(PRIME_INDEX)] as f32;
        scales.iter().enumerate().flat_map(move |(row, scale)| {
            let level = move |col| self.search.code().level(self.states[position(row, col)]);
            (0..self.cols).map(move |col| scale * (prime * f32::from(level(col))))
        })
    }
}

/// Raises the sizes of rows that are smaller than what the errors of the rows before will add to
/// them.
///
/// The expected square of an error is `error` times the square of the size of its row. Adding it
/// to the size of all rows measured worse. Rows of size 0 stay that.
fn grow(sizes: &mut [f64], strip: &StripRows<'_>, error: f64) {
    for k in 1..sizes.len() {
        let asked = (0..k).map(|i| (f64::from(strip.share(i, k)) * sizes[i]).powi(2));
        let asked = (error * asked.sum::<f64>()).sqrt();
        if sizes[k] > 0.0 {
            sizes[k] = sizes[k].max(asked);
        }
    }
}

fn rms(w: &[f32]) -> f64 {
    let squares: f64 = w.iter().map(|&w| f64::from(w).powi(2)).sum();
    (squares / w.len() as f64).sqrt()
}

/// Returns the weight of an error of one level in each row of a strip, about 1 on average.
///
/// It follows from the sizes of the rows and, if they are known, the costs of errors in them.
fn row_weights(sizes: &[f64], costs: Option<&[f32]>) -> Vec<f32> {
    let squares = sizes.iter().map(|size| size * size);
    let weights: Vec<f64> = match costs {
        None => sizes.to_vec(),
        Some(costs) => squares
            .clone()
            .zip(costs)
            .map(|(square, &cost)| square * f64::from(cost))
            .collect(),
    };
    let n = sizes.len() as f64;
    let average = match costs {
        None => (squares.sum::<f64>() / n).sqrt(),
        Some(_) => weights.iter().sum::<f64>() / n,
    };
    let weight = |w: &f64| (w / average).max(LEAST_ROW_WEIGHT) as f32;
    weights.iter().map(weight).collect()
}

/// Writes the stream of a strip: the first state, then the `k` newest bits of each one.
fn write_stream(states: &[u16], k: u8, codes: &mut [u8]) {
    let (mut bits, mut count, mut at) = (0u32, 0, 0);
    for (i, &state) in states.iter().enumerate() {
        let (new, n) = match i {
            0 => (state, STATE_BITS),
            _ => (state >> (STATE_BITS - u32::from(k)), u32::from(k)),
        };
        bits |= u32::from(new) << count;
        count += n;
        while count >= 8 {
            codes[at] = bits as u8;
            (bits, count, at) = (bits >> 8, count - 8, at + 1);
        }
    }
    if count > 0 {
        codes[at] = bits as u8;
    }
}

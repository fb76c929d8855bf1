//! Levels that compensate the errors of earlier columns and rows.
#![forbid(unsafe_code)]

use super::levels::LevelSet;
use super::row::EncodedRow;
use crate::encode::panel::{Panel, StripRows};
use crate::sensitivity::curvature::Curvature;
use crate::sensitivity::hessian::Feedback;
use rayon::prelude::*;
use upg_kernel::Result;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::prime_lut::PRIME_LUT;

/// Columns whose errors reach all later ones in one product of matrices.
const COLUMNS: usize = 64;

/// Chooses the codes of rows again, from the most important column to the least.
///
/// Each code is chosen for its target after the errors before. Then scales are fitted to the
/// codes; primes stay. With `skip_zeros` only weights that are not zero have codes, and the others
/// stay zero.
///
/// Errors: `Shape` for the curvature of another matrix; those of [`Feedback::new`].
pub(super) fn choose_again<L: LevelSet>(
    weights: &[f32],
    cols: usize,
    group: usize,
    skip_zeros: bool,
    levels: &L,
    curvature: &Curvature,
    encoded: &mut [EncodedRow],
) -> Result<()> {
    curvature.check(encoded.len(), cols)?;
    if cols == 0 {
        return Ok(());
    }
    let order = curvature.inputs().order();
    let feedback = Feedback::new(&curvature.inputs().reordered(&order), 1)?;
    let chooser = Chooser {
        cols,
        group,
        skip_zeros,
        levels,
        order: &order,
        feedback: &feedback,
    };
    encoded
        .par_chunks_mut(curvature.panel_rows())
        .zip(weights.par_chunks(curvature.panel_rows() * cols))
        .enumerate()
        .try_for_each(|(panel, (rows, weights))| {
            let mut panel = Panel::new(cols, curvature.feedback_of_rows(panel, 1)?);
            let strips = rows.chunks_mut(STRIP_ROWS);
            for (rows, weights) in strips.zip(weights.chunks(STRIP_ROWS * cols)) {
                let (wanted, of_rows) = panel.next(weights);
                let chosen = chooser.choose(weights, &wanted, of_rows.as_ref(), rows);
                panel.add(weights, chosen.into_iter());
            }
            Ok(())
        })
}

/// Parameters of the choice of codes in a strip.
struct Chooser<'a, L> {
    cols: usize,
    group: usize,
    skip_zeros: bool,
    levels: &'a L,
    /// The columns from the first that is rounded to the last, which is that of the feedback.
    order: &'a [usize],
    feedback: &'a Feedback,
}

impl<L: LevelSet> Chooser<'_, L> {
    /// Chooses codes and scales of `rows`, up to [`STRIP_ROWS`], of `weights [rows, cols]` with
    /// the targets `wanted`.
    ///
    /// Returns the weights that they decode to.
    fn choose(
        &self,
        weights: &[f32],
        wanted: &[f32],
        strip: Option<&StripRows<'_>>,
        rows: &mut [EncodedRow],
    ) -> Vec<f32> {
        let (cols, feedback) = (self.cols, self.feedback);
        let is_stored = |at: usize| !self.skip_zeros || weights[at] != 0.0;
        // Column by column, in their order.
        let mut of_rows = vec![0.0; cols * STRIP_ROWS];
        for (column, &col) in of_rows.chunks_exact_mut(STRIP_ROWS).zip(self.order) {
            for (of_rows, row) in column.iter_mut().zip(wanted.chunks_exact(cols)) {
                *of_rows = row[col];
            }
        }
        // Of each row, what the errors of those before add to its targets.
        let shares: Vec<Vec<f32>> = match strip {
            Some(strip) => (0..rows.len())
                .map(|k| (0..k).map(|i| strip.share(i, k)).collect())
                .collect(),
            None => vec![Vec::new(); rows.len()],
        };
        let mut wanted = of_rows.clone();
        // Products of prime and level.
        let mut products = vec![0.0; wanted.len()];
        let mut errors = products.clone();
        let mut codes = vec![0; weights.len()];
        // What is left of the weights of a column, row by row.
        let mut left = [0.0; STRIP_ROWS];
        for first in (0..cols).step_by(COLUMNS) {
            let end = cols.min(first + COLUMNS);
            for (k, &col) in (first..end).zip(&self.order[first..end]) {
                for (i, row) in rows.iter().enumerate() {
                    let at = k * STRIP_ROWS + i;
                    // What the rows before ask for.
                    let asked: f32 = shares[i].iter().zip(&left).map(|(s, e)| s * e).sum();
                    of_rows[at] += asked;
                    wanted[at] += asked;
                    if is_stored(i * cols + col) {
                        let prime = PRIME_LUT[usize::from(row.primes[col / self.group])] as f32;
                        let step = row.scale * prime;
                        let target = if step > 0.0 { wanted[at] / step } else { 0.0 };
                        let code = self.levels.code(target);
                        codes[i * cols + col] = code;
                        products[at] = prime * f32::from(self.levels.level(code));
                    }
                    let chosen = row.scale * products[at];
                    errors[at] = of_rows[at] - chosen;
                    left[i] = weights[i * cols + col] - chosen;
                }
                feedback.spread(&errors, k..k + 1, &mut wanted, k + 1..end);
            }
            feedback.spread(&errors, first..end, &mut wanted, end..cols);
        }
        let scales = feedback.scales_of_rows(&of_rows, &products);
        for (i, (row, scale)) in rows.iter_mut().zip(scales).enumerate() {
            let stored = (i * cols..(i + 1) * cols).filter(|&at| is_stored(at));
            row.codes = stored.map(|at| codes[at]).collect();
            row.scale = scale.map_or(row.scale, |scale| scale as f32);
        }
        let mut chosen = vec![0.0; weights.len()];
        for (column, &col) in products.chunks_exact(STRIP_ROWS).zip(self.order) {
            let rows = rows.iter().zip(column).zip(chosen.chunks_exact_mut(cols));
            rows.for_each(|((row, product), chosen)| chosen[col] = row.scale * product);
        }
        chosen
    }
}

//! Pruning that keeps the outputs of a matrix: SparseGPT (arXiv 2301.00774).
//!
//! Columns are processed in order, 128 at a time. Among these the weights go whose loss costs
//! least if all later columns compensate it: `target^2 * D[k][k]` (see [`crate::sensitivity`]).
//! The columns after compensate what is lost.
#![forbid(unsafe_code)]

use crate::sensitivity::hessian::{Feedback, Hessian};
use rayon::prelude::*;
use std::ops::Range;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::{Error, ErrorKind, Result};

/// Columns among which weights are chosen, as in the paper.
const TOGETHER: usize = 128;

/// Prunes `weights [rows, cols]`: the share `sparsity` becomes zero, the others move to compensate.
///
/// The share is that of every 128 columns; rows may differ. Weights that are zero stay zero, also
/// where they are more than that. The result does not depend on the number of threads. Cost: `rows
/// * cols^2 / 2` multiplications, three copies of the weights, and what [`Feedback::new`] takes.
///
/// Errors: `Argument` for a share that is not between 0 and 1; `Shape` for a wrong length or a
/// Hessian of other columns; those of [`Feedback::new`].
pub fn prune(
    weights: &[f32],
    rows: usize,
    cols: usize,
    sparsity: f64,
    hessian: &Hessian,
) -> Result<Vec<f32>> {
    check_sparsity(sparsity)?;
    hessian.check(cols)?;
    if rows.checked_mul(cols) != Some(weights.len()) {
        let message = format!("{} weights for a matrix [{rows}, {cols}]", weights.len());
        return Err(Error::new(ErrorKind::Shape, message));
    }
    if weights.is_empty() {
        return Ok(Vec::new());
    }
    let feedback = Feedback::new(hessian, 1)?;
    let strips = weights.par_chunks(STRIP_ROWS * cols);
    let mut strips: Vec<PrunedStrip> = strips.map(|w| PrunedStrip::new(w, cols)).collect();
    for first in (0..cols).step_by(TOGETHER) {
        let columns = first..cols.min(first + TOGETHER);
        let each = strips.par_iter_mut();
        let scores = each.flat_map_iter(|strip| strip.scores(&columns, &feedback));
        let threshold = threshold(scores.collect(), sparsity);
        let each = strips.par_iter_mut();
        each.for_each(|strip| strip.prune(&columns, &feedback, threshold));
    }
    let mut pruned = vec![0.0; weights.len()];
    let out = pruned.par_chunks_mut(STRIP_ROWS * cols);
    out.zip(&strips)
        .for_each(|(out, strip)| strip.write(out, cols));
    Ok(pruned)
}

/// Errors (`Argument`): not between 0 and 1.
pub(crate) fn check_sparsity(sparsity: f64) -> Result<()> {
    if sparsity > 0.0 && sparsity < 1.0 {
        return Ok(());
    }
    let message = format!("a share of {sparsity} to prune, expected more than 0 and less than 1");
    Err(Error::new(ErrorKind::Argument, message).hint("0.5 leaves half of the weights"))
}

/// Returns the score below which the share `sparsity` of `scores` lies.
///
/// Fewer are below it if others are equal to it.
fn threshold(mut scores: Vec<f32>, sparsity: f64) -> f32 {
    let pruned = (scores.len() as f64 * sparsity).round() as usize;
    match pruned < scores.len() {
        true => *scores.select_nth_unstable_by(pruned, f32::total_cmp).1,
        false => f32::INFINITY,
    }
}

/// 64 rows, column by column.
struct PrunedStrip {
    rows: usize,
    weights: Vec<f32>,
    /// Targets of later columns, and results of earlier ones.
    wanted: Vec<f32>,
    errors: Vec<f32>,
    /// Scores of the weights of the next columns, by their place.
    scores: Vec<f32>,
}

impl PrunedStrip {
    fn new(weights: &[f32], cols: usize) -> Self {
        let mut by_column = vec![0.0; cols * STRIP_ROWS];
        for (row, weights) in weights.chunks_exact(cols).enumerate() {
            for (col, &weight) in weights.iter().enumerate() {
                by_column[col * STRIP_ROWS + row] = weight;
            }
        }
        Self {
            rows: weights.len() / cols,
            wanted: by_column.clone(),
            errors: vec![0.0; by_column.len()],
            weights: by_column,
            scores: Vec::new(),
        }
    }

    /// Returns the cost of losing each of the weights of these columns; 0 for those that are zero.
    ///
    /// A target follows from the errors of all columns before it, so the columns are tried without
    /// a loss first.
    fn scores(&mut self, columns: &Range<usize>, feedback: &Feedback) -> Vec<f32> {
        let places = columns.start * STRIP_ROWS..columns.end * STRIP_ROWS;
        let wanted = self.wanted[places.clone()].to_vec();
        self.take(columns, feedback, |_| false);
        let tried = &mut self.wanted[places];
        let costs = columns
            .clone()
            .flat_map(|col| [feedback.costs()[col]; STRIP_ROWS]);
        self.scores = tried
            .iter()
            .zip(costs)
            .map(|(w, cost)| w * w * cost)
            .collect();
        tried.copy_from_slice(&wanted);
        let of_columns = self.scores.chunks_exact(STRIP_ROWS);
        of_columns
            .flat_map(|column| &column[..self.rows])
            .copied()
            .collect()
    }

    /// Weights whose score is below the threshold go; all later columns are to make up for it.
    fn prune(&mut self, columns: &Range<usize>, feedback: &Feedback, threshold: f32) {
        let scores = std::mem::take(&mut self.scores);
        self.take(columns, feedback, |i| scores[i] < threshold);
        let later = columns.end..self.weights.len() / STRIP_ROWS;
        feedback.spread(&self.errors, columns.clone(), &mut self.wanted, later);
    }

    /// Gives each of these columns what is wanted of it after the errors of those before, but for
    /// the weights that go, by their number among those of the columns.
    fn take(&mut self, columns: &Range<usize>, feedback: &Feedback, goes: impl Fn(usize) -> bool) {
        let first = columns.start * STRIP_ROWS;
        for k in columns.clone() {
            for at in k * STRIP_ROWS..(k + 1) * STRIP_ROWS {
                if self.weights[at] == 0.0 || goes(at - first) {
                    self.wanted[at] = 0.0;
                }
                self.errors[at] = self.weights[at] - self.wanted[at];
            }
            feedback.spread(&self.errors, k..k + 1, &mut self.wanted, k + 1..columns.end);
        }
    }

    /// Writes the strip row by row.
    fn write(&self, out: &mut [f32], cols: usize) {
        for (row, out) in out.chunks_exact_mut(cols).enumerate() {
            for (col, out) in out.iter_mut().enumerate() {
                *out = self.wanted[col * STRIP_ROWS + row];
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Levels that make up for the errors of others.
#![forbid(unsafe_code)]

use super::{EncodedRow, LevelSet};
use crate::curvature::{Curvature, Panel};
use crate::hessian::Feedback;
use rayon::prelude::*;
use upg_kernel::Result;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::prime_lut::PRIME_LUT;

/// Columns whose errors reach all later ones in one product of matrices.
const COLUMNS: usize = 64;

/// Chooses the codes of rows, all of whose weights are stored, again, from the column that counts most to the one that
/// counts least: each for what is wanted of it after the errors before. Then scales are fitted to them; primes stay.
///
/// Errors: `Shape` for the curvature of another matrix; those of [`Feedback::new`].
pub(super) fn choose_again<L: LevelSet>(
    weights: &[f32],
    cols: usize,
    group: usize,
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
        levels,
        order: &order,
        feedback: &feedback,
    };
    encoded
        .par_chunks_mut(curvature.panel_rows())
        .zip(weights.par_chunks(curvature.panel_rows() * cols))
        .enumerate()
        .try_for_each(|(panel, (rows, weights))| {
            let mut panel = Panel::new(cols, curvature.feedback_of_rows(panel)?);
            let strips = rows.chunks_mut(STRIP_ROWS);
            for (rows, weights) in strips.zip(weights.chunks(STRIP_ROWS * cols)) {
                let (wanted, _) = panel.next(weights);
                chooser.choose(&wanted, rows);
                panel.add(weights, chooser.decoded(rows));
            }
            Ok(())
        })
}

/// How codes of a strip are chosen.
struct Chooser<'a, L> {
    cols: usize,
    group: usize,
    levels: &'a L,
    /// The columns from the first that is rounded to the last, which is that of the feedback.
    order: &'a [usize],
    feedback: &'a Feedback,
}

impl<L: LevelSet> Chooser<'_, L> {
    /// Codes and scales of `rows`, up to [`STRIP_ROWS`], whose weights should be `weights`.
    fn choose(&self, weights: &[f32], rows: &mut [EncodedRow]) {
        let (cols, feedback) = (self.cols, self.feedback);
        let mut wanted = vec![0.0; cols * STRIP_ROWS];
        for (column, &col) in wanted.chunks_exact_mut(STRIP_ROWS).zip(self.order) {
            for (wanted, row) in column.iter_mut().zip(weights.chunks_exact(cols)) {
                *wanted = row[col];
            }
        }
        // Products of prime and level.
        let (of_rows, mut products) = (wanted.clone(), vec![0.0; wanted.len()]);
        let mut errors = products.clone();
        for first in (0..cols).step_by(COLUMNS) {
            let end = cols.min(first + COLUMNS);
            for (k, &col) in (first..end).zip(&self.order[first..end]) {
                for (i, row) in rows.iter_mut().enumerate() {
                    let step = row.scale * self.prime(row, col);
                    let at = k * STRIP_ROWS + i;
                    let target = if step > 0.0 { wanted[at] / step } else { 0.0 };
                    row.codes[col] = self.levels.code(target);
                    products[at] = self.product(row, col);
                    errors[at] = of_rows[at] - row.scale * products[at];
                }
                feedback.spread(&errors, k..k + 1, &mut wanted, k + 1..end);
            }
            feedback.spread(&errors, first..end, &mut wanted, end..cols);
        }
        let scales = feedback.scales_of_rows(&of_rows, &products);
        for (row, scale) in rows.iter_mut().zip(scales) {
            row.scale = scale.map_or(row.scale, |scale| scale as f32);
        }
    }

    /// What `rows` are now, row by row.
    fn decoded(&self, rows: &[EncodedRow]) -> impl Iterator<Item = f32> {
        rows.iter()
            .flat_map(move |row| (0..self.cols).map(move |col| row.scale * self.product(row, col)))
    }

    fn prime(&self, row: &EncodedRow, col: usize) -> f32 {
        PRIME_LUT[usize::from(row.primes[col / self.group])] as f32
    }

    fn product(&self, row: &EncodedRow, col: usize) -> f32 {
        self.prime(row, col) * f32::from(self.levels.level(row.codes[col]))
    }
}

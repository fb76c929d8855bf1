//! Levels that make up for the errors of others.
#![forbid(unsafe_code)]

use super::{EncodedRow, LevelSet};
use crate::hessian::{Feedback, Hessian};
use rayon::prelude::*;
use upg_kernel::Result;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::prime_lut::PRIME_LUT;

/// Columns whose errors reach all later ones in one product of matrices.
const COLUMNS: usize = 64;

/// Chooses the codes of rows again, from the column that counts most to the one that counts least: each for what is
/// wanted of it after the errors before. Then scales are fitted to them; primes stay. With `skip_zeros` only weights that are
/// not zero have codes, and the others stay zero.
///
/// Errors: those of [`Feedback::new`]; `Shape` for a Hessian of other columns.
pub(super) fn choose_again<L: LevelSet>(
    weights: &[f32],
    cols: usize,
    group: usize,
    skip_zeros: bool,
    levels: &L,
    hessian: &Hessian,
    encoded: &mut [EncodedRow],
) -> Result<()> {
    hessian.check(cols)?;
    if cols == 0 {
        return Ok(());
    }
    let order = hessian.order();
    let feedback = Feedback::new(&hessian.reordered(&order), 1)?;
    let is_stored = |weight: f32| !skip_zeros || weight != 0.0;
    encoded
        .par_chunks_mut(STRIP_ROWS)
        .zip(weights.par_chunks(STRIP_ROWS * cols))
        .for_each(|(rows, weights)| {
            let mut wanted = vec![0.0; cols * STRIP_ROWS];
            for (column, &col) in wanted.chunks_exact_mut(STRIP_ROWS).zip(&order) {
                for (wanted, row) in column.iter_mut().zip(weights.chunks_exact(cols)) {
                    *wanted = row[col];
                }
            }
            // Products of prime and level.
            let (of_rows, mut products) = (wanted.clone(), vec![0.0; wanted.len()]);
            let mut errors = products.clone();
            let mut codes = vec![0; weights.len()];
            for first in (0..cols).step_by(COLUMNS) {
                let end = cols.min(first + COLUMNS);
                for (k, &col) in (first..end).zip(&order[first..end]) {
                    for (i, row) in rows.iter().enumerate() {
                        let at = k * STRIP_ROWS + i;
                        if !is_stored(of_rows[at]) {
                            continue;
                        }
                        let prime = PRIME_LUT[usize::from(row.primes[col / group])] as f32;
                        let step = row.scale * prime;
                        let target = if step > 0.0 { wanted[at] / step } else { 0.0 };
                        let code = levels.code(target);
                        codes[i * cols + col] = code;
                        products[at] = prime * f32::from(levels.level(code));
                        errors[at] = of_rows[at] - row.scale * products[at];
                    }
                    feedback.spread(&errors, k..k + 1, &mut wanted, k + 1..end);
                }
                feedback.spread(&errors, first..end, &mut wanted, end..cols);
            }
            let by_row = codes.chunks_exact(cols).zip(weights.chunks_exact(cols));
            for (row, (codes, weights)) in rows.iter_mut().zip(by_row) {
                let stored = codes.iter().zip(weights).filter(|(_, w)| is_stored(**w));
                row.codes = stored.map(|(code, _)| *code).collect();
            }
            for (row, scale) in rows
                .iter_mut()
                .zip(feedback.scales_of_rows(&of_rows, &products))
            {
                row.scale = scale.map_or(row.scale, |scale| scale as f32);
            }
        });
    Ok(())
}

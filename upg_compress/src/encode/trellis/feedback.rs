//! Search through a strip whose later tiles compensate the errors of earlier ones.
#![forbid(unsafe_code)]

use super::search::Search;
use crate::encode::panel::StripRows;
use crate::sensitivity::hessian::Feedback;
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, TILE_WEIGHTS, position};

/// Tiles whose errors reach the columns far from them in one product of matrices.
const TILES: usize = 16;

/// Rows of a tile that are searched together, where rows compensate those before.
pub(super) const ROWS: usize = 16;

/// Weights that a search has in view beyond those that it fixes.
const VIEW: usize = 128;

/// The largest weight of a search, which takes 1 for an average: sums of costs end at some 570
/// times that of an average error with weight 1, and what is beyond counts no more. 1 to 10
/// measured the same; 64, as it can be with an average of 1 over all of the matrix, up to 9 dB
/// worse.
const LARGEST_WEIGHT: f32 = 3.0;

/// Feedback between the rows of a strip.
pub(super) struct RowFeedback {
    /// Rotated weights in the order of the codes, in units of a level.
    weights: Vec<f32>,
    /// Shares of the error of a row that are added to the target of each row.
    ///
    /// Errors are in units of the level of their row, targets in units of that of theirs.
    shares: Box<[[f32; STRIP_ROWS]; STRIP_ROWS]>,
}

impl RowFeedback {
    /// Feedback of rows `w [n, cols]` with these `levels`; rows of size 0 take no part.
    pub(super) fn new(w: &[f32], levels: &[f64; STRIP_ROWS], strip: &StripRows<'_>) -> Self {
        let n = strip.costs().len();
        let cols = w.len() / n;
        let mut weights = vec![0.0; cols.div_ceil(TILE_COLS) * TILE_WEIGHTS];
        let mut shares = Box::new([[0.0; STRIP_ROWS]; STRIP_ROWS]);
        for i in (0..n).filter(|&i| levels[i] > 0.0) {
            for (col, &w) in w[i * cols..(i + 1) * cols].iter().enumerate() {
                weights[position(i, col)] = (f64::from(w) / levels[i]) as f32;
            }
            for k in (i + 1..n).filter(|&k| levels[k] > 0.0) {
                shares[i][k] = (f64::from(strip.share(i, k)) * levels[i] / levels[k]) as f32;
            }
        }
        Self { weights, shares }
    }
}

/// Finds `states` for a strip of `targets`, in the order of its codes, in units of a level.
/// `costs`, what an error in each row costs, become what an error of each weight does.
///
/// Returns for each row the scale of its levels with which they cost least; `None` where any would
/// do.
///
/// A tile, or some rows of it, is searched as one. The search looks ahead at the next one, whose
/// targets do not include the errors of this one yet.
pub(super) fn search(
    search: &mut Search<'_>,
    targets: &[f32],
    costs: &mut [f32],
    feedback: &Feedback,
    rows: Option<RowFeedback>,
    states: &mut [u16],
) -> [Option<f64>; STRIP_ROWS] {
    let code = search.code();
    let of_columns = feedback.costs();
    let tiles = targets.len() / TILE_WEIGHTS;
    for (i, cost) in costs.iter_mut().enumerate() {
        let col = i / TILE_WEIGHTS * TILE_COLS + i % TILE_COLS;
        *cost *= of_columns.get(col).unwrap_or(&0.0);
    }
    // All column by column; what is in columns of padding costs nothing and is not passed on.
    let mut of_rows = vec![0.0; tiles * TILE_WEIGHTS];
    for (i, &target) in targets.iter().enumerate() {
        of_rows[place(i)] = target;
    }
    let mut wanted = of_rows.clone();
    let mut errors = vec![0.0; wanted.len()];
    let columns = |first: usize, end: usize| {
        let end = (end * TILE_COLS).min(of_columns.len());
        (first * TILE_COLS).min(end)..end
    };
    let step = rows.as_ref().map_or(STRIP_ROWS, |_| ROWS) * TILE_COLS;
    let mut now = Vec::new();
    let mut weights = Vec::new();
    let mut start = None;
    for first in (0..tiles).step_by(TILES) {
        let end = tiles.min(first + TILES);
        for tile in first..end {
            for begin in (tile * TILE_WEIGHTS..(tile + 1) * TILE_WEIGHTS).step_by(step) {
                let range = begin..targets.len().min(begin + step + VIEW);
                now.clear();
                now.extend(range.clone().map(|i| wanted[place(i)]));
                weigh(&costs[range], &mut weights);
                let states = &mut states[begin..begin + step];
                search
                    .run(start, &now, &weights, states)
                    .expect("as many targets and weights, and more of them than states");
                start = states.last().copied();
                for (i, &state) in (begin..).zip(&*states) {
                    errors[place(i)] = of_rows[place(i)] - f32::from(code.level(state));
                }
                let Some(rows) = &rows else {
                    continue;
                };
                for (i, &state) in (begin..).zip(&*states) {
                    let error = rows.weights[i] - f32::from(code.level(state));
                    let column = place(i) / STRIP_ROWS * STRIP_ROWS;
                    let shares = &rows.shares[place(i) % STRIP_ROWS];
                    let column = column..column + STRIP_ROWS;
                    let targets = of_rows[column.clone()].iter_mut().zip(&mut wanted[column]);
                    for ((of_rows, wanted), share) in targets.zip(shares) {
                        *of_rows += error * share;
                        *wanted += error * share;
                    }
                }
            }
            // The rest of these tiles, and the one that the last of them has in view.
            let (from, to) = (columns(tile, tile + 1), columns(tile + 1, end + 1));
            feedback.spread(&errors, from, &mut wanted, to);
        }
        let (from, to) = (columns(first, end), columns(end + 1, tiles));
        feedback.spread(&errors, from, &mut wanted, to);
    }
    let mut levels = vec![0.0; of_rows.len()];
    for (i, &state) in states.iter().enumerate() {
        levels[place(i)] = f32::from(code.level(state));
    }
    let columns = of_columns.len() * STRIP_ROWS;
    feedback.scales_of_rows(&of_rows[..columns], &levels[..columns])
}

/// Scales `costs` to weights of a search: 1 on average, or less to bound the largest.
fn weigh(costs: &[f32], weights: &mut Vec<f32>) {
    let average = costs.iter().sum::<f32>() / costs.len() as f32;
    let largest = costs.iter().copied().fold(0.0, f32::max);
    // Of rows of zeros alone any level will do.
    let unit = average.max(largest / LARGEST_WEIGHT).max(f32::MIN_POSITIVE);
    weights.clear();
    weights.extend(costs.iter().map(|cost| cost / unit));
}

/// Returns the index in an array of columns of the weight with number `i` of a strip.
fn place(i: usize) -> usize {
    let (tile, row, col) = (
        i / TILE_WEIGHTS,
        i % TILE_WEIGHTS / TILE_COLS,
        i % TILE_COLS,
    );
    (tile * TILE_COLS + col) * STRIP_ROWS + row
}

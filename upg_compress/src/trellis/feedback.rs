//! The search through a strip whose later tiles make up for the errors of earlier ones.
#![forbid(unsafe_code)]

use super::search::Search;
use crate::hessian::Feedback;
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, TILE_WEIGHTS};

/// Tiles whose errors reach the columns far from them in one product of matrices.
const TILES: usize = 16;

/// Finds `states` for a strip of `targets`, in the order of its codes, in units of a level. `costs`, what an
/// error in each row costs, become what an error of each weight does.
///
/// Returns for each row the scale of its levels with which they cost least; `None` where any would do.
///
/// Each tile is searched with the tile after it in view, whose targets do not know of the errors of this one yet.
pub(super) fn search(
    search: &mut Search<'_>,
    targets: &[f32],
    costs: &mut [f32],
    feedback: &Feedback,
    states: &mut [u16],
) -> [Option<f64>; STRIP_ROWS] {
    let code = search.code();
    let of_columns = feedback.costs();
    let tiles = targets.len() / TILE_WEIGHTS;
    for (i, cost) in costs.iter_mut().enumerate() {
        let col = i / TILE_WEIGHTS * TILE_COLS + i % TILE_COLS;
        *cost *= of_columns.get(col).unwrap_or(&0.0);
    }
    // Both column by column; columns of padding stay zero.
    let mut wanted = vec![0.0; tiles * TILE_WEIGHTS];
    for (i, &target) in targets.iter().enumerate() {
        wanted[place(i)] = target;
    }
    let of_rows = wanted[..of_columns.len() * STRIP_ROWS].to_vec();
    let mut errors = vec![0.0; wanted.len()];
    let columns = |first: usize, end: usize| {
        let end = (end * TILE_COLS).min(of_columns.len());
        (first * TILE_COLS).min(end)..end
    };
    let mut now = vec![0.0; 2 * TILE_WEIGHTS];
    let mut start = None;
    for first in (0..tiles).step_by(TILES) {
        let end = tiles.min(first + TILES);
        for tile in first..end {
            let next = tiles.min(tile + 2);
            let range = tile * TILE_WEIGHTS..next * TILE_WEIGHTS;
            let now = &mut now[..range.len()];
            for (i, target) in range.clone().zip(&mut *now) {
                *target = wanted[place(i)];
            }
            let states = &mut states[tile * TILE_WEIGHTS..][..TILE_WEIGHTS];
            search
                .run(start, now, &costs[range.clone()], states)
                .expect("as many targets and weights, and more of them than states");
            start = states.last().copied();
            for (i, &state) in range.zip(&*states) {
                errors[place(i)] = targets[i] - f32::from(code.level(state));
            }
            // The rest of these tiles, and the one that the last of them has in view.
            let (from, to) = (columns(tile, tile + 1), columns(tile + 1, end + 1));
            feedback.spread(&errors, from, &mut wanted, to);
        }
        let (from, to) = (columns(first, end), columns(end + 1, tiles));
        feedback.spread(&errors, from, &mut wanted, to);
    }
    let pairs = of_rows.iter().zip(&errors);
    let levels: Vec<f32> = pairs.map(|(weight, error)| weight - error).collect();
    feedback.scales_of_rows(&of_rows, &levels)
}

/// Where the weight with number `i` of a strip is in an array of columns.
fn place(i: usize) -> usize {
    let (tile, row, col) = (
        i / TILE_WEIGHTS,
        i % TILE_WEIGHTS / TILE_COLS,
        i % TILE_COLS,
    );
    (tile * TILE_COLS + col) * STRIP_ROWS + row
}

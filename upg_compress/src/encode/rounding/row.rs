//! One row: its scale, the primes of its groups and the codes of its weights, by squared error.
#![forbid(unsafe_code)]

use super::levels::LevelSet;
use upg_kernel::prime_lut::PRIME_LUT;

/// The packed encodings select among the first 256 primes, 2 to 1,619.
const PRIMES: usize = 256;

/// An encoded row: codes of the weights that are stored, in column order.
pub(crate) struct EncodedRow {
    pub(crate) scale: f32,
    pub(crate) primes: Vec<u8>,
    pub(crate) codes: Vec<u8>,
}

pub(super) fn encode_row<L: LevelSet>(groups: &[Vec<f32>], levels: &L) -> EncodedRow {
    let mut scale = initial_scale(groups, levels);
    let mut row = encode_with_scale(groups, scale, levels);
    let refitted = refit_scale(groups, &row, levels).unwrap_or(scale);
    if refitted != scale {
        scale = refitted;
        let again = encode_with_scale(groups, scale, levels);
        if row_error(groups, &again, levels) < row_error(groups, &row, levels) {
            row = again;
        }
    }
    row
}

/// Returns the scale at which the group with the largest weight can use the upper end of the
/// searched primes.
fn initial_scale<L: LevelSet>(groups: &[Vec<f32>], levels: &L) -> f32 {
    let largest = groups.iter().flatten().fold(0.0f32, |m, w| m.max(w.abs()));
    let product = f64::from(PRIME_LUT[PRIMES - 1]) * f64::from(levels.largest());
    let scale = (f64::from(largest) * f64::from(L::SEARCH.1) / product) as f32;
    if largest == 0.0 {
        0.0
    } else {
        scale.max(f32::MIN_POSITIVE)
    }
}

fn encode_with_scale<L: LevelSet>(groups: &[Vec<f32>], scale: f32, levels: &L) -> EncodedRow {
    let mut row = EncodedRow {
        scale,
        primes: Vec::with_capacity(groups.len()),
        codes: Vec::new(),
    };
    // In units of the scale no square can overflow or vanish, however small the weights are.
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for group in groups {
        let targets: Vec<f32> = group.iter().map(|w| w * inverse).collect();
        let prime = best_prime(&targets, levels);
        let step = PRIME_LUT[prime] as f32;
        row.primes.push(prime as u8);
        row.codes
            .extend(targets.iter().map(|t| levels.code(t / step)));
    }
    row
}

/// Returns the prime of the smallest squared error for weights in units of the scale.
///
/// The search walks coarsely over the range that the largest weight leaves, then over every
/// neighbour of the best.
fn best_prime<L: LevelSet>(targets: &[f32], levels: &L) -> usize {
    let largest = targets.iter().fold(0.0f32, |m, t| m.max(t.abs()));
    if largest == 0.0 {
        return 0;
    }
    let ideal = largest / levels.largest();
    let at_least = |p: f32| {
        PRIME_LUT[..PRIMES]
            .partition_point(|&prime| (prime as f32) < p)
            .min(PRIMES - 1)
    };
    let low = at_least(L::SEARCH.0 * ideal).saturating_sub(1);
    let high = at_least(L::SEARCH.1 * ideal);
    let stride = ((high - low) / L::COARSE_STEPS).max(1);
    let error = |prime: usize| (levels.error(targets, PRIME_LUT[prime] as f32), prime);
    let less = |a: (f32, usize), b: (f32, usize)| if b.0 < a.0 { b } else { a };
    let coarse = (low..=high).step_by(stride).map(error).reduce(less);
    let Some((_, middle)) = coarse else { return 0 };
    let near = middle.saturating_sub(stride - 1)..=(middle + stride - 1).min(PRIMES - 1);
    near.map(error)
        .reduce(less)
        .map_or(middle, |(_, prime)| prime)
}

/// Returns the scale of the smallest squared error for given primes and codes (least squares).
fn refit_scale<L: LevelSet>(groups: &[Vec<f32>], row: &EncodedRow, levels: &L) -> Option<f32> {
    let (mut dot, mut norm) = (0.0f64, 0.0f64);
    for (w, product) in products(groups, row, levels) {
        dot += f64::from(w) * product;
        norm += product * product;
    }
    let scale = (dot / norm) as f32;
    (scale.is_finite() && scale > 0.0).then_some(scale)
}

pub(super) fn row_error<L: LevelSet>(groups: &[Vec<f32>], row: &EncodedRow, levels: &L) -> f64 {
    products(groups, row, levels)
        .map(|(w, product)| (f64::from(w) - f64::from(row.scale) * product).powi(2))
        .sum()
}

/// Returns pairs of a weight and its `prime * level`.
pub(super) fn products<L: LevelSet>(
    groups: &[Vec<f32>],
    row: &EncodedRow,
    levels: &L,
) -> impl Iterator<Item = (f32, f64)> {
    let primes = groups.iter().zip(&row.primes).flat_map(|(group, &prime)| {
        group
            .iter()
            .map(move |_| f64::from(PRIME_LUT[usize::from(prime)]))
    });
    let levels = row.codes.iter().map(|&code| f64::from(levels.level(code)));
    groups
        .iter()
        .flatten()
        .copied()
        .zip(primes.zip(levels).map(|(prime, level)| prime * level))
}

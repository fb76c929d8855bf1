//! The forward half of the Viterbi search: the cheapest way into every state, step by step.
//!
//! # Why it is laid out as it is
//! A state has 13 bits, the `k` newest on top. Going on drops the `k` oldest, so all `2^k` states
//! that differ only there share their successors: a *group* (13 - k bits), of which only the
//! cheapest member counts. Two facts make a step cheap:
//! - The level of a state is `T[S[state & 63] + (state >> 6)]`. For fixed low six bits the costs of
//!   128 states are 128 neighbours of one small table: one load, no look-up per state.
//! - A successor of group `g` has `g` as its low bits. So only the `2^(13-k)` group minima are ever
//!   stored, and they need one fixed permutation per step to stand where the next step adds to
//!   them in order.
//!
//! Costs are 16-bit integers that saturate: 8192 additions and minima a step, 32 in an AVX-512
//! register. No decision is stored; the way back recomputes it from the minima.
#![forbid(unsafe_code)]

use super::code::Code;
use upg_kernel::trellis_code::SHIFTS;

/// Values of the oldest six bits of a state (`l` below), which select the shift.
const LOW: usize = SHIFTS;
/// Values of the newest seven bits of a state (`q` below).
const HIGH: usize = 128;
/// States that are treated at once.
const LANES: usize = 32;

/// Levels whose costs are computed at once.
const FLOAT_LANES: usize = 16;

/// The largest cost of one weight in steps of the integer costs; larger ones are cut to it. Two of
/// them fit into 16 bits with their offset.
const COST_CUT: f32 = 16_000.0;

/// Targets are cut to this many levels: above any level, and its square is small for an f32.
const TARGET_CUT: f32 = 10_000.0;

/// Adding and subtracting it rounds an f32 of at most 2^22 to the nearest integer.
const ROUND: f32 = (3 << 22) as f32;

/// Entries of the cost table of a step: all levels, and the first 128 again so that no index wraps.
pub(super) fn step_costs(levels: usize) -> usize {
    levels + HIGH
}

/// Groups of `2^k` states with the same successors, for `k` bits a weight.
pub(super) fn groups(k: u8) -> usize {
    (LOW * HIGH) >> k
}

/// Returns the index of the minimum of group `g` among the [`groups`] of a step.
pub(super) fn group_index(k: u8, g: usize) -> usize {
    let rows = LOW >> k;
    (g & (rows - 1)) * HIGH + (g >> (6 - k))
}

/// The minima as the next step reads them: for each `l` the costs of 32 predecessors, repeated
/// where `2^(7-k) < 32`.
pub(super) type Ordered = [[i16; LANES]; LOW];

/// State that one call of [`run`] passes to the next.
pub(super) struct Front {
    /// The minima of the last step.
    pub(super) ordered: Box<Ordered>,
    /// The smallest of them.
    pub(super) least: i16,
}

/// One stretch of steps: `targets` and `weights` in, group minima and cost tables out.
pub(super) struct Stretch<'a> {
    pub(super) code: &'a Code,
    /// Targets in units of a level.
    pub(super) targets: &'a [f32],
    /// Cost of a squared unit of a level, in integer steps.
    pub(super) weights: &'a [f32],
    /// [`groups`] per step.
    pub(super) minima: &'a mut [i16],
    /// [`step_costs`] per step.
    pub(super) costs: &'a mut [i16],
}

/// Takes `front` over all steps of `stretch`.
///
/// Integer arithmetic and single f32 operations only: the result is the same however the compiler
/// arranges it.
#[inline(always)]
pub(super) fn run(front: &mut Front, stretch: &mut Stretch<'_>) {
    match (stretch.code.k(), stretch.code.float_levels().len()) {
        (2, 128) => run_with::<2, 4, 128>(front, stretch),
        (2, _) => run_with::<2, 4, 256>(front, stretch),
        (3, 128) => run_with::<3, 8, 128>(front, stretch),
        (3, _) => run_with::<3, 8, 256>(front, stretch),
        (_, 128) => run_with::<4, 16, 128>(front, stretch),
        (_, _) => run_with::<4, 16, 256>(front, stretch),
    }
}

/// `MEMBERS` is `2^K`.
#[inline(always)]
fn run_with<const K: usize, const MEMBERS: usize, const LEVELS: usize>(
    front: &mut Front,
    stretch: &mut Stretch<'_>,
) {
    let code = stretch.code;
    let minima = stretch.minima.chunks_exact_mut(groups(K as u8));
    let costs = stretch.costs.chunks_exact_mut(step_costs(LEVELS));
    let inputs = stretch.targets.iter().zip(stretch.weights);
    for (((&target, &weight), costs), minima) in inputs.zip(costs).zip(minima) {
        fill_costs(code.float_levels(), target, weight, front.least, costs);
        front.least = step::<MEMBERS, LEVELS>(code.shifts(), &front.ordered, costs, minima);
        reorder::<K>(minima, &mut front.ordered);
    }
}

/// The cost of every level for one weight, less what makes the cheapest state of the step before
/// `i16::MIN`.
#[inline(always)]
fn fill_costs(levels: &[f32], target: f32, weight: f32, least: i16, costs: &mut [i16]) {
    let target = target.clamp(-TARGET_CUT, TARGET_CUT);
    let mut nearest = [f32::MAX; FLOAT_LANES];
    for levels in levels.chunks_exact(FLOAT_LANES) {
        for (nearest, &level) in nearest.iter_mut().zip(levels) {
            let e = target - level;
            *nearest = least_of(*nearest, e * e);
        }
    }
    let nearest = nearest.into_iter().fold(f32::MAX, least_of);
    let offset = least.wrapping_sub(i16::MIN);
    for (cost, &level) in costs.iter_mut().zip(levels) {
        let e = target - level;
        let c = least_of(COST_CUT, (e * e - nearest) * weight);
        // the low bits of the rounded sum are the integer
        *cost = ((c + ROUND).to_bits() as i16).wrapping_sub(offset);
    }
    let (table, again) = costs.split_at_mut(levels.len());
    again.copy_from_slice(&table[..again.len()]);
}

/// The smaller one; `a` where one is not a number.
#[inline(always)]
fn least_of(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

/// Adds the costs of one weight and takes the minimum of each group of `MEMBERS` states; returns
/// the smallest.
#[inline(always)]
fn step<const MEMBERS: usize, const LEVELS: usize>(
    shifts: &[u8; LOW],
    ordered: &Ordered,
    costs: &[i16],
    minima: &mut [i16],
) -> i16 {
    let mut least = [i16::MAX; LANES];
    let costs = &costs[..LEVELS + HIGH];
    let (shifts, _) = shifts.as_chunks::<MEMBERS>();
    let (ordered, _) = ordered.as_chunks::<MEMBERS>();
    let (minima, _) = minima.as_chunks_mut::<HIGH>();
    for ((shifts, ordered), minima) in shifts.iter().zip(ordered).zip(minima) {
        let (shifts, _) = shifts.as_chunks::<4>();
        let (ordered, _) = ordered.as_chunks::<4>();
        let (minima, _) = minima.as_chunks_mut::<LANES>();
        for (part, minima) in minima.iter_mut().enumerate() {
            *minima = [i16::MAX; LANES];
            for (shifts, ordered) in shifts.iter().zip(ordered) {
                // shifts are below the number of levels; saying so spares a check
                let start = |j: usize| usize::from(shifts[j]) % LEVELS + part * LANES;
                let costs = [
                    &costs[start(0)..start(0) + LANES],
                    &costs[start(1)..start(1) + LANES],
                    &costs[start(2)..start(2) + LANES],
                    &costs[start(3)..start(3) + LANES],
                ];
                take_least(minima, ordered, costs);
            }
            for i in 0..LANES {
                least[i] = least[i].min(minima[i]);
            }
        }
    }
    least.into_iter().fold(i16::MAX, i16::min)
}

/// Four members at once: fewer trips to memory than one by one.
#[inline(always)]
fn take_least(best: &mut [i16; LANES], ordered: &[[i16; LANES]; 4], costs: [&[i16]; 4]) {
    for i in 0..LANES {
        let a = ordered[0][i].saturating_add(costs[0][i]);
        let b = ordered[1][i].saturating_add(costs[1][i]);
        let c = ordered[2][i].saturating_add(costs[2][i]);
        let d = ordered[3][i].saturating_add(costs[3][i]);
        best[i] = best[i].min(a.min(b).min(c.min(d)));
    }
}

/// The minima of one step as the next one reads them.
pub(super) fn order(k: u8, minima: &[i16], ordered: &mut Ordered) {
    match k {
        2 => reorder::<2>(minima, ordered),
        3 => reorder::<3>(minima, ordered),
        _ => reorder::<4>(minima, ordered),
    }
}

/// Brings the minima of a step into the order in which the next one adds to them.
///
/// Row `r` holds the groups with the low bits `r`; the other seven bits `q` are the place in the
/// row. The next step wants the low `K` bits of `q` outermost: a rotation of the index by `K` bits.
#[inline(always)]
fn reorder<const K: usize>(minima: &[i16], ordered: &mut Ordered) {
    let rows = LOW >> K;
    for (r, minima) in minima.chunks_exact(HIGH).enumerate() {
        let mut row = [0; HIGH];
        row.copy_from_slice(minima);
        for _ in 0..K {
            let mut halves = [0; HIGH];
            for i in 0..HIGH / 2 {
                halves[i] = row[2 * i];
                halves[HIGH / 2 + i] = row[2 * i + 1];
            }
            row = halves;
        }
        for (j, run) in row.chunks_exact(HIGH >> K).enumerate() {
            // one wide store: the next step loads all lanes at once
            let mut lanes = [0; LANES];
            for part in lanes.chunks_exact_mut(HIGH >> K) {
                part.copy_from_slice(run);
            }
            ordered[j * rows + r] = lanes;
        }
    }
}

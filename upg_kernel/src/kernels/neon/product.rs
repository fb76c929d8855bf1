//! Products of a strip with one vector.
#![forbid(unsafe_code)]

use super::dot::Dot;
use super::levels::{self, Levels, with_levels};
use super::{load_f32, load_i8, primes_of, store_f32};
use crate::kernels::activations::{Activations, Block, GROUP};
use crate::kernels::views::{Primes, Strip};
use std::arch::aarch64::*;
use std::ops::Range;

/// Registers of four rows per strip.
pub(super) const QUADS: usize = 16;

/// Registers that are processed together: those left beside what the levels need.
const TOGETHER: usize = 8;

/// One number per row of a strip.
pub(super) type Rows = [[f32; 4]; QUADS];

#[target_feature(enable = "neon")]
pub(super) fn multiply(dot: impl Dot, strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
    let mut sums = [[0.0; 4]; QUADS];
    let blocks = 0..x.blocks.len();
    let indices = match strip.primes {
        Primes::Groups { indices, .. } => indices,
        Primes::Rows(_) => &[],
    };
    let primes = |group: usize, quad: usize| primes_of(&indices[group].as_chunks().0[quad]);
    with_levels!(strip, levels => {
        add_blocks(levels, dot, &strip, x, blocks, primes, &mut sums);
    });
    strip.put_rows(bytemuck::cast_ref(&sums), out);
}

/// Adds the products of some blocks of columns, whose levels come first.
///
/// Leaves out the factor common to a whole row. `primes` belong to four rows of a group of columns.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn add_blocks(
    mut levels: impl Levels,
    dot: impl Dot,
    strip: &Strip<'_>,
    x: &Activations,
    blocks: Range<usize>,
    primes: impl Fn(usize, usize) -> float32x4_t,
    sums: &mut Rows,
) {
    let fours = strip.cols.div_ceil(16);
    for i in blocks {
        levels.next();
        let (block, scale) = (&x.blocks[i], x.scales[i]);
        let fours = (fours - 4 * i).min(4);
        let prime = |group| {
            let primes = &primes;
            move |quad| vmulq_n_f32(primes(group, quad), scale)
        };
        match strip.primes {
            Primes::Rows(_) => {
                let scales = vdupq_n_f32(scale);
                add_group(&levels, dot, block, 0..fours, |_| scales, sums);
            }
            Primes::Groups { cols: GROUP, .. } => {
                add_group(&levels, dot, block, 0..fours, prime(i), sums);
            }
            Primes::Groups { .. } => {
                let (first, second) = (prime(2 * i), prime(2 * i + 1));
                add_group(&levels, dot, block, 0..fours.min(2), first, sums);
                if fours > 2 {
                    add_group(&levels, dot, block, 2..fours, second, sums);
                }
            }
        }
    }
}

/// Adds the products of some tiles with their columns of a block,
/// times the factors of the rows.
///
/// Processes four tiles at a time.
#[inline]
#[target_feature(enable = "neon")]
fn add_group<L: Levels>(
    levels: &L,
    dot: impl Dot,
    block: &Block,
    fours: Range<usize>,
    factors: impl Fn(usize) -> float32x4_t,
    sums: &mut Rows,
) {
    for (part, sums) in sums.as_chunks_mut::<TOGETHER>().0.iter_mut().enumerate() {
        let products = products(levels, dot, block, fours.clone(), part * TOGETHER);
        for (i, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
            let products = vcvtq_f32_s32(products);
            let factor = factors(part * TOGETHER + i);
            store_f32(sum, vfmaq_f32(load_f32(sum), products, factor));
        }
    }
}

/// Sums the products of some registers of rows from `first` on. Exact.
#[inline(never)]
#[target_feature(enable = "neon")]
fn products<L: Levels>(
    levels: &L,
    dot: impl Dot,
    block: &Block,
    fours: Range<usize>,
    first: usize,
) -> [int32x4_t; TOGETHER] {
    let high: &[[i8; 16]; 4] = bytemuck::cast_ref(&block.high);
    let low: &[[i8; 16]; 4] = bytemuck::cast_ref(&block.low);
    let mut highs = [vdupq_n_s32(0); TOGETHER];
    let mut lows = highs;
    for four in fours {
        let (high, low) = (load_i8(&high[four]), load_i8(&low[four]));
        for i in 0..TOGETHER {
            if i.is_multiple_of(4) {
                levels.prefetch(2 * four, first + i);
                levels.prefetch(2 * four + 1, first + i);
            }
            let [a, b] = levels.pair(2 * four, first + i);
            highs[i] = dot.add::<0>(highs[i], a, high);
            lows[i] = dot.add::<0>(lows[i], a, low);
            highs[i] = dot.add::<1>(highs[i], b, high);
            lows[i] = dot.add::<1>(lows[i], b, low);
        }
        for i in 0..TOGETHER {
            let [a, b] = levels.pair(2 * four + 1, first + i);
            highs[i] = dot.add::<2>(highs[i], a, high);
            lows[i] = dot.add::<2>(lows[i], a, low);
            highs[i] = dot.add::<3>(highs[i], b, high);
            lows[i] = dot.add::<3>(lows[i], b, low);
        }
    }
    for i in 0..TOGETHER {
        lows[i] = vmlaq_n_s32(lows[i], highs[i], 128);
    }
    lows
}

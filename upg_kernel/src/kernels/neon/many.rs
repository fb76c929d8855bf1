//! Products of a strip with many vectors.
//!
//! The levels of some blocks of columns are decoded once for all vectors, to the form of `q8`.
#![forbid(unsafe_code)]

use super::dot::Dot;
use super::levels::{self, Bytes, Levels, PAIRS, Pair, with_levels};
use super::product::{QUADS, Rows, add_blocks};
use super::{load_f32, primes_of, store, store_f32};
use crate::kernels::activations::{Activations, GROUP};
use crate::kernels::views::{Primes, Strip};
use std::arch::aarch64::*;

/// Blocks of columns that are decoded at once: 64 KiB stay in the L1 or L2 cache.
const BLOCKS: usize = 16;

/// Memory for decoded levels.
#[derive(Debug, Default)]
pub(crate) struct Panel {
    pairs: Vec<Pair>,
    /// Primes of each group of columns.
    primes: Vec<Rows>,
    /// Sums of each vector, at the end its products.
    sums: Vec<Rows>,
}

/// Multiplies every row by every vector.
#[target_feature(enable = "neon")]
pub(super) fn multiply<'a>(
    dot: impl Dot,
    strip: Strip<'_>,
    vectors: &[Activations],
    panel: &'a mut Panel,
) -> &'a [[f32; 64]] {
    panel.sums.clear();
    panel.sums.resize(vectors.len(), [[0.0; 4]; QUADS]);
    with_levels!(strip, levels => add_panels(levels, dot, &strip, vectors, panel));
    let factors = strip.row_factors();
    let products: &mut [[f32; 64]] = bytemuck::cast_slice_mut(&mut panel.sums);
    for products in &mut *products {
        factors.apply(products);
    }
    products
}

/// Adds up the sums of every vector.
#[target_feature(enable = "neon")]
fn add_panels(
    mut levels: impl Levels,
    dot: impl Dot,
    strip: &Strip<'_>,
    vectors: &[Activations],
    panel: &mut Panel,
) {
    let Panel {
        pairs,
        primes,
        sums,
    } = panel;
    let all = strip.cols.div_ceil(8);
    let (indices, per_block) = match strip.primes {
        Primes::Groups { indices, cols } => (indices, GROUP / cols),
        Primes::Rows(_) => (&[][..], 0),
    };
    for first in (0..all).step_by(BLOCKS * PAIRS) {
        decode(&mut levels, (all - first).min(BLOCKS * PAIRS), pairs);
        let first = first / PAIRS;
        let blocks = first..first + pairs.len() / PAIRS;
        let first = first * per_block;
        let groups = indices.iter().skip(first).take(BLOCKS * per_block);
        primes.clear();
        primes.extend(groups.map(|indices| {
            let mut primes = [[0.0; 4]; QUADS];
            for (primes, indices) in primes.iter_mut().zip(indices.as_chunks().0) {
                store_f32(primes, primes_of(indices));
            }
            primes
        }));
        let primes = |group: usize, quad: usize| load_f32(&primes[group - first][quad]);
        for (x, sums) in vectors.iter().zip(&mut *sums) {
            let levels = Bytes::<false>::new(pairs.as_flattened());
            add_blocks(levels, dot, strip, x, blocks.clone(), primes, sums);
        }
    }
}

/// Decodes the next `n` pairs of tiles, and some to pad the last block of columns.
#[target_feature(enable = "neon")]
fn decode<L: Levels>(levels: &mut L, n: usize, pairs: &mut Vec<Pair>) {
    pairs.resize(n.next_multiple_of(PAIRS), [0; 512]);
    // Levels past the last pair are multiplied by zeros.
    for pairs in pairs[..n].chunks_mut(PAIRS) {
        levels.next();
        for (i, pair) in pairs.iter_mut().enumerate() {
            let (first, second) = pair.as_chunks_mut().0.split_at_mut(QUADS);
            for (quad, (first, second)) in first.iter_mut().zip(second).enumerate() {
                let [a, b] = levels.pair(i, quad);
                store(first, vreinterpretq_u8_s8(a));
                store(second, vreinterpretq_u8_s8(b));
            }
        }
    }
}

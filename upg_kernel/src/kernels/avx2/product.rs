//! Products of a strip with one vector.

use super::levels::{self, Levels};
use super::{dot, load_f32, primes, store_f32};
use crate::kernels::activations::{Activations, Block};
use crate::kernels::views::PAIRS;
use crate::kernels::views::{Strip, with_levels};
use std::arch::x86_64::*;
use std::ops::Range;

#[target_feature(enable = "avx2,fma,popcnt,bmi2")]
pub(super) fn multiply(strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
    let sums = with_levels!(strip, levels => sums(levels, &strip, x));
    strip.put_rows(bytemuck::cast_ref(&sums), out);
}

/// Multiplies the rows by `x`, without the factor common to a whole row.
#[target_feature(enable = "avx2,fma,popcnt,bmi2")]
fn sums<L: Levels>(mut levels: L, strip: &Strip<'_>, x: &Activations) -> [[f32; 8]; 8] {
    let mut sums = [[0.0; 8]; 8];
    for group in strip.groups(x) {
        let products = products(&mut levels, group.block, group.pairs, group.offset);
        add(products, group.primes, group.scale, &mut sums);
    }
    sums
}

/// Sums the products of some pairs of tiles with their columns of a block. Exact.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt,bmi2")]
fn products<L: Levels>(
    levels: &mut L,
    block: &Block,
    pairs: Range<usize>,
    offset: i32,
) -> [__m256i; 8] {
    let high: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.high);
    let low: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.low);
    let mut sums = [_mm256_set1_epi32(offset); 8];
    for (high, low) in high[pairs.clone()].iter().zip(&low[pairs]) {
        levels.next();
        add_tile::<L, 0>(levels, high[0], low[0], &mut sums);
        add_tile::<L, 1>(levels, high[1], low[1], &mut sums);
    }
    sums
}

/// Adds the products of a tile.
///
/// This is not a loop, in which the compiler would keep the sums in memory.
#[inline(always)]
fn add_tile<L: Levels, const TILE: usize>(
    levels: &mut L,
    high: i32,
    low: i32,
    sums: &mut [__m256i; 8],
) {
    // SAFETY: `levels` proves that the processor has the features.
    unsafe {
        let (high, low) = (_mm256_set1_epi32(high), _mm256_set1_epi32(low));
        let [a, b] = levels.sixteen_rows(TILE, 0);
        sums[0] = _mm256_add_epi32(sums[0], dot(a, high, low));
        sums[1] = _mm256_add_epi32(sums[1], dot(b, high, low));
        let [a, b] = levels.sixteen_rows(TILE, 1);
        sums[2] = _mm256_add_epi32(sums[2], dot(a, high, low));
        sums[3] = _mm256_add_epi32(sums[3], dot(b, high, low));
        let [a, b] = levels.sixteen_rows(TILE, 2);
        sums[4] = _mm256_add_epi32(sums[4], dot(a, high, low));
        sums[5] = _mm256_add_epi32(sums[5], dot(b, high, low));
        let [a, b] = levels.sixteen_rows(TILE, 3);
        sums[6] = _mm256_add_epi32(sums[6], dot(a, high, low));
        sums[7] = _mm256_add_epi32(sums[7], dot(b, high, low));
    }
}

/// Adds the products of a group, times its primes and the scale of its activations.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(products: [__m256i; 8], indices: Option<&[u8; 64]>, scale: f32, sums: &mut [[f32; 8]; 8]) {
    for (i, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
        let mut factor = _mm256_set1_ps(scale);
        if let Some(indices) = indices {
            factor = _mm256_mul_ps(factor, primes(&indices.as_chunks().0[i]));
        }
        let after = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, load_f32(sum));
        store_f32(after, sum);
    }
}

//! Products of a strip with one vector.
#![forbid(unsafe_code)]

use super::levels::{self, Levels};
use super::primes_of;
use crate::kernels::activations::{Activations, Block};
use crate::kernels::views::PAIRS;
use crate::kernels::views::{Strip, with_levels};
use std::arch::x86_64::*;
use std::ops::Range;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn multiply(strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
    with_levels!(strip, levels => multiply_levels(levels, &strip, x, out));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
fn multiply_levels<L: Levels>(mut levels: L, strip: &Strip<'_>, x: &Activations, out: &mut [f32]) {
    let mut sums = [_mm512_setzero_ps(); 4];
    for group in strip.groups(x) {
        let scale = _mm512_set1_ps(group.scale);
        let factors = match group.primes {
            None => [scale; 4],
            Some(indices) => factors(indices, scale),
        };
        let products = products(&mut levels, group.block, group.pairs, group.offset);
        for i in 0..4 {
            sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), factors[i], sums[i]);
        }
    }
    let rows = levels::in_order_of_rows::<L>(sums);
    strip.put_rows(&rows, out);
}

/// Sums the products of some pairs of tiles with their columns of a block. Exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
fn products<L: Levels>(
    levels: &mut L,
    block: &Block,
    pairs: Range<usize>,
    offset: i32,
) -> [__m512i; 4] {
    let high_x: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.high);
    let low_x: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.low);
    let mut high = [_mm512_setzero_si512(); 4];
    let mut low = [_mm512_set1_epi32(offset); 4];
    for (high_x, low_x) in high_x[pairs.clone()].iter().zip(&low_x[pairs]) {
        let tiles = levels.next();
        for i in 0..2 {
            let (high_x, low_x) = (_mm512_set1_epi32(high_x[i]), _mm512_set1_epi32(low_x[i]));
            for quarter in 0..4 {
                let levels = tiles[i][quarter];
                high[quarter] = _mm512_dpbusd_epi32(high[quarter], levels, high_x);
                low[quarter] = _mm512_dpbusd_epi32(low[quarter], levels, low_x);
            }
        }
    }
    let mut products = low;
    for i in 0..4 {
        products[i] = _mm512_add_epi32(_mm512_slli_epi32::<7>(high[i]), low[i]);
    }
    products
}

/// Returns the primes of a group times the scale of its activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn factors(indices: &[u8; 64], scale: __m512) -> [__m512; 4] {
    let mut factors = primes_of(indices);
    for factor in &mut factors {
        *factor = _mm512_mul_ps(*factor, scale);
    }
    factors
}

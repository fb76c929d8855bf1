//! A strip times a vector.

use super::levels::{self, Levels, with_levels};
use super::*;

/// Pairs of tiles in a block of activations.
const PAIRS: usize = GROUP / 8;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn multiply(strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
    with_levels!(strip, levels => multiply_levels(levels, &strip, x, out));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
fn multiply_levels<L: Levels>(mut levels: L, strip: &Strip<'_>, x: &Activations, out: &mut [f32]) {
    let mut sums = [_mm512_setzero_ps(); 4];
    let pairs = strip.cols.div_ceil(8);
    let blocks = x.blocks.iter().zip(&x.offsets).zip(&x.scales);
    for (i, ((block, offsets), scale)) in blocks.enumerate() {
        let (scale, pairs) = (_mm512_set1_ps(*scale), PAIRS.min(pairs - i * PAIRS));
        let of_block = offsets[0] + offsets[1];
        match strip.primes {
            Primes::Rows(_) => {
                let products = products(&mut levels, block, 0..pairs, of_block);
                add(products, [scale; 4], &mut sums);
            }
            Primes::Groups { indices, cols: 64 } => {
                let products = products(&mut levels, block, 0..pairs, of_block);
                add(products, factors(&indices[i], scale), &mut sums);
            }
            Primes::Groups { indices, .. } => {
                let half = PAIRS / 2;
                let first = products(&mut levels, block, 0..pairs.min(half), offsets[0]);
                add(first, factors(&indices[2 * i], scale), &mut sums);
                if pairs > half {
                    let second = products(&mut levels, block, half..pairs, offsets[1]);
                    add(second, factors(&indices[2 * i + 1], scale), &mut sums);
                }
            }
        }
    }
    let mut rows = [[0.0; 16]; 4];
    for (rows, sum) in rows.iter_mut().zip(sums) {
        *rows = to_array(sum);
    }
    strip.put_rows(bytemuck::cast_ref(&rows), out);
}

/// The sums of the products of some pairs of tiles with their columns of a block. Exact.
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

#[inline]
#[target_feature(enable = "avx512f")]
fn add(products: [__m512i; 4], factors: [__m512; 4], sums: &mut [__m512; 4]) {
    for i in 0..4 {
        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), factors[i], sums[i]);
    }
}

/// The primes of a group times the scale of its activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn factors(indices: &[u8; 64], scale: __m512) -> [__m512; 4] {
    let mut factors = primes_of(indices);
    for factor in &mut factors {
        *factor = _mm512_mul_ps(*factor, scale);
    }
    factors
}

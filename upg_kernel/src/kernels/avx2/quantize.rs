//! Quantization of activations.
#![forbid(unsafe_code)]

use super::{load_f32, store, store_f32};
use crate::kernels::activations::{Activations, Block, GROUP, scales_for};
use std::arch::x86_64::*;

/// Runs [`crate::kernels::activations::quantize`], bit-identical.
#[target_feature(enable = "avx2")]
pub(super) fn quantize(x: &[f32], out: &mut Activations) {
    out.resize(x.len());
    let blocks = out.blocks.iter_mut().zip(&mut out.offsets);
    for ((x, (block, offsets)), scale) in x.chunks(GROUP).zip(blocks).zip(&mut out.scales) {
        *scale = match x.first_chunk() {
            Some(x) => quantize_group(x, block, offsets),
            None => {
                let mut padded = [0.0; GROUP];
                padded[..x.len()].copy_from_slice(x);
                quantize_group(&padded, block, offsets)
            }
        };
    }
}

/// Rounds one group; returns its scale.
#[inline]
#[target_feature(enable = "avx2")]
fn quantize_group(x: &[f32; GROUP], block: &mut Block, offsets: &mut [i32; 2]) -> f32 {
    let x: &[[f32; 8]; 8] = bytemuck::cast_ref(x);
    let (scale, inverse) = scales_of(x);
    let mut high = [_mm256_setzero_si256(); 4];
    let mut low = high;
    let mut sums = [_mm256_setzero_si256(); 2];
    for i in 0..4 {
        let pair = [rounded(&x[2 * i], inverse), rounded(&x[2 * i + 1], inverse)];
        // Each half of the registers separately: 0 to 3 and 8 to 11, 4 to 7 and 12 to 15.
        let values = _mm256_packs_epi32(pair[0], pair[1]);
        sums[i / 2] =
            _mm256_add_epi32(sums[i / 2], _mm256_madd_epi16(values, _mm256_set1_epi16(1)));
        high[i] = _mm256_srai_epi16::<7>(_mm256_add_epi16(values, _mm256_set1_epi16(64)));
        low[i] = _mm256_sub_epi16(values, _mm256_slli_epi16::<7>(high[i]));
    }
    put(&high, &mut block.high);
    put(&low, &mut block.low);
    *offsets = sums.map(|sum| -128 * sum_of(sum));
    scale
}

/// Returns the scale of a group and its inverse. The inverse is 0 if the values become 0.
#[inline]
#[target_feature(enable = "avx2")]
fn scales_of(x: &[[f32; 8]; 8]) -> (f32, f32) {
    let mut largest = _mm256_setzero_ps();
    let mut wild = _mm256_setzero_ps();
    for x in x {
        let size = _mm256_andnot_ps(_mm256_set1_ps(-0.0), load_f32(x));
        let is_wild = _mm256_cmp_ps::<_CMP_NLT_UQ>(size, _mm256_set1_ps(f32::INFINITY));
        wild = _mm256_or_ps(wild, is_wild);
        largest = _mm256_max_ps(largest, size);
    }
    let mut sizes = [0.0; 8];
    store_f32(largest, &mut sizes);
    match _mm256_movemask_ps(wild) {
        0 => scales_for(sizes.into_iter().fold(0.0, f32::max)).unwrap_or((0.0, 0.0)),
        _ => (f32::NAN, 0.0),
    }
}

/// Computes `x * inverse`, rounded to nearest, ties to even.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(x: &[f32; 8], inverse: f32) -> __m256i {
    let inverse = _mm256_set1_ps(inverse);
    // Zeros also for non-finite activations, whose product with 0 is NaN.
    let finite = _mm256_cmp_ps::<_CMP_NEQ_OQ>(inverse, _mm256_setzero_ps());
    let values = _mm256_cvtps_epi32(_mm256_mul_ps(load_f32(x), inverse));
    _mm256_and_si256(values, _mm256_castps_si256(finite))
}

/// Stores a plane of 64 values.
///
/// A register has 16 of them: those from 0 and 8 in the first half,
/// those from 4 and 12 in the second.
#[inline]
#[target_feature(enable = "avx2")]
fn put(plane: &[__m256i; 4], out: &mut [i8; GROUP]) {
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let out: &mut [[u8; 32]; 2] = bytemuck::cast_mut(out);
    for (half, out) in out.iter_mut().enumerate() {
        let bytes = _mm256_packs_epi16(plane[2 * half], plane[2 * half + 1]);
        store(_mm256_permutevar8x32_epi32(bytes, order), out);
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn sum_of(lanes: __m256i) -> i32 {
    let mut sums = [0; 32];
    store(lanes, &mut sums);
    bytemuck::cast::<_, [i32; 8]>(sums).into_iter().sum()
}

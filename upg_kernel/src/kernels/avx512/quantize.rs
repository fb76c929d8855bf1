//! Quantization of activations.

use super::load_i8;
use crate::kernels::activations::{Activations, Block, GROUP, scales_for};
use std::arch::x86_64::*;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn quantize(x: &[f32], out: &mut Activations) {
    out.resize(x.len());
    let blocks = out.blocks.iter_mut().zip(&mut out.offsets);
    for ((x, (block, offsets)), scale) in x.chunks(GROUP).zip(blocks).zip(&mut out.scales) {
        let mut quarters = [_mm512_setzero_ps(); 4];
        for (quarter, x) in quarters.iter_mut().zip(x.chunks(16)) {
            *quarter = load_floats(x);
        }
        let inverse;
        (*scale, inverse) = scales_of(&quarters);
        for (i, quarter) in quarters.into_iter().enumerate() {
            // Zeros also for non-finite activations, whose product with 0 is NaN.
            let finite =
                _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(_mm512_set1_ps(inverse), _mm512_setzero_ps());
            let values =
                _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(quarter, _mm512_set1_ps(inverse)));
            let high = _mm512_srai_epi32::<7>(_mm512_add_epi32(values, _mm512_set1_epi32(64)));
            let low = _mm512_sub_epi32(values, _mm512_slli_epi32::<7>(high));
            store_16(&mut block.high, 16 * i, _mm512_cvtepi32_epi8(high));
            store_16(&mut block.low, 16 * i, _mm512_cvtepi32_epi8(low));
        }
        *offsets = offsets_of(block);
    }
}

/// Loads up to 16 floats and fills the rest with zeros.
#[target_feature(enable = "avx512f")]
fn load_floats(x: &[f32]) -> __m512 {
    let n = x.len().min(16);
    let mask = ((1u32 << n) - 1) as u16;
    // SAFETY: a masked load touches only the floats whose bit is set, which are those of the slice.
    unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr()) }
}

/// Returns the scale of a group and its inverse. The inverse is 0 if the values become 0.
#[target_feature(enable = "avx512f")]
fn scales_of(quarters: &[__m512; 4]) -> (f32, f32) {
    let mut largest = _mm512_setzero_ps();
    let mut wild = 0;
    for &quarter in quarters {
        let size = _mm512_abs_ps(quarter);
        wild |= _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(size, _mm512_set1_ps(f32::INFINITY));
        largest = _mm512_max_ps(largest, size);
    }
    match wild {
        0 => scales_for(_mm512_reduce_max_ps(largest)).unwrap_or((0.0, 0.0)),
        _ => (f32::NAN, 0.0),
    }
}

#[target_feature(enable = "avx512f")]
fn store_16(plane: &mut [i8; GROUP], at: usize, values: __m128i) {
    let out: &mut [i8] = &mut plane[at..at + 16];
    // SAFETY: the slice has 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), values) };
}

/// Returns -128 times the sum of each half.
#[target_feature(enable = "avx512f,avx512vnni")]
fn offsets_of(block: &Block) -> [i32; 2] {
    let ones = _mm512_set1_epi8(1);
    let sum_of_four = |plane| _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, load_i8(plane));
    let (high, low) = (sum_of_four(&block.high), sum_of_four(&block.low));
    let values = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
    [
        -128 * _mm512_mask_reduce_add_epi32(0x00FF, values),
        -128 * _mm512_mask_reduce_add_epi32(0xFF00, values),
    ]
}

//! Decoding of packed weights to floats, and conversion of f32 to 16-bit floats.

use super::levels::{self, Levels};
use super::{Avx2, biased, load, load_f32, store, store_f32, store_half, stream};
use crate::kernels::activations::GROUP;
use crate::kernels::decode::{self, Element, Line, Numbers, TILES, Weights};
use crate::kernels::scalar::Signs;
use crate::kernels::views::{Strip, with_levels};
use crate::rotation::Rotation;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Decodes a strip to `out [rows, cols]`.
///
/// The result is bit-identical to the reference, and inverse-rotated if there is a rotation.
#[target_feature(enable = "avx2,f16c,popcnt,bmi2")]
pub(super) fn decode<T: Element>(
    proof: Avx2,
    strip: Strip<'_>,
    rotation: Option<&Rotation>,
    streamed: bool,
    out: &mut [T],
) {
    decode::with_memory(|memory| {
        with_levels!(strip, levels => put_in_rows(levels, strip.cols, memory.rows(strip.cols)));
        memory.put::<Eights, T>(proof, &strip, rotation, streamed, out);
    });
}

/// Unpacks the levels of a strip row by row: `[64, blocks]`.
#[target_feature(enable = "avx2,popcnt,bmi2")]
fn put_in_rows<L: Levels>(mut levels: L, cols: usize, rows: &mut [Line]) {
    let blocks = cols.div_ceil(GROUP);
    let mut tiles = [[[0u8; 32]; 8]; TILES];
    for block in 0..blocks {
        let cols = (cols - block * GROUP).min(GROUP);
        for pair in &mut tiles.as_chunks_mut::<2>().0[..cols.div_ceil(8)] {
            levels.next();
            for (tile, out) in pair.iter_mut().enumerate() {
                for (quarter, out) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    let [a, b] = levels.sixteen_rows(tile, quarter);
                    store(a, &mut out[0]);
                    store(b, &mut out[1]);
                }
            }
        }
        for (eight, rows) in rows.chunks_exact_mut(8 * blocks).enumerate() {
            for (half, tiles) in tiles.as_chunks::<8>().0.iter().enumerate() {
                let mut registers = [_mm256_setzero_si256(); 8];
                for (register, tile) in registers.iter_mut().zip(tiles) {
                    *register = biased(load(&tile[eight]));
                }
                let registers = transpose(registers);
                for (row, register) in rows.chunks_exact_mut(blocks).zip(registers) {
                    store(register, &mut row[block].0.as_chunks_mut().0[half]);
                }
            }
        }
    }
}

/// Transposes 8 registers of 8 lanes: lane `j` of register `i` becomes lane `i`
/// of register `j`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    let mut t = r;
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Each group of four registers now has the lanes of one column in each half.
    let mut quads = t;
    for i in 0..2 {
        let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
        quads[4 * i] = _mm256_unpacklo_epi64(a, c);
        quads[4 * i + 1] = _mm256_unpackhi_epi64(a, c);
        quads[4 * i + 2] = _mm256_unpacklo_epi64(b, d);
        quads[4 * i + 3] = _mm256_unpackhi_epi64(b, d);
    }
    for i in 0..4 {
        t[i] = _mm256_permute2x128_si256::<0x20>(quads[i], quads[i + 4]);
        t[i + 4] = _mm256_permute2x128_si256::<0x31>(quads[i], quads[i + 4]);
    }
    t
}

/// Vector of 64 weights. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Eights([__m256; 8]);

impl Weights for Eights {
    type Proof = Avx2;

    #[inline(always)]
    fn new(_: Avx2, levels: &[u8; GROUP], primes: [f32; 2], scale: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` does.
        unsafe {
            let scale = _mm256_set1_ps(scale);
            let mut weights = [scale; 8];
            for i in 0..8 {
                let levels = _mm_cvtsi64_si128(i64::from_le_bytes(levels.as_chunks().0[i]));
                let levels = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(levels));
                // Exact: the only rounding is that of the scale.
                let product = _mm256_mul_ps(_mm256_set1_ps(primes[i / 4]), levels);
                weights[i] = _mm256_mul_ps(scale, product);
            }
            Self(weights)
        }
    }

    #[inline(always)]
    fn load(_: Avx2, weights: &[f32; GROUP]) -> Self {
        // SAFETY: as above.
        unsafe {
            let mut registers = [_mm256_setzero_ps(); 8];
            for (register, weights) in registers.iter_mut().zip(weights.as_chunks().0) {
                *register = load_f32(weights);
            }
            Self(registers)
        }
    }

    #[inline(always)]
    fn transform(proof: Avx2, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        proof.transform(x, factor, signs);
    }

    #[inline(always)]
    fn stream(_: Avx2, from: &[u8; 64], to: &mut [u8; 64]) {
        let to = to.as_chunks_mut().0.iter_mut();
        for (to, from) in to.zip(from.as_chunks().0) {
            // SAFETY: as above.
            unsafe { stream(load(from), to) };
        }
    }

    #[inline(always)]
    fn end_stream(_: Avx2) {
        // SAFETY: as above.
        unsafe { _mm_sfence() };
    }
}

impl Numbers<GROUP> for Eights {
    #[inline(always)]
    fn put_f32(self, out: &mut [f32; GROUP]) {
        for (weights, out) in self.0.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            unsafe { store_f32(weights, out) };
        }
    }

    #[inline(always)]
    fn put_f16(self, out: &mut [f16; GROUP]) {
        for (weights, out) in self.0.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            unsafe { store_f16(weights, out) };
        }
    }

    #[inline(always)]
    fn put_bf16(self, out: &mut [bf16; GROUP]) {
        let out = out.as_chunks_mut().0.iter_mut();
        for (weights, out) in self.0.as_chunks().0.iter().zip(out) {
            // SAFETY: as above.
            unsafe {
                let [a, b] = *weights;
                store_bf16(
                    [
                        rounded(_mm256_castps_si256(a)),
                        rounded(_mm256_castps_si256(b)),
                    ],
                    out,
                );
            }
        }
    }
}

/// Rounds the bits of finite numbers to nearest, ties to even, in the upper half.
#[inline]
#[target_feature(enable = "avx2")]
fn rounded(bits: __m256i) -> __m256i {
    let is_odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
    let half_less = _mm256_set1_epi32(0x7FFF);
    _mm256_add_epi32(bits, _mm256_add_epi32(half_less, is_odd))
}

/// Stores the upper halves of the bits of sixteen numbers.
#[inline]
#[target_feature(enable = "avx2")]
fn store_bf16([a, b]: [__m256i; 2], out: &mut [bf16; 16]) {
    let (a, b) = (_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
    // Packing works within halves.
    let halves = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b));
    store(halves, bytemuck::cast_mut(out));
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn store_f16(values: __m256, out: &mut [f16; 8]) {
    let halves = _mm256_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT }>(values);
    store_half(halves, bytemuck::cast_mut(out));
}

/// Converts each element with [`half::bf16::from_f32`].
#[target_feature(enable = "avx2")]
pub(super) fn to_bf16(x: &[f32], out: &mut [bf16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let mut registers = [_mm256_setzero_si256(); 2];
        for (register, x) in registers.iter_mut().zip(x.as_chunks().0) {
            let values = load_f32(x);
            let bits = _mm256_castps_si256(values);
            // Rounding could turn a NaN into an infinity; here it only becomes quiet.
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            *register = _mm256_blendv_epi8(rounded(bits), quiet, nan);
        }
        store_bf16(registers, out);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = bf16::from_f32(*x);
    }
}

/// Converts each element with [`half::f16::from_f32`].
#[target_feature(enable = "avx2,f16c")]
pub(super) fn to_f16(x: &[f32], out: &mut [f16]) {
    let (blocks, rest) = x.as_chunks::<8>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<8>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        store_f16(load_f32(x), out);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = f16::from_f32(*x);
    }
}

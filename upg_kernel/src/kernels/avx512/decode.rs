//! Packed weights to floats, and f32 to 16-bit floats.

use super::levels::{self, Levels};
use super::*;
use crate::kernels::decode::{self, Element, Levels64, TILES, Weights};
use crate::kernels::{Kernels, Set};

/// `out [rows, cols]`: every row as the reference decodes it, to the bit, and turned back if there is a rotation.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn decode<T: Element>(
    proof: Avx512,
    strip: Strip<'_>,
    rotation: Option<&Rotation>,
    out: &mut [T],
) {
    decode::with_memory(|memory| {
        with_levels!(strip, levels => put_in_rows(levels, strip.cols, memory.rows(strip.cols)));
        let kernels = (proof, Kernels(Set::Avx512(proof)));
        memory.put::<Sixteens, T>(kernels, &strip, rotation, out);
    });
}

/// The levels of a strip, row by row: `[64, blocks]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn put_in_rows<L: Levels>(mut levels: L, cols: usize, rows: &mut [Levels64]) {
    let blocks = cols.div_ceil(GROUP);
    let mut tiles = [[[0u8; 64]; 4]; TILES];
    for block in 0..blocks {
        let cols = (cols - block * GROUP).min(GROUP);
        for pair in &mut tiles.as_chunks_mut::<2>().0[..cols.div_ceil(8)] {
            for (out, tile) in pair.iter_mut().zip(levels.next()) {
                for (out, levels) in out.iter_mut().zip(tile) {
                    store(out, levels);
                }
            }
        }
        for (quarter, rows) in rows.chunks_exact_mut(16 * blocks).enumerate() {
            let mut registers = [_mm512_setzero_si512(); TILES];
            for (register, tile) in registers.iter_mut().zip(&tiles) {
                *register = biased(load(&tile[quarter]));
            }
            transpose(&mut registers);
            for (row, register) in rows.chunks_exact_mut(blocks).zip(registers) {
                store(&mut row[block].0, register);
            }
        }
    }
}

/// 16 registers of 16 lanes: lane `j` of register `i` becomes lane `i` of register `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut t = *r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Of each four registers the lanes of one column in each quarter.
    for i in 0..4 {
        let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
        r[4 * i] = _mm512_unpacklo_epi64(a, c);
        r[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        r[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        r[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for i in 0..4 {
        let [a, b, c, d] = [r[i], r[i + 4], r[i + 8], r[i + 12]];
        let even = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d),
        ];
        t[i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even[0], even[1]);
        t[i + 4] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd[0], odd[1]);
        t[i + 8] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even[0], even[1]);
        t[i + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd[0], odd[1]);
    }
    *r = t;
}

/// 64 weights. A value is the proof that this machine has the instructions.
#[derive(Clone, Copy)]
struct Sixteens([__m512; 4]);

impl Weights for Sixteens {
    type Proof = Avx512;

    #[inline(always)]
    fn new(_: Avx512, levels: &[u8; GROUP], primes: [f32; 2], scale: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` does.
        unsafe {
            let scale = _mm512_set1_ps(scale);
            let mut weights = [scale; 4];
            for i in 0..4 {
                let levels: &[u8; 16] = &levels.as_chunks().0[i];
                // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
                let levels = _mm_loadu_si128(levels.as_ptr().cast());
                let levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels));
                // Exact: there is one rounding, that of the scale.
                let product = _mm512_mul_ps(_mm512_set1_ps(primes[i / 2]), levels);
                weights[i] = _mm512_mul_ps(scale, product);
            }
            Self(weights)
        }
    }

    #[inline(always)]
    fn load(_: Avx512, weights: &[f32; GROUP]) -> Self {
        // SAFETY: as above.
        unsafe {
            let mut registers = [_mm512_setzero_ps(); 4];
            for (register, weights) in registers.iter_mut().zip(weights.as_chunks().0) {
                *register = load_f32(weights);
            }
            Self(registers)
        }
    }

    #[inline(always)]
    fn put_f32(self, out: &mut [f32; GROUP]) {
        for (weights, out) in self.0.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            *out = unsafe { to_array(weights) };
        }
    }

    #[inline(always)]
    fn put_f16(self, out: &mut [f16; GROUP]) {
        for (weights, out) in self.0.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            unsafe {
                let halves = _mm512_cvtps_ph::<NEAREST>(weights);
                store_16(bytemuck::cast_mut::<[f16; 16], _>(out), halves);
            }
        }
    }

    #[inline(always)]
    fn put_bf16(self, out: &mut [bf16; GROUP]) {
        let halves = out.as_chunks_mut::<32>().0;
        for (weights, out) in self.0.as_chunks::<2>().0.iter().zip(halves) {
            // SAFETY: as above.
            unsafe { store(bytemuck::cast_mut(out), upper_halves(*weights)) };
        }
    }
}

/// To nearest, ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Finite numbers, rounded to BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves(weights: [__m512; 2]) -> __m512i {
    let mut rounded = [_mm512_setzero_si512(); 2];
    for (rounded, weights) in rounded.iter_mut().zip(weights) {
        let bits = _mm512_castps_si512(weights);
        let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half_less = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
        *rounded = _mm512_add_epi32(half_less, is_odd);
    }
    let mut odd = [0u16; 32];
    for (i, word) in odd.iter_mut().enumerate() {
        *word = 2 * i as u16 + 1;
    }
    _mm512_permutex2var_epi16(rounded[0], load_u16(&odd), rounded[1])
}

/// [`half::bf16::from_f32`] of each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn to_bf16(x: &[f32], out: &mut [bf16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values = load_f32(x);
        let bits = _mm512_castps_si512(values);
        let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half_less = _mm512_set1_epi32(0x7FFF);
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(half_less, is_odd));
        // Rounding could turn a NaN into an infinity: it only becomes a quiet one.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let rounded = _mm512_mask_blend_epi32(nan, rounded, quiet);
        store_16(
            bytemuck::cast_mut(out),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)),
        );
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = bf16::from_f32(*x);
    }
}

/// [`half::f16::from_f32`] of each.
#[target_feature(enable = "avx512f")]
pub(super) fn to_f16(x: &[f32], out: &mut [f16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values = _mm512_cvtps_ph::<NEAREST>(load_f32(x));
        store_16(bytemuck::cast_mut(out), values);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = f16::from_f32(*x);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_16(out: &mut [u16; 16], values: __m256i) {
    // SAFETY: 16 values are 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), values) };
}

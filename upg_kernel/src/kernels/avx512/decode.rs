//! Decoding of packed weights to floats, and conversion of f32 to 16-bit floats.

use super::levels::{self, Levels};
use super::{Avx512, Register, biased, load, load_f32, load_u16, store, stream, to_array};
use crate::kernels::activations::GROUP;
use crate::kernels::decode::{self, Element, Line, Numbers, Row, TILES, Weights};
use crate::kernels::hadamard::{self, Register as _, Same, ScaledAndFlipped, Sink, Source};
use crate::kernels::scalar::Signs;
use crate::kernels::views::Primes;
use crate::kernels::views::{Strip, with_levels};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;

/// Decodes a strip to `out [rows, cols]`.
///
/// The result is bit-identical to the reference, and inverse-rotated if there is a rotation.
/// `streamed` bypasses the caches.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn decode<T: Element>(
    proof: Avx512,
    strip: Strip<'_>,
    rotation: Option<&Rotation>,
    streamed: bool,
    out: &mut [T],
) {
    decode::with_memory(|memory| {
        with_levels!(strip, levels => put_in_rows(levels, strip.cols, memory.rows(strip.cols)));
        memory.put::<Sixteens, T>(proof, &strip, rotation, streamed, out);
    });
}

/// Unpacks the levels of a strip row by row: `[64, blocks]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn put_in_rows<L: Levels>(mut levels: L, cols: usize, rows: &mut [Line]) {
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
        for quarter in 0..4 {
            let mut registers = [_mm512_setzero_si512(); TILES];
            for (register, tile) in registers.iter_mut().zip(&tiles) {
                *register = biased(load(&tile[quarter]));
            }
            transpose(&mut registers);
            for (lane, register) in registers.into_iter().enumerate() {
                let row = L::row(quarter, lane);
                store(&mut rows[row * blocks + block].0, register);
            }
        }
    }
}

/// Transposes 16 registers of 16 lanes: lane `j` of register `i` becomes lane `i`
/// of register `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut t = *r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Each group of four registers now has the lanes of one column in each quarter.
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

/// Vector of 64 weights. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
pub(super) struct Sixteens {
    weights: [__m512; 4],
    /// Flag: the processor can round these weights to BF16. Its instruction treats subnormal
    /// numbers as zero.
    has_bf16: bool,
}

impl Sixteens {
    /// Wraps weights `scale * (prime * level)`.
    #[inline(always)]
    pub(super) fn of(proof: Avx512, weights: [__m512; 4], scale: f32) -> Self {
        Self {
            weights,
            // A weight is 0 or at least twice its scale.
            has_bf16: proof.bf16 && (scale == 0.0 || scale.is_normal()),
        }
    }
}

impl Weights for Sixteens {
    type Proof = Avx512;

    #[inline(always)]
    fn new(proof: Avx512, levels: &[u8; GROUP], primes: [f32; 2], scale: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` does.
        unsafe {
            let factor = _mm512_set1_ps(scale);
            let mut weights = [factor; 4];
            for i in 0..4 {
                let prime = _mm512_set1_ps(primes[i / 2]);
                weights[i] = sixteen_weights(&levels.as_chunks().0[i], prime, factor);
            }
            Self::of(proof, weights, scale)
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
            Self {
                weights: registers,
                has_bf16: false,
            }
        }
    }

    #[inline(always)]
    fn transform(proof: Avx512, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        proof.transform(x, factor, signs);
    }

    /// Decoding is part of the first pass over memory, and rounding part of the last.
    #[inline(always)]
    fn put_turned<T: Element>(
        proof: Avx512,
        row: Row<'_>,
        rotation: &Rotation,
        turned: &mut [f32],
        out: &mut [T],
    ) {
        let (size, signs) = (rotation.size(), rotation.signs());
        let first = row.strip.cols - size;
        let primes = match row.strip.primes {
            Primes::Rows(indices) if first.is_multiple_of(GROUP) && size >= GROUP => indices,
            _ => return decode::put_turned::<Self, T>(proof, row, rotation, turned, out),
        };
        let (before, last) = row.levels.split_at(first / GROUP);
        let before = Row {
            levels: before,
            ..row
        };
        decode::put_row::<Self, f32>(proof, before, &mut turned[..first]);
        let decoded = Decoded {
            levels: last,
            prime: PRIME_LUT[usize::from(primes[row.i])] as f32,
            scale: row.strip.scales[row.i],
        };
        let norm = rotation.norm();
        let (out, out_rest) = out.split_at_mut(size);
        let rounded = Rounded {
            norm,
            signs,
            out: out.as_chunks_mut().0,
        };
        let blocks = turned[first..].as_chunks_mut().0;
        if first == 0 {
            return hadamard::transform::<Register>(proof, blocks, decoded, rounded);
        }
        let turned_once = ScaledAndFlipped(norm, signs);
        hadamard::transform::<Register>(proof, blocks, decoded, turned_once);
        let blocks = turned[..size].as_chunks_mut().0;
        hadamard::transform::<Register>(proof, blocks, Same, rounded);
        decode::convert::<Self, T>(proof, &turned[size..], out_rest);
    }

    #[inline(always)]
    fn stream(_: Avx512, from: &[u8; 64], to: &mut [u8; 64]) {
        // SAFETY: as above.
        unsafe { stream(load(from), to) };
    }

    #[inline(always)]
    fn end_stream(_: Avx512) {
        // SAFETY: as above.
        unsafe { _mm_sfence() };
    }
}

impl Numbers<GROUP> for Sixteens {
    #[inline(always)]
    fn put_f32(self, out: &mut [f32; GROUP]) {
        for (weights, out) in self.weights.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            *out = unsafe { to_array(weights) };
        }
    }

    #[inline(always)]
    fn put_f16(self, out: &mut [f16; GROUP]) {
        for (weights, out) in self.weights.into_iter().zip(out.as_chunks_mut().0) {
            // SAFETY: as above.
            unsafe { store_f16(weights, out) };
        }
    }

    #[inline(always)]
    fn put_bf16(self, out: &mut [bf16; GROUP]) {
        let halves = out.as_chunks_mut::<32>().0;
        for (weights, out) in self.weights.as_chunks::<2>().0.iter().zip(halves) {
            // SAFETY: as above.
            unsafe {
                let halves = match self.has_bf16 {
                    true => rounded(*weights),
                    false => upper_halves(*weights),
                };
                store(bytemuck::cast_mut(out), halves);
            }
        }
    }
}

/// Weights of a row before the inverse rotation.
struct Decoded<'a> {
    levels: &'a [Line],
    prime: f32,
    scale: f32,
}

impl Source<Register> for Decoded<'_> {
    #[inline(always)]
    fn load(&self, _: Avx512, _: &[[f32; 16]], index: usize) -> Register {
        let levels: &[u8; 16] = &self.levels[index / 4].0.as_chunks().0[index % 4];
        // SAFETY: the argument proves that the processor has the features.
        Register(unsafe {
            sixteen_weights(
                levels,
                _mm512_set1_ps(self.prime),
                _mm512_set1_ps(self.scale),
            )
        })
    }
}

/// Weights after the inverse rotation, with the signs of the columns, and rounded.
struct Rounded<'a, T> {
    norm: f32,
    signs: &'a [u8],
    out: &'a mut [[T; 16]],
}

impl<T: Element> Sink<Register> for Rounded<'_, T> {
    #[inline(always)]
    fn store(&mut self, _: &mut [[f32; 16]], index: usize, register: Register) {
        let register = register.scale(self.norm).flip(self.signs, index);
        T::put(register, &mut self.out[index]);
    }
}

/// Computes `scale * (prime * level)` for sixteen levels.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn sixteen_weights(levels: &[u8; 16], prime: __m512, scale: __m512) -> __m512 {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    let levels = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    let levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels));
    // The product of integers is exact: the only rounding is that of the scale.
    _mm512_mul_ps(scale, _mm512_mul_ps(prime, levels))
}

impl Numbers<16> for Register {
    #[inline(always)]
    fn put_f32(self, out: &mut [f32; 16]) {
        hadamard::Register::store(self, out);
    }

    #[inline(always)]
    fn put_f16(self, out: &mut [f16; 16]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { store_f16(self.0, out) }
    }

    #[inline(always)]
    fn put_bf16(self, out: &mut [bf16; 16]) {
        // SAFETY: as above.
        unsafe {
            let halves = _mm512_srli_epi32::<16>(rounded_up(self.0));
            store_16(bytemuck::cast_mut(out), _mm512_cvtepi32_epi16(halves));
        }
    }
}

/// Rounding mode: to nearest, ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Adds to the bits of finite numbers, so that their upper halves are the BF16 values.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded_up(weights: __m512) -> __m512i {
    let bits = _mm512_castps_si512(weights);
    let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let half_less = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    _mm512_add_epi32(half_less, is_odd)
}

/// Rounds normal numbers and zeros to BF16 with one instruction,
/// which treats all others as 0.
///
/// Only for processors that have it, avx512bf16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn rounded([low, high]: [__m512; 2]) -> __m512i {
    let halves;
    // Not the intrinsic: it is inlined only into functions that are compiled for such
    // processors alone. SAFETY: registers only; the caller has made sure that the processor
    // has the instruction.
    unsafe {
        asm!(
            "vcvtne2ps2bf16 {halves}, {high}, {low}",
            halves = lateout(zmm_reg) halves,
            high = in(zmm_reg) high,
            low = in(zmm_reg) low,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    halves
}

/// Rounds finite numbers to BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves(weights: [__m512; 2]) -> __m512i {
    let rounded = [rounded_up(weights[0]), rounded_up(weights[1])];
    let mut odd = [0u16; 32];
    for (i, word) in odd.iter_mut().enumerate() {
        *word = 2 * i as u16 + 1;
    }
    _mm512_permutex2var_epi16(rounded[0], load_u16(&odd), rounded[1])
}

/// Converts each element with [`half::bf16::from_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn to_bf16(x: &[f32], out: &mut [bf16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values = load_f32(x);
        let bits = _mm512_castps_si512(values);
        let rounded = rounded_up(values);
        // Rounding could turn a NaN into an infinity; here it only becomes quiet.
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

/// Converts each element with [`half::f16::from_f32`].
#[target_feature(enable = "avx512f")]
pub(super) fn to_f16(x: &[f32], out: &mut [f16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        store_f16(load_f32(x), out);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = f16::from_f32(*x);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_f16(weights: __m512, out: &mut [f16; 16]) {
    store_16(bytemuck::cast_mut(out), _mm512_cvtps_ph::<NEAREST>(weights));
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_16(out: &mut [u16; 16], values: __m256i) {
    // SAFETY: 16 values are 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), values) };
}

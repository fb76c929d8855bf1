//! AVX-512 kernels with VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later).
//!
//! Weights become unsigned bytes `level + 128`, and activations are two planes of signed bytes
//! ([`Activations`]). One `vpdpbusd` per plane multiplies 64 pairs. Sums of up to 64 products are
//! exact. The offsets that come with the activations subtract the contribution of the 128.

mod decode;
mod hadamard;
mod levels;
mod many;
mod product;
mod quantize;
mod sparse;

use super::activations::Activations;
use super::attention;
use super::decode::Element;
use super::lanes::Lanes;
use super::many::{Panel, Rows};
use super::scalar::Signs;
use super::views::{Entries, Strip};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// The first 256 primes as 16-bit numbers, one register per row.
static PRIMES: PrimeTable = PrimeTable({
    let mut rows = [[0; 32]; 8];
    let mut i = 0;
    while i < 256 {
        rows[i / 32][i % 32] = PRIME_LUT[i] as u16;
        i += 1;
    }
    rows
});

#[repr(align(64))]
struct PrimeTable([[u16; 32]; 8]);

/// AVX-512 kernels. A value proves that this machine has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512 {
    /// Flag: the processor can also round to BF16 in one instruction.
    bf16: bool,
}

impl Avx512 {
    /// Returns `None` if the processor or the system lacks one of AVX-512 F, BW, VL,
    /// VBMI, VBMI2, VNNI.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("popcnt");
        let bf16 = is_x86_feature_detected!("avx512bf16");
        has.then_some(Self { bf16 })
    }

    /// Returns the same kernels without the BF16 instruction.
    #[cfg(test)]
    pub(super) fn without_bf16(self) -> Self {
        Self { bf16: false }
    }

    /// Computes `out[i] = ` row `i` of a strip times `x`.
    pub(crate) fn multiply(self, strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { product::multiply(strip, x, out) }
    }

    /// Multiplies the rows of a strip by each vector.
    pub(crate) fn multiply_many<'a>(
        self,
        strip: Strip<'_>,
        vectors: &[Activations],
        panel: &'a mut Panel,
    ) -> &'a [Rows] {
        // SAFETY: as above.
        unsafe { many::multiply(strip, vectors, panel) }
    }

    /// Runs [`super::Kernels::decode`].
    pub(crate) fn decode<T: Element>(
        self,
        strip: Strip<'_>,
        rotation: Option<&Rotation>,
        streamed: bool,
        out: &mut [T],
    ) {
        // SAFETY: as above.
        unsafe { decode::decode(self, strip, rotation, streamed, out) }
    }

    /// Runs [`super::sparse::decode`].
    pub(crate) fn decode_entries<T: Element>(self, entries: Entries<'_>, out: &mut [T]) {
        // SAFETY: as above.
        unsafe { sparse::decode(self, entries, out) }
    }

    /// Runs [`super::sparse::dot`], equal up to rounding.
    pub(crate) fn dot_entries(self, entries: Entries<'_>, x: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { sparse::dot(entries, x) }
    }

    /// Converts each element with [`bf16::from_f32`]; the lengths are equal.
    pub(crate) fn to_bf16(self, x: &[f32], out: &mut [bf16]) {
        // SAFETY: as above.
        unsafe { decode::to_bf16(x, out) }
    }

    /// Converts each element with [`f16::from_f32`]; the lengths are equal.
    pub(crate) fn to_f16(self, x: &[f32], out: &mut [f16]) {
        // SAFETY: as above.
        unsafe { decode::to_f16(x, out) }
    }

    /// Runs [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        #[target_feature(enable = "avx512f")]
        fn compiled(proof: Avx512, task: attention::Task<'_>) {
            attention::attend::<Register, 8>(proof, task);
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { compiled(self, task) }
    }

    /// Runs [`super::activations::quantize`].
    pub(crate) fn quantize(self, x: &[f32], out: &mut Activations) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { quantize::quantize(x, out) }
    }

    /// Runs [`super::scalar::transform`].
    pub(crate) fn transform(self, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { hadamard::transform(self, x, factor, signs) }
    }
}

/// Vector of sixteen f32. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Register(__m512);

// Always inlined, into a function that is compiled for the instructions.
impl Lanes for Register {
    type Proof = Avx512;

    #[inline(always)]
    fn splat(_: Avx512, value: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, also below.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(_: Avx512, values: &[f32; 16]) -> Self {
        // SAFETY: as above.
        Self(unsafe { load_f32(values) })
    }

    #[inline(always)]
    fn widen(_: Avx512, values: &[f16; 16]) -> Self {
        // SAFETY: as above; the reference is to 32 readable bytes, and the load needs no alignment.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves that the processor has the features.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        // SAFETY: as above; 16 floats are 64 bytes, and the store needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }
}

/// Loads all 64 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_i8(bytes: &[i8; 64]) -> __m512i {
    load(bytemuck::cast_ref(bytes))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_u16(values: &[u16; 32]) -> __m512i {
    load(bytemuck::cast_ref(values))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load_f32(values: &[f32; 16]) -> __m512 {
    _mm512_castsi512_ps(load(bytemuck::cast_ref(values)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &mut [u8; 64], bytes: __m512i) {
    // SAFETY: the reference is to 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), bytes) };
}

/// Stores past the caches; `out` is aligned to a cache line.
#[inline]
#[target_feature(enable = "avx512f")]
fn stream(bytes: __m512i, out: &mut [u8; 64]) {
    assert!(out.as_ptr().cast::<__m512i>().is_aligned());
    // SAFETY: the reference is to 64 bytes, aligned as the store needs it.
    unsafe { _mm512_stream_si512(out.as_mut_ptr().cast(), bytes) };
}

/// Loads all 32 bytes.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_half(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Prefetches the cache line `at` bytes after the start of `bytes`,
/// which may lie past its end.
///
/// `HINT` selects the cache.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch<const HINT: i32>(bytes: &[u8], at: usize) {
    // A prefetch has no observable effect and never faults.
    _mm_prefetch::<HINT>(bytes.as_ptr().wrapping_add(at).cast());
}

/// Converts levels to unsigned bytes, `level + 128`.
#[inline]
#[target_feature(enable = "avx512f")]
fn biased(levels: __m512i) -> __m512i {
    _mm512_xor_si512(levels, _mm512_set1_epi8(-128))
}

/// Copies a codebook of 16 biased levels into each quarter of a register.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn codebook_register(codebook: &[i8; 16]) -> __m512i {
    let quarter = u128::from_le_bytes(bytemuck::cast(*codebook));
    let bytes: [u8; 64] = bytemuck::cast([quarter; 4]);
    biased(load(&bytes))
}

/// Looks up the primes of 64 indices.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn primes_of(indices: &[u8; 64]) -> [__m512; 4] {
    let [low, high] = bytemuck::cast_ref::<_, [[u8; 32]; 2]>(indices);
    let (low, high) = (primes_of_half(low), primes_of_half(high));
    [
        to_floats(_mm512_castsi512_si256(low)),
        to_floats(_mm512_extracti64x4_epi64::<1>(low)),
        to_floats(_mm512_castsi512_si256(high)),
        to_floats(_mm512_extracti64x4_epi64::<1>(high)),
    ]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn to_floats(values: __m256i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(values))
}

/// Looks up the primes of 32 indices, as 16-bit numbers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn primes_of_half(indices: &[u8; 32]) -> __m512i {
    let indices = _mm512_cvtepu8_epi16(load_half(indices));
    // Four tables of 64 entries each; bits 6 and 7 of an index select the table.
    let bit6 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(64));
    let bit7 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(128));
    let mut halves = [indices; 2];
    for (half, rows) in halves.iter_mut().zip(PRIMES.0.as_chunks::<4>().0) {
        let [a, b, c, d] = rows;
        let first = _mm512_permutex2var_epi16(load_u16(a), indices, load_u16(b));
        let second = _mm512_permutex2var_epi16(load_u16(c), indices, load_u16(d));
        *half = _mm512_mask_blend_epi16(bit6, first, second);
    }
    _mm512_mask_blend_epi16(bit7, halves[0], halves[1])
}

#[inline]
#[target_feature(enable = "avx512f")]
fn to_array(values: __m512) -> [f32; 16] {
    let mut out = [0.0; 16];
    // SAFETY: 16 floats are 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
    out
}

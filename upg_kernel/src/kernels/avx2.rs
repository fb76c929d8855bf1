//! AVX2, FMA and F16C kernels (Haswell, Zen and later).
//!
//! Like in [`super::avx512`], weights become unsigned bytes `level + 128`, and activations are two
//! planes of signed bytes ([`Activations`](super::activations::Activations)). `vpmaddubsw` adds two
//! products in int16, which cannot saturate: 255 * 64 * 2 = 32,640. `vpmaddwd` adds two of those
//! sums in int32, those of the high plane times 128, so that every sum is exact. A step is 64
//! columns, which share a scale of the activations.

mod decode;
mod hadamard;
mod levels;
mod many;
mod product;
mod quantize;
mod tiles;
mod trellis;

use super::activations::Activations;
use super::attention;
use super::decode::Element;
use super::lanes::Lanes;
use super::many::{Panel, Rows};
use super::scalar::Signs;
use super::sparse;
use super::views::{Entries, Strip};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;

/// The first 256 primes.
static PRIMES: [f32; 256] = {
    let mut primes = [0.0; 256];
    let mut i = 0;
    while i < 256 {
        primes[i] = PRIME_LUT[i] as f32;
        i += 1;
    }
    primes
};

/// AVX2 kernels. A value proves that this machine has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// Returns `None` if the processor or the system lacks one of AVX2, FMA, F16C, POPCNT, BMI2.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt")
            && is_x86_feature_detected!("bmi2");
        has.then_some(Self(()))
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

    /// Runs [`super::activations::quantize`], bit-identical.
    pub(crate) fn quantize(self, x: &[f32], out: &mut Activations) {
        // SAFETY: as above.
        unsafe { quantize::quantize(x, out) }
    }

    /// Runs [`super::scalar::transform`].
    pub(crate) fn transform(self, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        // SAFETY: as above.
        unsafe { hadamard::transform(self, x, factor, signs) }
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

    /// Runs [`sparse::dot`].
    pub(crate) fn dot_entries(self, entries: Entries<'_>, x: &[f32]) -> f32 {
        #[target_feature(enable = "avx2,fma")]
        fn compiled(proof: Avx2, entries: Entries<'_>, x: &[f32]) -> f32 {
            sparse::dot::<Registers>(proof, entries, x)
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { compiled(self, entries, x) }
    }

    /// Runs [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled(proof: Avx2, task: attention::Task<'_>) {
            attention::attend::<Registers, 4>(proof, task);
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { compiled(self, task) }
    }
}

/// Vector of sixteen f32. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Registers([__m256; 2]);

// Always inlined, into a function that is compiled for the instructions.
impl Lanes for Registers {
    type Proof = Avx2;

    #[inline(always)]
    fn splat(_: Avx2, value: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, also below.
        Self([unsafe { _mm256_set1_ps(value) }; 2])
    }

    #[inline(always)]
    fn load(_: Avx2, values: &[f32; 16]) -> Self {
        let start = values.as_ptr();
        // SAFETY: as above; the reference is to 16 readable floats,
        // and the loads need no alignment.
        Self(unsafe { [_mm256_loadu_ps(start), _mm256_loadu_ps(start.add(8))] })
    }

    #[inline(always)]
    fn widen(_: Avx2, values: &[f16; 16]) -> Self {
        let start: *const __m128i = values.as_ptr().cast();
        // SAFETY: as above; the reference is to 32 readable bytes.
        let halves = unsafe { [_mm_loadu_si128(start), _mm_loadu_si128(start.add(1))] };
        // SAFETY: as above.
        Self(unsafe { [_mm256_cvtph_ps(halves[0]), _mm256_cvtph_ps(halves[1])] })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves that the processor has the features.
        Self(unsafe {
            [
                _mm256_fmadd_ps(self.0[0], b.0[0], c.0[0]),
                _mm256_fmadd_ps(self.0[1], b.0[1], c.0[1]),
            ]
        })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        let start = out.as_mut_ptr();
        // SAFETY: as above; the reference is to 16 floats, and the stores need no alignment.
        unsafe {
            _mm256_storeu_ps(start, self.0[0]);
            _mm256_storeu_ps(start.add(8), self.0[1]);
        }
    }
}

/// Loads all 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_i32(values: &[i32; 8]) -> __m256i {
    load(bytemuck::cast_ref(values))
}

/// Loads all 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn load_half(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

/// Prefetches the cache line `at` bytes after the start of `bytes`,
/// which may lie past its end.
#[inline]
#[target_feature(enable = "avx2")]
fn prefetch(bytes: &[u8], at: usize) {
    // A prefetch has no observable effect and never faults.
    _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast());
}

/// Converts levels to unsigned bytes, `level + 128`.
#[inline]
#[target_feature(enable = "avx2")]
fn biased(levels: __m256i) -> __m256i {
    _mm256_xor_si256(levels, _mm256_set1_epi8(-128))
}

/// Copies 16 bytes into both halves of a register.
#[inline]
#[target_feature(enable = "avx2")]
fn twice(bytes: &[u8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(load_half(bytes))
}

/// Sums four products per lane, `sum((level + 128) * x)`, for 32 biased levels. Exact.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(levels: __m256i, high: __m256i, low: __m256i) -> __m256i {
    let high = _mm256_maddubs_epi16(levels, high);
    let low = _mm256_maddubs_epi16(levels, low);
    let mut sums = _mm256_add_epi32(
        _mm256_madd_epi16(high, _mm256_set1_epi16(128)),
        _mm256_madd_epi16(low, _mm256_set1_epi16(1)),
    );
    // SAFETY: there is no instruction. It keeps the compiler from adding all high parts first and
    // the low ones later, which would need twice as many registers.
    unsafe {
        asm!("/* {} */", inout(ymm_reg) sums, options(pure, nomem, nostack, preserves_flags))
    };
    sums
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(register: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the reference is to 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), register) }
}

/// Stores past the caches; `out` is aligned.
#[inline]
#[target_feature(enable = "avx2")]
fn stream(register: __m256i, out: &mut [u8; 32]) {
    assert!(out.as_ptr().cast::<__m256i>().is_aligned());
    // SAFETY: the reference is to 32 bytes, aligned as the store needs it.
    unsafe { _mm256_stream_si256(out.as_mut_ptr().cast(), register) };
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_half(register: __m128i, bytes: &mut [u8; 16]) {
    // SAFETY: the reference is to 16 bytes; the store needs no alignment.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), register) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn load_f32(values: &[f32; 8]) -> __m256 {
    _mm256_castsi256_ps(load(bytemuck::cast_ref(values)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_f32(register: __m256, values: &mut [f32; 8]) {
    // SAFETY: the reference is to 8 floats; the store needs no alignment.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), register) }
}

/// Gathers the primes of eight indices.
#[inline]
#[target_feature(enable = "avx2")]
fn primes(indices: &[u8; 8]) -> __m256 {
    let indices = _mm_cvtsi64_si128(i64::from_le_bytes(*indices));
    // SAFETY: a byte is the index of one of the 256 entries, which are 4 bytes apart.
    unsafe { _mm256_i32gather_ps::<4>(PRIMES.as_ptr(), _mm256_cvtepu8_epi32(indices)) }
}

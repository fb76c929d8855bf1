//! Hadamard transform of a rotation.

use super::{Avx2, load_f32, store_f32};
use crate::kernels::hadamard;
use crate::kernels::scalar::Signs;
use std::arch::x86_64::*;

/// Runs [`crate::kernels::scalar::transform`]; 4,096 elements take three passes over memory.
#[target_feature(enable = "avx2,fma")]
pub(super) fn transform(proof: Avx2, x: &mut [f32], factor: f32, signs: Signs<'_>) {
    let (blocks, rest) = x.as_chunks_mut::<8>();
    hadamard::transform_in_place::<Eight>(proof, blocks, rest, factor, signs);
}

/// Vector of eight f32. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Eight(__m256);

// Always inlined, into a function that is compiled for the instructions.
impl hadamard::Register for Eight {
    type Proof = Avx2;
    type Block = [f32; 8];
    /// Half of all registers: sums and differences take one more.
    const TOGETHER: usize = 8;

    #[inline(always)]
    fn load(_: Avx2, block: &[f32; 8]) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` or an
        // element does.
        Self(unsafe { load_f32(block) })
    }

    #[inline(always)]
    fn store(self, block: &mut [f32; 8]) {
        // SAFETY: as above.
        unsafe { store_f32(self.0, block) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn scale(self, factor: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm256_mul_ps(self.0, _mm256_set1_ps(factor)) })
    }

    #[inline(always)]
    fn flip(self, signs: &[u8], index: usize) -> Self {
        // SAFETY: as above.
        Self(unsafe { flip_register(self.0, signs[index]) })
    }

    /// Transforms over spans 1, 2 and 4.
    #[inline(always)]
    fn within<const N: usize>(registers: &mut [Self; N]) {
        for Self(v) in registers {
            // SAFETY: as above.
            unsafe {
                *v = pairs::<0b1010_1010>(*v, _mm256_permute_ps::<0b10_11_00_01>(*v));
                *v = pairs::<0b1100_1100>(*v, _mm256_permute_ps::<0b01_00_11_10>(*v));
                *v = pairs::<0b1111_0000>(*v, _mm256_permute2f128_ps::<0b0000_0001>(*v, *v));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn flip_register(v: __m256, signs: u8) -> __m256 {
    // Bit `i` becomes the highest bit of lane `i`.
    let places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    let bits = _mm256_sllv_epi32(_mm256_set1_epi32(i32::from(signs)), places);
    let sign = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MIN));
    _mm256_xor_ps(v, _mm256_castsi256_ps(sign))
}

/// Computes `v + other`, and `other - v` in lanes whose bit in `SECOND` is set, the second of
/// each pair.
///
/// A product with 1 or -1 is exact: the only rounding is that of the sum.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn pairs<const SECOND: i32>(v: __m256, other: __m256) -> __m256 {
    let sign = _mm256_blend_ps::<SECOND>(_mm256_set1_ps(1.0), _mm256_set1_ps(-1.0));
    _mm256_fmadd_ps(v, sign, other)
}

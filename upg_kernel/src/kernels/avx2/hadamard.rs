//! The transform of a rotation.

use super::*;
use crate::kernels::hadamard;

/// As [`crate::kernels::scalar::transform`]; 4,096 elements take three passes over memory.
#[target_feature(enable = "avx2")]
pub(super) fn transform(proof: Avx2, x: &mut [f32], factor: f32, signs: Signs<'_>) {
    let (blocks, rest) = x.as_chunks_mut::<8>();
    hadamard::transform_in_place::<Eight>(proof, blocks, rest, factor, signs);
}

/// Eight f32. A value is the proof that this machine has the instructions.
#[derive(Clone, Copy)]
struct Eight(__m256);

// These are always put in their place, in a function that is compiled for the instructions.
impl hadamard::Register for Eight {
    type Proof = Avx2;
    type Block = [f32; 8];

    #[inline(always)]
    fn load(_: Avx2, block: &[f32; 8]) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` or an element does; the
        // reference is to 8 floats, and neither load nor store needs an alignment.
        Self(unsafe { _mm256_loadu_ps(block.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, block: &mut [f32; 8]) {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(block.as_mut_ptr(), self.0) }
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
        unsafe {
            // The bit of each element in the place of its sign.
            let places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
            let bits = _mm256_sllv_epi32(_mm256_set1_epi32(i32::from(signs[index])), places);
            let sign = _mm256_and_si256(bits, _mm256_set1_epi32(i32::MIN));
            Self(_mm256_xor_ps(self.0, _mm256_castsi256_ps(sign)))
        }
    }

    /// Spans 1, 2 and 4.
    #[inline(always)]
    fn within<const N: usize>(registers: &mut [Self; N]) {
        // SAFETY: as above.
        unsafe {
            for Self(v) in registers.iter_mut() {
                // The second of each pair becomes first - second.
                let other = _mm256_permute_ps::<0b10_11_00_01>(*v);
                let (sum, difference) = (_mm256_add_ps(*v, other), _mm256_sub_ps(other, *v));
                *v = _mm256_blend_ps::<0b1010_1010>(sum, difference);
            }
            for Self(v) in registers.iter_mut() {
                let other = _mm256_permute_ps::<0b01_00_11_10>(*v);
                let (sum, difference) = (_mm256_add_ps(*v, other), _mm256_sub_ps(other, *v));
                *v = _mm256_blend_ps::<0b1100_1100>(sum, difference);
            }
            for Self(v) in registers.iter_mut() {
                let other = _mm256_permute2f128_ps::<0b0000_0001>(*v, *v);
                let (sum, difference) = (_mm256_add_ps(*v, other), _mm256_sub_ps(other, *v));
                *v = _mm256_blend_ps::<0b1111_0000>(sum, difference);
            }
        }
    }
}

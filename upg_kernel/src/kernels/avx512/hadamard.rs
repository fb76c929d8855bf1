//! Hadamard transform of a rotation.

use super::{Avx512, Register, load_f32, to_array};
use crate::kernels::hadamard;
use crate::kernels::scalar::Signs;
use std::arch::x86_64::*;

/// Runs [`crate::kernels::scalar::transform`]; 4,096 elements take two passes over memory.
#[target_feature(enable = "avx512f")]
pub(super) fn transform(proof: Avx512, x: &mut [f32], factor: f32, signs: Signs<'_>) {
    let (blocks, rest) = x.as_chunks_mut::<16>();
    hadamard::transform_in_place::<Register>(proof, blocks, rest, factor, signs);
}

// Always inlined, into a function that is compiled for the instructions.
impl hadamard::Register for Register {
    type Proof = Avx512;
    type Block = [f32; 16];

    #[inline(always)]
    fn load(_: Avx512, block: &[f32; 16]) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` or an
        // element does.
        Self(unsafe { load_f32(block) })
    }

    #[inline(always)]
    fn store(self, block: &mut [f32; 16]) {
        // SAFETY: as above.
        *block = unsafe { to_array(self.0) };
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn scale(self, factor: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_mul_ps(self.0, _mm512_set1_ps(factor)) })
    }

    #[inline(always)]
    fn flip(self, signs: &[u8], index: usize) -> Self {
        let signs = u16::from_le_bytes(signs.as_chunks().0[index]);
        // SAFETY: as above.
        Self(unsafe { flip_register(self.0, signs) })
    }

    /// Transforms over spans 1, 2, 4 and 8.
    #[inline(always)]
    fn within<const N: usize>(registers: &mut [Self; N]) {
        // SAFETY: as above.
        unsafe {
            for Self(v) in registers.iter_mut() {
                *v = pairs::<0xAAAA>(*v, _mm512_permute_ps::<0b10_11_00_01>(*v));
            }
            for Self(v) in registers.iter_mut() {
                *v = pairs::<0xCCCC>(*v, _mm512_permute_ps::<0b01_00_11_10>(*v));
            }
            for Self(v) in registers.iter_mut() {
                *v = pairs::<0xF0F0>(*v, _mm512_shuffle_f32x4::<0b10_11_00_01>(*v, *v));
            }
            for Self(v) in registers.iter_mut() {
                *v = pairs::<0xFF00>(*v, _mm512_shuffle_f32x4::<0b01_00_11_10>(*v, *v));
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn flip_register(v: __m512, signs: u16) -> __m512 {
    let bits = _mm512_castps_si512(v);
    let sign = _mm512_set1_epi32(i32::MIN);
    _mm512_castsi512_ps(_mm512_mask_xor_epi32(bits, signs, bits, sign))
}

/// Computes `v + other`, and `other - v` in lanes whose bit in `SECOND` is set, the second of
/// each pair.
///
/// A product with 1 or -1 is exact: the only rounding is that of the sum.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs<const SECOND: u16>(v: __m512, other: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    let sign = _mm512_mask_sub_ps(one, SECOND, _mm512_setzero_ps(), one);
    _mm512_fmadd_ps(v, sign, other)
}

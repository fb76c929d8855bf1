//! Hadamard transform of a rotation.

use super::{Neon, load_f32, store_f32};
use crate::kernels::hadamard;
use crate::kernels::scalar::Signs;
use std::arch::aarch64::*;

/// Runs [`crate::kernels::scalar::transform`]; 4,096 elements take three passes over memory.
#[target_feature(enable = "neon")]
pub(super) fn transform(proof: Neon, x: &mut [f32], factor: f32, signs: Signs<'_>) {
    let (blocks, rest) = x.as_chunks_mut::<4>();
    hadamard::transform_in_place::<Four>(proof, blocks, rest, factor, signs);
}

/// Vector of four f32. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Four(float32x4_t);

// Always inlined, into a function that is compiled for the instructions.
impl hadamard::Register for Four {
    type Proof = Neon;
    type Block = [f32; 4];

    #[inline(always)]
    fn load(_: Neon, block: &[f32; 4]) -> Self {
        // SAFETY: the argument proves that the processor has the features, and below `self` or an
        // element does.
        Self(unsafe { load_f32(block) })
    }

    #[inline(always)]
    fn store(self, block: &mut [f32; 4]) {
        // SAFETY: as above.
        unsafe { store_f32(block, self.0) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { vaddq_f32(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { vsubq_f32(self.0, other.0) })
    }

    #[inline(always)]
    fn scale(self, factor: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { vmulq_n_f32(self.0, factor) })
    }

    #[inline(always)]
    fn flip(self, signs: &[u8], index: usize) -> Self {
        let signs = u32::from(signs[index / 2] >> (4 * (index % 2)));
        // SAFETY: as above; four places are readable.
        unsafe {
            // Shifts the bit of each element to its sign.
            let places = vld1q_s32([31, 30, 29, 28].as_ptr());
            let bits = vshlq_u32(vdupq_n_u32(signs), places);
            let sign = vandq_u32(bits, vdupq_n_u32(1 << 31));
            let flipped = veorq_u32(vreinterpretq_u32_f32(self.0), sign);
            Self(vreinterpretq_f32_u32(flipped))
        }
    }

    /// Transforms over spans 1 and 2.
    #[inline(always)]
    fn within<const N: usize>(registers: &mut [Self; N]) {
        for Self(v) in registers {
            // SAFETY: as above.
            unsafe {
                // a + b, a - b, c + d, c - d from a, b, c, d, and then the same with a, c and b, d.
                let (even, odd) = (vtrn1q_f32(*v, *v), vtrn2q_f32(*v, *v));
                let sums = vtrn1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
                let (low, high) = (vget_low_f32(sums), vget_high_f32(sums));
                *v = vcombine_f32(vadd_f32(low, high), vsub_f32(low, high));
            }
        }
    }
}

//! NEON kernels, for every 64-bit ARM processor.
//!
//! They use the byte dot product `sdot` where the processor has it (Apple M1, Neoverse N1,
//! Cortex-A55 and later). A register holds four rows of a tile. Levels and both planes of the
//! activations ([`Activations`]) are signed bytes. One `sdot` per plane multiplies 16 levels
//! by the four activations of their columns, which are a lane of a register with the
//! activations of four tiles. Each plane has its own sums, and a group ends with
//! `128 * high + low`. All of this is exact.

mod dot;
mod hadamard;
mod levels;
mod many;
mod product;
mod tiles;
mod trellis;

use super::activations::Activations;
use super::lanes::Lanes;
use super::scalar::Signs;
use super::views::{Entries, Strip};
use super::{attention, sparse};
use crate::prime_lut::PRIME_LUT;
use dot::{Sdot, Widened};
use half::f16;
pub(crate) use many::Panel;
use std::arch::aarch64::*;
use std::arch::asm;

/// NEON kernels. A value proves that this machine has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Neon {
    /// Byte dot products, if this machine has them.
    sdot: Option<Sdot>,
    widened: Widened,
}

impl Neon {
    /// Returns `None` if the processor or the system lacks NEON.
    pub fn new() -> Option<Self> {
        let widened = Widened::new()?;
        let sdot = Sdot::new();
        Some(Self { sdot, widened })
    }

    /// Returns whether products use `sdot`.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn has_sdot(self) -> bool {
        self.sdot.is_some()
    }

    /// Computes `out[i] = ` row `i` of a strip times `x`.
    pub(crate) fn multiply(self, strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe {
            match self.sdot {
                Some(dot) => product::multiply(dot, strip, x, out),
                None => product::multiply(self.widened, strip, x, out),
            }
        }
    }

    /// Multiplies the rows of a strip by each vector.
    pub(crate) fn multiply_many<'a>(
        self,
        strip: Strip<'_>,
        vectors: &[Activations],
        panel: &'a mut Panel,
    ) -> &'a [[f32; 64]] {
        // SAFETY: as above.
        unsafe {
            match self.sdot {
                Some(dot) => many::multiply(dot, strip, vectors, panel),
                None => many::multiply(self.widened, strip, vectors, panel),
            }
        }
    }

    /// Runs [`super::scalar::transform`].
    pub(crate) fn transform(self, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        // SAFETY: as above.
        unsafe { hadamard::transform(self, x, factor, signs) }
    }

    /// Runs [`sparse::dot`].
    pub(crate) fn dot_entries(self, entries: Entries<'_>, x: &[f32]) -> f32 {
        #[target_feature(enable = "neon")]
        fn compiled(proof: Neon, entries: Entries<'_>, x: &[f32]) -> f32 {
            sparse::dot::<Registers>(proof, entries, x)
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { compiled(self, entries, x) }
    }

    /// Runs [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        #[target_feature(enable = "neon")]
        fn compiled(proof: Neon, task: attention::Task<'_>) {
            attention::attend::<Registers, 4>(proof, task);
        }
        // SAFETY: as above.
        unsafe { compiled(self, task) }
    }
}

/// Vector of sixteen f32. A value proves that this machine has the instructions.
#[derive(Clone, Copy)]
struct Registers([float32x4_t; 4]);

// Always inlined, into a function that is compiled for the instructions.
impl Lanes for Registers {
    type Proof = Neon;

    #[inline(always)]
    fn splat(_: Neon, value: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, also below.
        Self([unsafe { vdupq_n_f32(value) }; 4])
    }

    #[inline(always)]
    fn load(_: Neon, values: &[f32; 16]) -> Self {
        let [a, b, c, d] = bytemuck::cast_ref::<_, [[f32; 4]; 4]>(values);
        // SAFETY: as above.
        Self(unsafe { [load_f32(a), load_f32(b), load_f32(c), load_f32(d)] })
    }

    #[inline(always)]
    fn widen(_: Neon, values: &[f16; 16]) -> Self {
        let [first, second] = bytemuck::cast_ref::<_, [[u8; 16]; 2]>(values);
        // SAFETY: as above.
        unsafe {
            let first = vreinterpretq_f16_u8(load(first));
            let second = vreinterpretq_f16_u8(load(second));
            Self([
                vcvt_f32_f16(vget_low_f16(first)),
                vcvt_high_f32_f16(first),
                vcvt_f32_f16(vget_low_f16(second)),
                vcvt_high_f32_f16(second),
            ])
        }
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        let mut sums = c.0;
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: `self` proves that the processor has the features.
            *sum = unsafe { vfmaq_f32(*sum, self.0[i], b.0[i]) };
        }
        Self(sums)
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        for (out, values) in out.as_chunks_mut().0.iter_mut().zip(self.0) {
            // SAFETY: as above.
            unsafe { store_f32(out, values) };
        }
    }
}

/// Loads all 16 bytes.
#[inline]
#[target_feature(enable = "neon")]
fn load(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_i8(bytes: &[i8; 16]) -> int8x16_t {
    vreinterpretq_s8_u8(load(bytemuck::cast_ref(bytes)))
}

#[inline]
#[target_feature(enable = "neon")]
fn store(out: &mut [u8; 16], bytes: uint8x16_t) {
    // SAFETY: the reference is to 16 bytes; the store needs no alignment.
    unsafe { vst1q_u8(out.as_mut_ptr(), bytes) }
}

#[inline]
#[target_feature(enable = "neon")]
fn load_f32(values: &[f32; 4]) -> float32x4_t {
    // SAFETY: the reference is to four readable floats; the load needs no alignment.
    unsafe { vld1q_f32(values.as_ptr()) }
}

#[inline]
#[target_feature(enable = "neon")]
fn store_f32(out: &mut [f32; 4], values: float32x4_t) {
    // SAFETY: the reference is to four floats; the store needs no alignment.
    unsafe { vst1q_f32(out.as_mut_ptr(), values) }
}

/// Prefetches the cache line `at` bytes after the start of `bytes`,
/// which may lie past its end.
#[inline]
#[target_feature(enable = "neon")]
fn prefetch(bytes: &[u8], at: usize) {
    let address = bytes.as_ptr().wrapping_add(at);
    // SAFETY: a prefetch has no observable effect and never faults.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
}

/// Looks up the primes of four indices.
#[inline]
#[target_feature(enable = "neon")]
fn primes_of(indices: &[u8; 4]) -> float32x4_t {
    let primes = indices.map(|index| PRIME_LUT[usize::from(index)]);
    // SAFETY: the array has four numbers; the load needs no alignment.
    vcvtq_f32_u32(unsafe { vld1q_u32(primes.as_ptr()) })
}

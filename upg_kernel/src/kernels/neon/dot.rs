//! Sums of products of bytes.

use std::arch::aarch64::*;
use std::arch::asm;
use std::arch::is_aarch64_feature_detected;

/// Method of adding up products. A value proves that this machine has the instructions.
pub(super) trait Dot: Copy {
    /// Adds to each lane the products of its four levels with the activations
    /// in lane `TILE` of `x`.
    ///
    /// The four levels are a row of a tile; the activations are from -64 to 63. Exact.
    fn add<const TILE: i32>(self, sums: int32x4_t, levels: int8x16_t, x: int8x16_t) -> int32x4_t;
}

/// Products with `sdot`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sdot(());

impl Sdot {
    pub(super) fn new() -> Option<Self> {
        let has = is_aarch64_feature_detected!("neon") && is_aarch64_feature_detected!("dotprod");
        has.then_some(Self(()))
    }
}

impl Dot for Sdot {
    #[inline(always)]
    fn add<const TILE: i32>(
        self,
        mut sums: int32x4_t,
        levels: int8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        // The intrinsic is not stable. The directive only tells the assembler that the
        // instruction exists. SAFETY: `self` proves that the processor has it, and it
        // changes nothing but `sums`.
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {levels:v}.16b, {x:v}.4b[{tile}]",
                sums = inout(vreg) sums,
                levels = in(vreg) levels,
                x = in(vreg) x,
                tile = const TILE,
                options(pure, nomem, nostack, preserves_flags)
            );
        }
        sums
    }
}

/// Products in int16, which are added in pairs there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Widened(());

impl Widened {
    pub(super) fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl Dot for Widened {
    #[inline(always)]
    fn add<const TILE: i32>(self, sums: int32x4_t, levels: int8x16_t, x: int8x16_t) -> int32x4_t {
        // SAFETY: `self` proves that the processor has NEON.
        unsafe {
            let x = vreinterpretq_s8_s32(vdupq_laneq_s32::<TILE>(vreinterpretq_s32_s8(x)));
            // Two products of at most 128 * 64 fit.
            let first = vmull_s8(vget_low_s8(levels), vget_low_s8(x));
            let second = vmull_high_s8(levels, x);
            vpadalq_s16(sums, vpaddq_s16(first, second))
        }
    }
}

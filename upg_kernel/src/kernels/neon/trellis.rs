//! Levels of a `t2`, `t3` or `t4` strip.
//!
//! Like with AVX2, a row of a tile is four weights whose states lie in 32 bits, so each lane of a
//! register decodes one row. Columns 0 and 2 become the halves of the lanes of one register,
//! columns 1 and 3 those of another. The upper bytes of their products with the multiplier of the
//! code ([`crate::trellis_code`]) are in column order.

use super::tiles::Levels;
use super::{load, prefetch};
use crate::kernels::views::PAIRS;
use crate::trellis_code::{STATES, code};
use std::arch::aarch64::*;

/// Prefetch distance in the stream, in bytes.
const AHEAD: usize = 2048;

/// Bytes of the stream for a block if `K` is 4, plus up to one vector.
const MOST: usize = 512 * 4 + 16;

/// Decoder for `t2`, `t3` and `t4`.
pub(super) struct Trellis<'a, const K: usize> {
    /// Stream of this block.
    now: [u8; MOST],
    rest: &'a [u8],
    decoder: Decoder,
}

impl<'a, const K: usize> Trellis<'a, K> {
    #[target_feature(enable = "neon")]
    pub(super) fn new(stream: &'a [u8]) -> Self {
        Self {
            now: [0; MOST],
            rest: stream,
            decoder: Decoder::new::<K>(),
        }
    }
}

impl<const K: usize> Levels for Trellis<'_, K> {
    #[inline(always)]
    fn next(&mut self) {
        let size = 512 * K;
        for line in (0..size).step_by(64) {
            // SAFETY: `self` proves that the processor has the features.
            unsafe { prefetch(self.rest, line + AHEAD) };
        }
        // A strip has 16 more bytes after the last tile. Levels past them are multiplied by zeros.
        let bytes = self.rest.len().min(size + 16);
        self.now[..bytes].copy_from_slice(&self.rest[..bytes]);
        self.rest = self.rest.get(size..).unwrap_or_default();
    }

    #[inline(always)]
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2] {
        // The remainders prove that no bounds check is needed.
        let first = 64 * K * (pair % PAIRS) + 2 * K * (quad % 16);
        [first, first + 32 * K].map(|at| {
            let bytes = self.now[at..].first_chunk().expect("a vector more");
            // SAFETY: as above.
            unsafe { self.decoder.levels::<K>(load(bytes)) }
        })
    }
}

/// Constants that turn the bits of 16 weights into their levels.
struct Decoder {
    /// Byte indices of a row for each lane.
    rows: uint8x16_t,
    /// Bit offset of a row from its first byte, as left shifts.
    starts: int32x4_t,
    multiplier: uint16x8_t,
    coarse: uint8x16_t,
    fine: uint8x16_t,
}

impl Decoder {
    #[target_feature(enable = "neon")]
    fn new<const K: usize>() -> Self {
        let mut rows = [[0; 4]; 4];
        let mut starts = [0; 4];
        for row in 0..4 {
            let bit = 4 * K * row;
            for (i, byte) in rows[row].iter_mut().enumerate() {
                *byte = (bit / 8 + i) as u8;
            }
            starts[row] = -((bit % 8) as i32);
        }
        let code = code::<K>();
        Self {
            rows: load(bytemuck::cast_ref(&rows)),
            // SAFETY: the array has four numbers; the load needs no alignment.
            starts: unsafe { vld1q_s32(starts.as_ptr()) },
            multiplier: vdupq_n_u16(code.multiplier()),
            coarse: load(code.coarse()),
            fine: load(code.fine()),
        }
    }

    /// Returns the levels of 16 weights in stream order,
    /// whose bits start at the start of `bytes`.
    #[inline]
    #[target_feature(enable = "neon")]
    fn levels<const K: usize>(&self, bytes: uint8x16_t) -> int8x16_t {
        let [mut even, mut odd] = self.states::<K>(vqtbl1q_u8(bytes, self.rows));
        if code::<K>().bits() > 7 {
            even = vandq_u16(even, vdupq_n_u16(STATES as u16 - 1));
            odd = vandq_u16(odd, vdupq_n_u16(STATES as u16 - 1));
        }
        let even = vreinterpretq_u8_u16(vmulq_u16(even, self.multiplier));
        let odd = vreinterpretq_u8_u16(vmulq_u16(odd, self.multiplier));
        // The upper bytes.
        let points = vtrn2q_u8(even, odd);
        let mirror = vcltzq_s8(vreinterpretq_s8_u8(points));
        let depth = veorq_u8(points, mirror);
        // Index into `fine`: the depth if it is below 8, else 8 + depth % 8, whichever is smaller.
        let inner = vorrq_u8(vandq_u8(depth, vdupq_n_u8(7)), vdupq_n_u8(8));
        let fine = vqtbl1q_u8(self.fine, vminq_u8(depth, inner));
        let coarse = vqtbl1q_u8(self.coarse, vshrq_n_u8::<3>(depth));
        // Subtracts 128, and mirrors.
        let unbiased = veorq_u8(mirror, vdupq_n_u8(128));
        vreinterpretq_s8_u8(veorq_u8(vaddq_u8(coarse, fine), unbiased))
    }

    /// Returns the states of the weights of four rows, with other bits above them.
    ///
    /// The first register has columns 0 and 2, the second columns 1 and 3.
    #[inline]
    #[target_feature(enable = "neon")]
    fn states<const K: usize>(&self, rows: uint8x16_t) -> [uint16x8_t; 2] {
        let rows = vreinterpretq_u32_u8(rows);
        // The lower halves of the lanes of both.
        let pairs = |a, b| vtrn1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
        match K {
            2 => [
                pairs(rows, vshrq_n_u32::<4>(rows)),
                pairs(vshrq_n_u32::<2>(rows), vshrq_n_u32::<6>(rows)),
            ],
            3 => {
                let rows = vshlq_u32(rows, self.starts);
                [
                    pairs(rows, vshrq_n_u32::<6>(rows)),
                    pairs(vshrq_n_u32::<3>(rows), vshrq_n_u32::<9>(rows)),
                ]
            }
            _ => [
                pairs(rows, vshrq_n_u32::<8>(rows)),
                pairs(vshrq_n_u32::<4>(rows), vshrq_n_u32::<12>(rows)),
            ],
        }
    }
}

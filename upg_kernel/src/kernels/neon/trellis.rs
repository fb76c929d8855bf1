//! The levels of a `t2`, `t3` or `t4` strip.
//!
//! A row of a tile is four weights whose states lie in 32 bits, so that a lane of a register decodes a row.
//! A table look-up brings its bytes there, a few shifts make four bytes of the low six bits of the states and four
//! of the high seven. A look-up in four registers is one in 64 entries.

use super::levels::{Levels, PAIRS};
use super::*;

/// Bytes of the stream that are asked for ahead of their use.
const AHEAD: usize = 2048;

/// Bytes of the stream for a block if `K` is 4, and up to a whole vector more.
const MOST: usize = 512 * 4 + 16;

/// `t2`, `t3` and `t4`. With more than 128 levels `WIDE` has to be true.
pub(super) struct Trellis<'a, const K: usize, const WIDE: bool> {
    /// Of this block.
    now: [u8; MOST],
    rest: &'a [u8],
    decoder: Decoder,
}

impl<'a, const K: usize, const WIDE: bool> Trellis<'a, K, WIDE> {
    #[target_feature(enable = "neon")]
    pub(super) fn new(stream: &'a [u8], shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        Self {
            now: [0; MOST],
            rest: stream,
            decoder: Decoder::new(K, shift_table, level_table),
        }
    }
}

impl<const K: usize, const WIDE: bool> Levels for Trellis<'_, K, WIDE> {
    #[inline(always)]
    fn next(&mut self) {
        let size = 512 * K;
        for line in (0..size).step_by(64) {
            // SAFETY: `self` proves that the processor has the features.
            unsafe { prefetch(self.rest, line + AHEAD) };
        }
        // After the last tile a strip has 16 bytes more. What is past them is multiplied with zeros.
        let bytes = self.rest.len().min(size + 16);
        self.now[..bytes].copy_from_slice(&self.rest[..bytes]);
        self.rest = self.rest.get(size..).unwrap_or_default();
    }

    #[inline(always)]
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2] {
        // The remainders show that no bound has to be checked.
        let first = 64 * K * (pair % PAIRS) + 2 * K * (quad % 16);
        [first, first + 32 * K].map(|at| {
            let bytes = self.now[at..].first_chunk().expect("a vector more");
            // SAFETY: as above.
            unsafe { self.decoder.levels::<K, WIDE>(load(bytes)) }
        })
    }

    #[inline(always)]
    fn ordered(x: int8x16_t) -> int8x16_t {
        match K {
            4 => {
                let order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
                // SAFETY: there are registers only where the processor has the features.
                unsafe { vqtbl1q_s8(x, load(&order)) }
            }
            _ => x,
        }
    }
}

/// What turns the bits of 16 weights into their levels.
struct Decoder {
    /// The bytes of a row for each lane.
    rows: uint8x16_t,
    /// By how many bits a row starts later than its first byte, as shifts to the left.
    starts: int32x4_t,
    shifts: uint8x16x4_t,
    levels: [uint8x16x4_t; 4],
}

impl Decoder {
    #[target_feature(enable = "neon")]
    fn new(k: usize, shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        let mut rows = [[0; 4]; 4];
        let mut starts = [0; 4];
        for row in 0..4 {
            let bit = 4 * k * row;
            for (i, byte) in rows[row].iter_mut().enumerate() {
                *byte = (bit / 8 + i) as u8;
            }
            starts[row] = -((bit % 8) as i32);
        }
        let mut levels = [table_of(&[0; 64]); 4];
        for (levels, table) in levels.iter_mut().zip(level_table.as_chunks::<64>().0) {
            *levels = table_of(bytemuck::cast_ref(table));
        }
        Self {
            rows: load(bytemuck::cast_ref(&rows)),
            // SAFETY: the array has four numbers; the load needs no alignment.
            starts: unsafe { vld1q_s32(starts.as_ptr()) },
            shifts: table_of(shift_table),
            levels,
        }
    }

    /// The levels of 16 weights whose bits start with those of `bytes`; those of a row in the order 0, 2, 1, 3 if `K`
    /// is 4.
    #[inline]
    #[target_feature(enable = "neon")]
    fn levels<const K: usize, const WIDE: bool>(&self, bytes: uint8x16_t) -> int8x16_t {
        let (low, mut high) = self.split::<K>(vqtbl1q_u8(bytes, self.rows));
        if WIDE {
            high = vandq_u8(high, vdupq_n_u8(127));
        }
        let shift = vqtbl4q_u8(self.shifts, vandq_u8(low, vdupq_n_u8(63)));
        let mut index = vaddq_u8(shift, high);
        if !WIDE {
            index = vandq_u8(index, vdupq_n_u8(127));
        }
        // What is not among 64 entries is 0.
        let [first, rest @ ..] = self.levels;
        let mut levels = vqtbl4q_u8(first, index);
        for table in rest.into_iter().take(if WIDE { 3 } else { 1 }) {
            index = vsubq_u8(index, vdupq_n_u8(64));
            levels = vorrq_u8(levels, vqtbl4q_u8(table, index));
        }
        vreinterpretq_s8_u8(levels)
    }

    /// The low 6 and the high 7 bits of the states of four weights in each lane, as bytes with other bits above
    /// them.
    #[inline]
    #[target_feature(enable = "neon")]
    fn split<const K: usize>(&self, rows: uint8x16_t) -> (uint8x16_t, uint8x16_t) {
        let row = vreinterpretq_u32_u8(rows);
        // What is to be in the upper halves of each lane or each pair comes from the second argument.
        let pairs_of =
            |first, second| vtrn1q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second));
        let lower =
            |first, second| vtrn1q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
        let upper =
            |first, second| vtrn2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second));
        match K {
            2 => {
                // Columns 2 and 3 start 4 bits later, and of these pairs the second ones 2 bits.
                let pairs = pairs_of(row, vshrq_n_u32::<4>(row));
                (
                    lower(pairs, vshrq_n_u16::<2>(pairs)),
                    upper(vshlq_n_u16::<2>(pairs), pairs),
                )
            }
            3 => {
                // 6 bits and 3 bits.
                let row = vshlq_u32(row, self.starts);
                let pairs = pairs_of(row, vshrq_n_u32::<6>(row));
                (
                    lower(pairs, vshrq_n_u16::<3>(pairs)),
                    upper(vshlq_n_u16::<2>(pairs), vshrq_n_u16::<1>(pairs)),
                )
            }
            _ => {
                // Columns 1 and 3 start 4 bits later than 0 and 2, and 2 and 3 a whole byte later than 0 and 1.
                let low = pairs_of(row, vshrq_n_u32::<4>(row));
                let high = pairs_of(vshrq_n_u32::<6>(row), vshrq_n_u32::<10>(row));
                (vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high))
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn table_of(entries: &[u8; 64]) -> uint8x16x4_t {
    let [a, b, c, d]: &[[u8; 16]; 4] = bytemuck::cast_ref(entries);
    uint8x16x4_t(load(a), load(b), load(c), load(d))
}

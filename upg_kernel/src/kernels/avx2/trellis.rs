//! Levels of `t2`, `t3` and `t4`.
//!
//! A row of a tile is four weights whose states lie in 32 bits, so each lane of a register decodes
//! one row. A shuffle moves its bytes there. Then columns 0 and 2 are the halves of the lanes of
//! one register, and columns 1 and 3 those of another. A multiplier that is a multiple of 8 shifts
//! out the bits above a state; otherwise they are masked. Once both registers are blended, the
//! upper bytes of the products are in column order.
//!
//! This takes 15 instructions per 32 levels from the multiplication on, and 8 or 9 before it.

use super::tiles::{Levels, look_at};
use super::{load, load_half, load_i32, prefetch, twice};
use crate::trellis_code::{STATES, code};
use std::arch::x86_64::*;

/// Buffer size for the end of the stream, followed by arbitrary bytes.
pub(super) const END: usize = 2 * WINDOW;

/// Maximum bytes of two tiles, plus 16.
const WINDOW: usize = 272;

/// Prefetch distance in the stream, in bytes.
const AHEAD: usize = 2048;

/// Decoder for `t2`, `t3` and `t4`.
pub(super) struct Trellis<'a, const K: usize> {
    /// Stream from the first of the two current tiles on.
    now: &'a [u8; WINDOW],
    rest: &'a [u8],
    end: Option<&'a mut [u8; END]>,
    decoder: Decoder,
}

impl<'a, const K: usize> Trellis<'a, K> {
    #[target_feature(enable = "avx2")]
    pub(super) fn new(stream: &'a [u8], end: &'a mut [u8; END]) -> Self {
        Self {
            now: &[0; WINDOW],
            rest: stream,
            end: Some(end),
            decoder: Decoder::new::<K>(),
        }
    }
}

impl<const K: usize> Levels for Trellis<'_, K> {
    #[inline(always)]
    fn next(&mut self) {
        look_at(&mut self.now, &mut self.rest, &mut self.end);
        self.rest = self.rest.get(64 * K..).unwrap_or_default();
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            for line in 0..K {
                prefetch(self.now, AHEAD + 64 * line);
            }
        }
    }

    #[inline(always)]
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2] {
        // The remainders prove that no bounds check is needed.
        let first = 32 * K * (tile % 2) + 8 * K * (quarter % 4);
        let [a, b] = [first, first + 4 * K].map(|at| self.now[at..].first_chunk());
        let (a, b) = (a.expect("24 bytes of 272"), b.expect("24 bytes of 272"));
        // SAFETY: as above.
        unsafe { [self.decoder.levels::<K>(a), self.decoder.levels::<K>(b)] }
    }
}

/// Constants that turn the bits of 32 weights into their levels.
struct Decoder {
    /// Byte indices of a row for each lane.
    rows: __m256i,
    /// Bit offset of a row from its first byte.
    starts: __m256i,
    /// Byte indices of columns 0 and 2, for 4 bits per weight.
    even: __m256i,
    multiplier: __m256i,
    coarse: __m256i,
    fine: __m256i,
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new<const K: usize>() -> Self {
        let (mut rows, mut even) = ([[0; 4]; 8], [[[0; 2]; 2]; 8]);
        let mut starts = [0; 8];
        for row in 0..8 {
            // Shuffles count bytes from the start of their half, see `both_halves`.
            let bit = 4 * K * (row % 4);
            let byte = (bit / 8) as u8;
            rows[row] = [byte, byte + 1, byte + 2, byte + 3];
            even[row] = [[byte, byte + 1], [byte + 1, byte + 2]];
            starts[row] = (bit % 8) as i32;
        }
        let code = code::<K>();
        Self {
            rows: load(bytemuck::cast_ref(&rows)),
            starts: load_i32(&starts),
            even: load(bytemuck::cast_ref(&even)),
            multiplier: _mm256_set1_epi16(code.multiplier() as i16),
            coarse: twice(code.coarse()),
            fine: twice(code.fine()),
        }
    }

    /// Returns the biased levels of 32 weights in stream order,
    /// whose bits start at the start of `bytes`.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn levels<const K: usize>(&self, bytes: &[u8; 24]) -> __m256i {
        let [mut even, mut odd] = self.states::<K>(both_halves::<K>(bytes));
        if code::<K>().bits() > 7 {
            even = _mm256_and_si256(even, _mm256_set1_epi16(STATES as i16 - 1));
            odd = _mm256_and_si256(odd, _mm256_set1_epi16(STATES as i16 - 1));
        }
        let even = _mm256_mullo_epi16(even, self.multiplier);
        let odd = _mm256_mullo_epi16(odd, self.multiplier);
        // The upper bytes.
        let points = _mm256_blendv_epi8(
            _mm256_srli_epi16::<8>(even),
            odd,
            _mm256_set1_epi16(i16::MIN),
        );
        let mirror = _mm256_cmpgt_epi8(_mm256_setzero_si256(), points);
        let depth = _mm256_xor_si256(points, mirror);
        let coarse = _mm256_and_si256(_mm256_srli_epi16::<3>(depth), _mm256_set1_epi8(15));
        // Index into `fine`: the depth if it is below 8, else 8 + depth % 8, whichever is smaller.
        let inner = _mm256_or_si256(
            _mm256_and_si256(depth, _mm256_set1_epi8(7)),
            _mm256_set1_epi8(8),
        );
        let fine = _mm256_min_epu8(depth, inner);
        let levels = _mm256_add_epi8(
            _mm256_shuffle_epi8(self.coarse, coarse),
            _mm256_shuffle_epi8(self.fine, fine),
        );
        _mm256_xor_si256(levels, mirror)
    }

    /// Returns the states of the weights of eight rows, with other bits above them.
    ///
    /// The first register has columns 0 and 2, the second columns 1 and 3.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn states<const K: usize>(&self, bytes: __m256i) -> [__m256i; 2] {
        // The upper half of each lane.
        const UPPER: i32 = 0b1010_1010;
        let rows = _mm256_shuffle_epi8(bytes, self.rows);
        match K {
            2 => [
                _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<12>(rows)),
                _mm256_blend_epi16::<UPPER>(
                    _mm256_srli_epi32::<2>(rows),
                    _mm256_slli_epi32::<10>(rows),
                ),
            ],
            3 => {
                let rows = _mm256_srlv_epi32(rows, self.starts);
                [
                    _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<10>(rows)),
                    _mm256_blend_epi16::<UPPER>(
                        _mm256_srli_epi32::<3>(rows),
                        _mm256_slli_epi32::<7>(rows),
                    ),
                ]
            }
            _ => [
                _mm256_shuffle_epi8(bytes, self.even),
                _mm256_blend_epi16::<UPPER>(
                    _mm256_srli_epi32::<4>(rows),
                    _mm256_slli_epi32::<4>(rows),
                ),
            ],
        }
    }
}

/// Loads the bits of four rows, and in the other half those of the next four.
#[inline]
#[target_feature(enable = "avx2")]
fn both_halves<const K: usize>(bytes: &[u8; 24]) -> __m256i {
    let [first, second] = [0, 2 * K].map(|at| bytes[at..].first_chunk());
    let (first, second) = (
        first.expect("16 of 24 bytes"),
        second.expect("16 of 24 bytes"),
    );
    _mm256_set_m128i(load_half(second), load_half(first))
}

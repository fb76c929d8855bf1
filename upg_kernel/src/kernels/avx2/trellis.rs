//! `t2`, `t3` and `t4`.
//!
//! A row of a tile is four weights whose states lie in 32 bits, so that a lane of a register decodes a row.
//! A shuffle brings its bytes there, a few shifts make four bytes of the low six bits of the states and four
//! of the high seven. Tables are looked up 16 entries at a time: with 128 levels that is 12 shuffles for 32
//! weights, which is what these kernels spend their time with. (Loads from a table of all states, one by one or
//! gathered, were slower on Zen 5, and on Sapphire Rapids gathered ones were no faster.)

use super::levels::Levels;
use super::*;
use crate::kernels::places::window;

/// Registers of eight rows each to a tile.
const REGISTERS: usize = 8;

/// `t2`, `t3` and `t4`. With more than 128 levels `WIDE` has to be true.
pub(super) struct Trellis<'a, const K: usize, const WIDE: bool> {
    stream: &'a [u8],
    decoder: Decoder,
    /// Biased levels of two tiles, four rows in each part.
    now: [[[u8; 16]; 2 * REGISTERS]; 2],
    /// For the last bytes of the stream.
    end: [u8; 272],
}

impl<'a, const K: usize, const WIDE: bool> Trellis<'a, K, WIDE> {
    #[target_feature(enable = "avx2")]
    pub(super) fn new(stream: &'a [u8], shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        Self {
            stream,
            decoder: Decoder::new(K, shift_table, level_table),
            now: [[[0; 16]; 2 * REGISTERS]; 2],
            end: [0; 272],
        }
    }

    #[target_feature(enable = "avx2")]
    fn go_on(&mut self) {
        let stream = window(self.stream, &mut self.end);
        // In two passes, of which each has registers enough for its tables.
        let mut indices = [[[0; 32]; REGISTERS]; 2];
        for (tile, indices) in indices.iter_mut().enumerate() {
            let codes = &stream[32 * K * tile..];
            for (register, index) in indices.iter_mut().enumerate() {
                // Two quads and what is between them: at most 16 bytes after those of a tile.
                let bytes = codes[2 * K * quad(K, register)..].first_chunk();
                let bytes = load(bytes.expect("32 bytes of 272"));
                store(self.decoder.indices::<K, WIDE>(bytes), index);
            }
        }
        for (indices, now) in indices.iter().zip(&mut self.now) {
            for (register, indices) in indices.iter().enumerate() {
                let levels = self.decoder.levels::<WIDE>(load(indices));
                let quad = quad(K, register);
                store_half(_mm256_castsi256_si128(levels), &mut now[quad]);
                let upper = _mm256_extracti128_si256::<1>(levels);
                store_half(upper, &mut now[quad + distance(K)]);
            }
        }
        self.stream = self.stream.get(64 * K..).unwrap_or_default();
    }
}

impl<const K: usize, const WIDE: bool> Levels for Trellis<'_, K, WIDE> {
    #[inline(always)]
    fn next(&mut self) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { self.go_on() }
    }

    #[inline(always)]
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2] {
        let levels = self.now[tile].as_flattened().as_chunks().0;
        // SAFETY: as above.
        unsafe { [load(&levels[2 * quarter]), load(&levels[2 * quarter + 1])] }
    }
}

/// Quads (four rows of a tile, `2 * k` bytes) from the one in the low half of a register to that in its high
/// half. They are 16 bytes apart, or 24 where 16 bytes are no number of quads.
const fn distance(k: usize) -> usize {
    if k == 4 { 2 } else { 4 }
}

/// The quad in the low half of a register.
const fn quad(k: usize, register: usize) -> usize {
    register / distance(k) * 2 * distance(k) + register % distance(k)
}

/// What turns the bits of 32 weights into their levels.
struct Decoder {
    /// The bytes of a row for each lane.
    rows: __m256i,
    /// By how many bits a row starts later than its first byte.
    starts: __m256i,
    shifts: [__m256i; 4],
    /// Biased.
    levels: [[__m256i; 4]; 4],
}

impl Decoder {
    #[target_feature(enable = "avx2")]
    fn new(k: usize, shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        let mut rows = [[0; 4]; 8];
        let mut starts = [0; 8];
        for lane in 0..8 {
            let quad = lane / 4 * distance(k);
            // Shuffles count bytes from the start of their half.
            let bit = 16 * k * quad % 128 + 4 * k * (lane % 4);
            for (i, byte) in rows[lane].iter_mut().enumerate() {
                *byte = (bit / 8 + i) as u8;
            }
            starts[lane] = (bit % 8) as i32;
        }
        let mut levels = [[_mm256_setzero_si256(); 4]; 4];
        for (levels, table) in levels.iter_mut().zip(level_table.as_chunks::<64>().0) {
            *levels = differences(bytemuck::cast_ref(table));
            levels[0] = biased(levels[0]);
        }
        Self {
            rows: load(bytemuck::cast_ref(&rows)),
            starts: load_i32(&starts),
            shifts: differences(shift_table),
            levels,
        }
    }

    /// Where in the level table the levels of 32 weights are, whose bits are among those of `bytes`; with
    /// more than 128 levels `WIDE` has to be true, else bit 7 means nothing.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn indices<const K: usize, const WIDE: bool>(&self, bytes: __m256i) -> __m256i {
        let (low, mut high) = self.split::<K>(_mm256_shuffle_epi8(bytes, self.rows));
        if WIDE {
            high = _mm256_and_si256(high, _mm256_set1_epi8(127));
        }
        let indices = _mm256_add_epi8(look_up(self.shifts, places(low)), high);
        if K != 4 {
            return indices;
        }
        // The two in the middle change places.
        let order = [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15];
        _mm256_shuffle_epi8(indices, twice(&order))
    }

    /// The biased levels at these indices.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn levels<const WIDE: bool>(&self, indices: __m256i) -> __m256i {
        let places = places(indices);
        let [a, b, c, d] = self.levels;
        // Of the mask only the highest bit of each byte counts, which is bit 6 of an index, and below bit 7.
        let mask = _mm256_add_epi8(indices, indices);
        let lower = _mm256_blendv_epi8(look_up(a, places), look_up(b, places), mask);
        if !WIDE {
            return lower;
        }
        let upper = _mm256_blendv_epi8(look_up(c, places), look_up(d, places), mask);
        _mm256_blendv_epi8(lower, upper, indices)
    }

    /// The low 6 and the high 7 bits of the states of four weights in each lane, as bytes with other bits
    /// above them.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn split<const K: usize>(&self, rows: __m256i) -> (__m256i, __m256i) {
        // The upper half of each lane, and of each half.
        const UPPER: i32 = 0b1010_1010;
        let odd = _mm256_set1_epi16(-256);
        match K {
            2 => {
                // Columns 2 and 3 start 4 bits later, and of these pairs the second ones 2 bits.
                let pairs = _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<12>(rows));
                (
                    _mm256_blendv_epi8(pairs, _mm256_slli_epi16::<6>(pairs), odd),
                    _mm256_blendv_epi8(_mm256_srli_epi16::<6>(pairs), pairs, odd),
                )
            }
            3 => {
                // 6 bits and 3 bits.
                let rows = _mm256_srlv_epi32(rows, self.starts);
                let pairs = _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<10>(rows));
                let high = [_mm256_srli_epi16::<6>(pairs), _mm256_srli_epi16::<1>(pairs)];
                (
                    _mm256_blendv_epi8(pairs, _mm256_slli_epi16::<5>(pairs), odd),
                    _mm256_blendv_epi8(high[0], high[1], odd),
                )
            }
            _ => {
                // Columns 1 and 3 start 4 bits later than 0 and 2, and 2 and 3 a whole byte later than 0 and 1.
                let high = [_mm256_srli_epi32::<6>(rows), _mm256_slli_epi32::<6>(rows)];
                (
                    _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<12>(rows)),
                    _mm256_blend_epi16::<UPPER>(high[0], high[1]),
                )
            }
        }
    }
}

/// A table of 64 entries for [`look_up`]: the first 16, and how the others differ from the 16 before them.
#[target_feature(enable = "avx2")]
fn differences(table: &[u8; 64]) -> [__m256i; 4] {
    let mut registers = [_mm256_setzero_si256(); 4];
    let mut before = _mm256_setzero_si256();
    for (register, entries) in registers.iter_mut().zip(table.as_chunks().0) {
        let entries = twice(entries);
        *register = _mm256_xor_si256(entries, before);
        before = entries;
    }
    registers
}

/// The low six bits of each byte, and those less 16, 32 and 48.
#[inline]
#[target_feature(enable = "avx2")]
fn places(bytes: __m256i) -> [__m256i; 4] {
    let place = _mm256_and_si256(bytes, _mm256_set1_epi8(63));
    [
        place,
        _mm256_sub_epi8(place, _mm256_set1_epi8(16)),
        _mm256_sub_epi8(place, _mm256_set1_epi8(32)),
        _mm256_sub_epi8(place, _mm256_set1_epi8(48)),
    ]
}

/// The entries at some places of a table of [`differences`]. A shuffle ignores bits 4 to 6 of a place and
/// gives 0 for a negative one: the differences up to an entry add up to it, and those after it are 0.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: [__m256i; 4], places: [__m256i; 4]) -> __m256i {
    let first = _mm256_xor_si256(
        _mm256_shuffle_epi8(table[0], places[0]),
        _mm256_shuffle_epi8(table[1], places[1]),
    );
    let second = _mm256_xor_si256(
        _mm256_shuffle_epi8(table[2], places[2]),
        _mm256_shuffle_epi8(table[3], places[3]),
    );
    _mm256_xor_si256(first, second)
}

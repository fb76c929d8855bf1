//! Levels of a strip from each kind of code.

use super::{biased, codebook_register, load, prefetch, to_array};
use crate::kernels::places::window;
use crate::trellis_code::{SHIFTS, STATE_BITS, code};
use std::arch::x86_64::*;

/// Prefetches the codes somewhat more than `at` bytes after the start of `codes`,
/// into the L2 cache.
///
/// On Zen 4 a core loads 16 to 17 GB/s into its L1 cache and 25 into its L2 cache. This matters
/// where little is computed per byte. Prefetching more than a page ahead was slower there.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch_second(codes: &[u8], at: usize) {
    prefetch::<_MM_HINT_T1>(codes, at + 3072);
}

/// Four columns of 64 rows as `level + 128`, sixteen rows per register.
pub(super) type Tile = [__m512i; 4];

/// Level 0.
const ZERO: i8 = -128;

/// Tiles of a strip in order.
///
/// A value exists only where the processor has the features: every constructor requires them.
pub(super) trait Levels {
    /// Flag for an interleaved row order.
    ///
    /// The lanes of registers 0 and 1, and those of 2 and 3, then alternate in pairs of rows: 0, 1,
    /// 4, 5, 8 ... and 2, 3, 6, 7, 10 ... instead of sixteen consecutive ones. See [`Levels::row`].
    const IN_TURN: bool = false;

    /// Returns the next two tiles; levels are arbitrary where a tile starts past the last column.
    fn next(&mut self) -> [Tile; 2];

    /// Returns the row of a lane of a register.
    #[inline(always)]
    fn row(register: usize, lane: usize) -> usize {
        match Self::IN_TURN {
            false => 16 * register + lane,
            true => register / 2 * 32 + lane / 2 * 4 + register % 2 * 2 + lane % 2,
        }
    }
}

/// Reorders numbers of the 64 rows from the order of `L` to row order.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn in_order_of_rows<L: Levels>(registers: [__m512; 4]) -> [f32; 64] {
    let mut rows = [[0.0; 16]; 4];
    let pairs = rows.as_chunks_mut::<2>().0.iter_mut();
    for (rows, [a, b]) in pairs.zip(registers.as_chunks().0) {
        let (a, b) = (_mm512_castps_pd(*a), _mm512_castps_pd(*b));
        let [first, second] = match L::IN_TURN {
            false => [a, b],
            true => [
                _mm512_permutex2var_pd(a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b),
                _mm512_permutex2var_pd(a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b),
            ],
        };
        *rows = [
            to_array(_mm512_castpd_ps(first)),
            to_array(_mm512_castpd_ps(second)),
        ];
    }
    bytemuck::cast(rows)
}

/// Levels of `q8`.
pub(super) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    #[target_feature(enable = "avx512f")]
    pub(super) fn new(codes: &'a [u8]) -> Self {
        Self(codes)
    }
}

impl Levels for Bytes<'_> {
    #[inline(always)]
    fn next(&mut self) -> [Tile; 2] {
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let mut tiles = [[_mm512_set1_epi8(ZERO); 4]; 2];
            if let Some((codes, rest)) = self.0.split_first_chunk::<512>() {
                self.0 = rest;
                let codes = codes.as_chunks().0;
                for (i, codes) in codes.iter().enumerate() {
                    prefetch_second(codes, 0);
                    tiles[i / 4][i % 4] = biased(load(codes));
                }
            }
            tiles
        }
    }
}

/// Levels of `q4`.
pub(super) struct Nibbles<'a> {
    codes: &'a [u8],
    codebook: __m512i,
}

impl<'a> Nibbles<'a> {
    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn new(codes: &'a [u8], codebook: &[i8; 16]) -> Self {
        let codebook = codebook_register(codebook);
        Self { codes, codebook }
    }
}

impl Levels for Nibbles<'_> {
    #[inline(always)]
    fn next(&mut self) -> [Tile; 2] {
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let mut tiles = [[_mm512_set1_epi8(ZERO); 4]; 2];
            if let Some((codes, rest)) = self.codes.split_first_chunk::<256>() {
                self.codes = rest;
                let half = _mm512_set1_epi8(15);
                for (i, codes) in codes.as_chunks().0.iter().enumerate() {
                    prefetch_second(codes, 0);
                    let codes = load(codes);
                    let low = _mm512_and_si512(codes, half);
                    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), half);
                    tiles[0][i] = _mm512_shuffle_epi8(self.codebook, low);
                    tiles[1][i] = _mm512_shuffle_epi8(self.codebook, high);
                }
            }
            tiles
        }
    }
}

/// Buffer size for the codes of the last words, followed by arbitrary bytes.
pub(super) const END: usize = 512;

/// Levels of `s8`, or with `NIBBLES` of `s4`.
pub(super) struct Kept<'a, const NIBBLES: bool> {
    bitmap: &'a [[u8; 8]],
    codes: &'a [u8],
    codebook: __m512i,
    end: &'a mut [u8; END],
}

impl<'a, const NIBBLES: bool> Kept<'a, NIBBLES> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
    pub(super) fn new(
        bitmap: &'a [[u8; 8]],
        codes: &'a [u8],
        codebook: &[i8; 16],
        end: &'a mut [u8; END],
    ) -> Self {
        Self {
            bitmap,
            codes,
            codebook: codebook_register(codebook),
            end,
        }
    }
}

impl<const NIBBLES: bool> Levels for Kept<'_, NIBBLES> {
    #[inline(always)]
    fn next(&mut self) -> [Tile; 2] {
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let mut tiles = [[_mm512_set1_epi8(ZERO); 4]; 2];
            if let Some((words, rest)) = self.bitmap.split_first_chunk::<8>() {
                self.bitmap = rest;
                prefetch_second(words.as_flattened(), 0);
                let codes = window(self.codes, self.end);
                let mut at = 0;
                for (i, word) in words.iter().enumerate() {
                    let kept = u64::from_le_bytes(*word);
                    let n = kept.count_ones() as usize;
                    prefetch_second(codes, at);
                    // SAFETY: each of at most 7 words before took at most 64 bytes, so
                    // 64 bytes from there on are inside the 512 of the reference. The
                    // loads need no alignment.
                    let start = codes.as_ptr().add(at);
                    // Bytes after the codes of this word are not expanded.
                    let levels = if NIBBLES {
                        at += n.div_ceil(2);
                        let codes = in_order(_mm256_loadu_si256(start.cast()));
                        _mm512_shuffle_epi8(self.codebook, codes)
                    } else {
                        at += n;
                        biased(_mm512_loadu_si512(start.cast()))
                    };
                    // A weight without a stored code has level 0.
                    let zero = _mm512_set1_epi8(ZERO);
                    tiles[i / 4][i % 4] = _mm512_mask_expand_epi8(zero, kept, levels);
                }
                self.codes = &self.codes[at..];
            }
            tiles
        }
    }
}

/// Unpacks the codes in 32 bytes, low halves first.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn in_order(codes: __m256i) -> __m512i {
    // 0x00HL -> 0x0H0L
    let wide = _mm512_cvtepu8_epi16(codes);
    let pairs = _mm512_or_si512(wide, _mm512_slli_epi16::<4>(wide));
    _mm512_and_si512(pairs, _mm512_set1_epi8(15))
}

/// Buffer size for the end of the stream, followed by arbitrary bytes.
pub(super) const TRELLIS_END: usize = 320;

/// Levels of `t2`, `t3` and `t4`.
pub(super) struct Trellis<'a, const K: usize> {
    stream: &'a [u8],
    decoder: Decoder,
    end: &'a mut [u8; TRELLIS_END],
}

impl<'a, const K: usize> Trellis<'a, K> {
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn new(stream: &'a [u8], end: &'a mut [u8; TRELLIS_END]) -> Self {
        Self {
            stream,
            decoder: Decoder::new::<K>(),
            end,
        }
    }
}

/// Number of state bits that index the shift table.
const SHIFT_BITS: usize = SHIFTS.ilog2() as usize;

/// Constants that turn the bits of weights into their levels.
struct Decoder {
    /// Source of the bytes of each 64-bit word, which has the bits of eight or sixteen weights.
    spread: __m512i,
    /// Positions of the first eight weights of each word, and of the next eight.
    cuts: [Cut; 2],
    shifts: __m512i,
    /// Levels, biased.
    levels: [__m512i; 4],
}

/// Bit positions of eight weights in their word.
#[derive(Clone, Copy)]
struct Cut {
    /// Bit `k * j` of its word for byte `j`: the low bits of the state.
    low: __m512i,
    /// The same plus six bits: the high bits.
    high: __m512i,
}

/// Returns how many groups of eight weights a 64-bit word holds: two if the last state fits.
const fn together(k: usize) -> usize {
    if 15 * k + STATE_BITS as usize <= 64 {
        2
    } else {
        1
    }
}

/// Returns the indices `step_of_word * i + step_of_byte * j + first`
/// for byte `j` of word `i`.
const fn places(step_of_word: usize, step_of_byte: usize, first: usize) -> [u8; 64] {
    let mut places = [0; 64];
    let mut i = 0;
    while i < 64 {
        places[i] = (step_of_word * (i / 8) + step_of_byte * (i % 8) + first) as u8;
        i += 1;
    }
    places
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn new<const K: usize>() -> Self {
        let levels: [[u8; 64]; 4] = bytemuck::cast(const { code::<K>().level_table() });
        Self {
            spread: load(const { &places(K * together(K), 1, 0) }),
            cuts: [
                Cut {
                    low: load(const { &places(0, K, 0) }),
                    high: load(const { &places(0, K, SHIFT_BITS) }),
                },
                Cut {
                    low: load(const { &places(0, K, 8 * K) }),
                    high: load(const { &places(0, K, 8 * K + SHIFT_BITS) }),
                },
            ],
            shifts: load(const { &code::<K>().shift_table() }),
            levels: levels.map(|levels| biased(load(&levels))),
        }
    }

    /// Returns the bits of 64 or 128 weights, which start at the start of `bytes`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vbmi")]
    fn words(&self, bytes: &[u8; 64]) -> __m512i {
        _mm512_permutexvar_epi8(self.spread, load(bytes))
    }

    /// Returns the levels of eight weights of each word.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    fn levels<const K: usize>(&self, words: __m512i, cut: Cut) -> __m512i {
        let low = _mm512_multishift_epi64_epi8(cut.low, words);
        let high = _mm512_multishift_epi64_epi8(cut.high, words);
        // The look-ups use the low 6 and 7 bits of each byte and ignore the rest.
        let shift = _mm512_permutexvar_epi8(low, self.shifts);
        let [a, b, c, d] = self.levels;
        if code::<K>().levels() == 128 {
            return _mm512_permutex2var_epi8(a, _mm512_add_epi8(shift, high), b);
        }
        let high = _mm512_and_si512(high, _mm512_set1_epi8(127));
        let index = _mm512_add_epi8(shift, high);
        let upper = _mm512_movepi8_mask(index);
        let low = _mm512_permutex2var_epi8(a, index, b);
        _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(c, index, d))
    }
}

impl<const K: usize> Levels for Trellis<'_, K> {
    const IN_TURN: bool = together(K) == 2;

    #[inline(always)]
    fn next(&mut self) -> [Tile; 2] {
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let mut tiles = [[_mm512_set1_epi8(ZERO); 4]; 2];
            let stream = window(self.stream, self.end);
            for line in (0..64 * K).step_by(64) {
                prefetch::<_MM_HINT_T0>(stream, line + 4096);
            }
            for i in (0..8).step_by(together(K)) {
                let bytes = stream[i * 8 * K..].first_chunk();
                let words = self.decoder.words(bytes.expect("64 bytes of 320"));
                for (j, cut) in self.decoder.cuts[..together(K)].iter().enumerate() {
                    tiles[i / 4][(i + j) % 4] = self.decoder.levels::<K>(words, *cut);
                }
            }
            self.stream = self.stream.get(64 * K..).unwrap_or_default();
            tiles
        }
    }
}

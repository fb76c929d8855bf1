//! The levels of a `q8`, `q4`, `s8` or `s4` strip.

use super::*;
use crate::kernels::places::{PLACES, sixteen_codes, window};

/// Bytes of codes that are asked for ahead of their use.
const AHEAD: usize = 4096;

/// The tiles of a strip in their order, two at a time.
///
/// A value exists only where the processor has the features: every constructor asks for them.
pub(super) trait Levels {
    /// Goes on to the next two tiles, if there are.
    fn next(&mut self);

    /// `level + 128` of eight rows of one of these tiles (0 or 1).
    fn eight_rows(&self, tile: usize, eight: usize) -> __m256i;
}

/// Takes the next `N` bytes of the rest, if there are.
#[inline(always)]
fn go_on<'a, const N: usize>(now: &mut &'a [u8; N], rest: &mut &'a [u8]) {
    if let Some((first, after)) = rest.split_first_chunk() {
        (*now, *rest) = (first, after);
    }
}

/// `q8`.
pub(super) struct Bytes<'a> {
    now: &'a [u8; 512],
    rest: &'a [u8],
}

impl<'a> Bytes<'a> {
    #[target_feature(enable = "avx2")]
    pub(super) fn new(codes: &'a [u8]) -> Self {
        Self {
            now: &[0; 512],
            rest: codes,
        }
    }
}

impl Levels for Bytes<'_> {
    #[inline(always)]
    fn next(&mut self) {
        go_on(&mut self.now, &mut self.rest);
    }

    #[inline(always)]
    fn eight_rows(&self, tile: usize, eight: usize) -> __m256i {
        let codes = &self.now.as_chunks().0[8 * tile + eight];
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            prefetch(codes, AHEAD);
            biased(load(codes))
        }
    }
}

/// `q4`.
pub(super) struct Nibbles<'a> {
    now: &'a [u8; 256],
    rest: &'a [u8],
    /// Biased.
    codebook: __m256i,
}

impl<'a> Nibbles<'a> {
    #[target_feature(enable = "avx2")]
    pub(super) fn new(codes: &'a [u8], codebook: &[i8; 16]) -> Self {
        Self {
            now: &[0; 256],
            rest: codes,
            codebook: biased(twice(bytemuck::cast_ref(codebook))),
        }
    }
}

impl Levels for Nibbles<'_> {
    #[inline(always)]
    fn next(&mut self) {
        go_on(&mut self.now, &mut self.rest);
    }

    #[inline(always)]
    fn eight_rows(&self, tile: usize, eight: usize) -> __m256i {
        let codes = &self.now.as_chunks().0[eight];
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            prefetch(codes, AHEAD);
            let codes = match tile {
                0 => load(codes),
                _ => _mm256_srli_epi16::<4>(load(codes)),
            };
            let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
            _mm256_shuffle_epi8(self.codebook, codes)
        }
    }
}

/// `s8`, or with `NIBBLES` `s4`.
pub(super) struct Kept<'a, const NIBBLES: bool> {
    bitmap: &'a [[u8; 8]],
    codes: &'a [u8],
    codebook: __m256i,
    /// Of two tiles, `level + 128`.
    now: [[u8; 64]; 8],
    /// For the codes of the last words.
    end: [u8; 64],
}

impl<'a, const NIBBLES: bool> Kept<'a, NIBBLES> {
    #[target_feature(enable = "avx2,popcnt")]
    pub(super) fn new(bitmap: &'a [[u8; 8]], codes: &'a [u8], codebook: &[i8; 16]) -> Self {
        Self {
            bitmap,
            codes,
            codebook: twice(bytemuck::cast_ref(codebook)),
            now: [[128; 64]; 8],
            end: [0; 64],
        }
    }

    #[target_feature(enable = "avx2,popcnt")]
    fn expand_next(&mut self) {
        let Some((words, rest)) = self.bitmap.split_first_chunk::<8>() else {
            return;
        };
        self.bitmap = rest;
        prefetch(words.as_flattened(), AHEAD);
        for (word, now) in words.iter().zip(&mut self.now) {
            let kept = u64::from_le_bytes(*word);
            let n = kept.count_ones() as usize;
            prefetch(self.codes, AHEAD);
            let codes = window(self.codes, &mut self.end);
            expand::<NIBBLES>(codes, self.codebook, kept, now);
            let bytes = if NIBBLES { n.div_ceil(2) } else { n };
            self.codes = &self.codes[bytes..];
        }
    }
}

impl<const NIBBLES: bool> Levels for Kept<'_, NIBBLES> {
    #[inline(always)]
    fn next(&mut self) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { self.expand_next() }
    }

    #[inline(always)]
    fn eight_rows(&self, tile: usize, eight: usize) -> __m256i {
        let levels = &self.now.as_flattened().as_chunks().0[8 * tile + eight];
        // SAFETY: as above.
        unsafe { load(levels) }
    }
}

/// 64 times `level + 128`: the levels of the kept weights from `codes`, in their order, and level 0.
#[inline]
#[target_feature(enable = "avx2,popcnt")]
fn expand<const NIBBLES: bool>(codes: &[u8; 64], codebook: __m256i, kept: u64, out: &mut [u8; 64]) {
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let before = (kept & ((1 << (16 * i)) - 1)).count_ones() as usize;
        let bits = kept >> (16 * i);
        let (low, high) = (bits & 255, bits >> 8 & 255);
        let places = _mm_add_epi8(
            load_half(&PLACES.0[0][low as usize]),
            load_half(&PLACES.0[1][high as usize]),
        );
        // SAFETY: `before` counts up to 16 * i of 64 bits, and i is at most 3: the 16 bytes from there or from
        // half of it on end inside of the 64 of the reference. No load needs an alignment.
        let stored = unsafe {
            let start = codes.as_ptr();
            if NIBBLES {
                let codes = start.add(before / 2).cast::<[u64; 2]>().read_unaligned();
                let codes = _mm_cvtsi64_si128(sixteen_codes(codes, before % 2) as i64);
                let pairs = _mm_unpacklo_epi8(codes, _mm_srli_epi16::<4>(codes));
                let codes = _mm_and_si128(pairs, _mm_set1_epi8(15));
                _mm_shuffle_epi8(_mm256_castsi256_si128(codebook), codes)
            } else {
                _mm_loadu_si128(start.add(before).cast())
            }
        };
        let found = _mm_xor_si128(_mm_shuffle_epi8(stored, places), _mm_set1_epi8(-128));
        // SAFETY: the reference is to 16 bytes; the store needs no alignment.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), found) };
    }
}

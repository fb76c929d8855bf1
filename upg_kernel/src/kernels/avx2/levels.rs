//! Levels of a strip from each kind of code; [`Trellis`] has its own file.

pub(super) use super::tiles::Levels;
use super::tiles::{go_on, look_at};
pub(super) use super::trellis::{END as TRELLIS_END, Trellis};
use super::{biased, load, load_half, prefetch, store, twice};
use crate::kernels::places::PLACES;
use std::arch::x86_64::*;

/// Prefetch distance for codes, in bytes.
const AHEAD: usize = 4096;

/// Levels of `q8`.
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
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2] {
        let codes: &[u8; 64] = &self.now.as_chunks().0[4 * tile + quarter];
        let [a, b] = bytemuck::cast_ref::<_, [[u8; 32]; 2]>(codes);
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            prefetch(codes, AHEAD);
            [biased(load(a)), biased(load(b))]
        }
    }
}

/// Levels of `q4`.
pub(super) struct Nibbles<'a> {
    now: &'a [u8; 256],
    rest: &'a [u8],
    /// Codebook, biased.
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
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2] {
        let codes: &[u8; 64] = &self.now.as_chunks().0[quarter];
        let [a, b] = bytemuck::cast_ref::<_, [[u8; 32]; 2]>(codes);
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let (mut a, mut b) = (load(a), load(b));
            if tile == 0 {
                prefetch(codes, AHEAD);
            } else {
                (a, b) = (_mm256_srli_epi16::<4>(a), _mm256_srli_epi16::<4>(b));
            }
            let half = _mm256_set1_epi8(15);
            [
                _mm256_shuffle_epi8(self.codebook, _mm256_and_si256(a, half)),
                _mm256_shuffle_epi8(self.codebook, _mm256_and_si256(b, half)),
            ]
        }
    }
}

/// Buffer size for the codes of the last words, followed by arbitrary bytes.
pub(super) const END: usize = 2 * CODES;

/// Maximum code bytes of two tiles.
const CODES: usize = 512;

/// Levels of `s8`, or with `NIBBLES` of `s4`.
pub(super) struct Kept<'a, const NIBBLES: bool> {
    /// Bitmap words of two tiles.
    now: &'a [[u8; 8]; 8],
    bitmap: &'a [[u8; 8]],
    /// Codes from the first of these tiles on.
    codes: &'a [u8],
    /// Codes of these tiles, followed by arbitrary bytes.
    window: &'a [u8; CODES],
    /// Number of codes taken so far.
    taken: usize,
    codebook: __m256i,
    /// Stored `s4` levels for each word of two tiles.
    stored: [[u8; 64]; 8],
    end: Option<&'a mut [u8; END]>,
}

impl<'a, const NIBBLES: bool> Kept<'a, NIBBLES> {
    #[target_feature(enable = "avx2,popcnt,bmi2")]
    pub(super) fn new(
        bitmap: &'a [[u8; 8]],
        codes: &'a [u8],
        codebook: &[i8; 16],
        end: &'a mut [u8; END],
    ) -> Self {
        Self {
            now: &[[0; 8]; 8],
            bitmap,
            codes,
            window: &[0; CODES],
            taken: 0,
            codebook: twice(bytemuck::cast_ref(codebook)),
            stored: [[0; 64]; 8],
            end: Some(end),
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,popcnt,bmi2")]
    fn go_on(&mut self) {
        self.codes = self.codes.get(self.taken..).unwrap_or_default();
        self.taken = 0;
        let Some((words, rest)) = self.bitmap.split_first_chunk::<8>() else {
            return;
        };
        (self.now, self.bitmap) = (words, rest);
        prefetch(words.as_flattened(), AHEAD);
        look_at(&mut self.window, &mut self.codes, &mut self.end);
        if NIBBLES {
            self.look_up();
        }
    }

    /// Looks up all words before the first is expanded: a load that spans two recent stores waits
    /// for both.
    #[inline]
    #[target_feature(enable = "avx2,popcnt,bmi2")]
    fn look_up(&mut self) {
        for (word, stored) in self.now.iter().zip(&mut self.stored) {
            let n = u64::from_le_bytes(*word).count_ones() as usize;
            prefetch(self.codes, self.taken + AHEAD);
            // SAFETY: each of at most 7 words before took at most 32 bytes, so 32 bytes from there
            // on are inside the window.
            let codes = unsafe { &*self.window.as_ptr().add(self.taken).cast() };
            look_up(codes, self.codebook, stored);
            self.taken += n.div_ceil(2);
        }
    }
}

impl<const NIBBLES: bool> Levels for Kept<'_, NIBBLES> {
    #[inline(always)]
    fn next(&mut self) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { self.go_on() }
    }

    #[inline(always)]
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2] {
        let word = &self.now[4 * tile + quarter];
        // SAFETY: as above.
        unsafe {
            if NIBBLES {
                return expand(word, &self.stored[4 * tile + quarter]).0;
            }
            assert!(self.taken <= CODES - 64, "each quarter once");
            prefetch(self.codes, self.taken + AHEAD);
            // SAFETY: each of at most 7 words before took at most 64 bytes, so 64 bytes from there
            // on are inside the window.
            let stored = &*self.window.as_ptr().add(self.taken).cast();
            let (levels, n) = expand(word, stored);
            self.taken += n;
            levels
        }
    }
}

/// Looks up the levels of 64 codes of 4 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(codes: &[u8; 32], codebook: __m256i, levels: &mut [u8; 64]) {
    // Unpacking works within halves: the second eight bytes must become the first ones
    // of the upper half.
    let codes = _mm256_permute4x64_epi64::<0b11_01_10_00>(load(codes));
    let half = _mm256_set1_epi8(15);
    let even = _mm256_shuffle_epi8(codebook, _mm256_and_si256(codes, half));
    let odd = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), half);
    let odd = _mm256_shuffle_epi8(codebook, odd);
    let [first, second] = bytemuck::cast_mut::<_, [[u8; 32]; 2]>(levels);
    store(_mm256_unpacklo_epi8(even, odd), first);
    store(_mm256_unpackhi_epi8(even, odd), second);
}

/// Expands 64 weights to `level + 128`; also returns the number of nonzero ones.
///
/// A weight whose bit is set in `word` takes the next level of `stored`; all others have level 0.
#[inline]
#[target_feature(enable = "avx2,popcnt,bmi2")]
fn expand(word: &[u8; 8], stored: &[u8; 64]) -> ([__m256i; 2], usize) {
    // SAFETY: the reference is to 8 readable bytes. The read is volatile, so that the
    // bytes below are loaded one by one. This takes half as many instructions as
    // extracting them from this number.
    let kept = u64::from_le(unsafe { word.as_ptr().cast::<Unaligned>().read_volatile() }.0);
    // Number of stored levels before each sixteen weights.
    let before = [
        0,
        (kept as u16).count_ones() as usize,
        (kept as u32).count_ones() as usize,
        (kept << 16).count_ones() as usize,
    ];
    let place = |eight: usize| load_half(&PLACES.0[eight % 2][usize::from(word[eight])]);
    let levels = |sixteen: usize| {
        // SAFETY: these count up to 48 of 64 bits, so the 16 bytes from there on are inside the 64
        // of the reference. The load needs no alignment.
        unsafe { _mm_loadu_si128(stored.as_ptr().add(before[sixteen]).cast()) }
    };
    let mut halves = [_mm256_setzero_si256(); 2];
    for (i, half) in halves.iter_mut().enumerate() {
        let places = _mm256_add_epi8(
            _mm256_set_m128i(place(4 * i + 2), place(4 * i)),
            _mm256_set_m128i(place(4 * i + 3), place(4 * i + 1)),
        );
        let levels = _mm256_set_m128i(levels(2 * i + 1), levels(2 * i));
        *half = biased(_mm256_shuffle_epi8(levels, places));
    }
    (halves, kept.count_ones() as usize)
}

/// Number at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

//! Levels of a strip from each kind of code; [`Trellis`] has its own file.

pub(super) use super::tiles::Levels;
pub(super) use super::trellis::Trellis;
use super::{load, load_i8, prefetch, store};
use crate::kernels::places::{PLACES, sixteen_codes, window};
use std::arch::aarch64::*;

/// Prefetch distance for codes, in bytes.
const AHEAD: usize = 4096;

/// Takes the next elements, up to `n`.
#[inline(always)]
pub(super) fn take<'a, T>(n: usize, rest: &mut &'a [T]) -> &'a [T] {
    let (now, after) = rest.split_at(n.min(rest.len()));
    *rest = after;
    now
}

/// Evaluates the second expression with the [`Levels`] of a strip.
macro_rules! with_levels {
    ($strip:expr, $levels:ident => $call:expr) => {{
        macro_rules! with {
            ($new:expr) => {{
                let $levels = $new;
                $call
            }};
        }
        match $strip.codes {
            $crate::kernels::views::Codes::Bytes(codes) => with!(levels::Bytes::<true>::new(codes)),
            $crate::kernels::views::Codes::Nibbles(codes, codebook) => {
                with!(levels::Nibbles::new(codes, codebook))
            }
            $crate::kernels::views::Codes::Kept {
                bitmap,
                codes,
                codebook,
            } => match codebook {
                None => with!(levels::Kept::<false>::new(bitmap, codes, &[0; 16])),
                Some(codebook) => with!(levels::Kept::<true>::new(bitmap, codes, codebook)),
            },
            $crate::kernels::views::Codes::Trellis { k, stream } => match k {
                2 => with!(levels::Trellis::<2>::new(stream)),
                3 => with!(levels::Trellis::<3>::new(stream)),
                _ => with!(levels::Trellis::<4>::new(stream)),
            },
        }
    }};
}
pub(super) use with_levels;

pub(super) use crate::kernels::views::PAIRS;

/// Levels of two tiles.
pub(super) type Pair = [u8; 512];

/// Levels of `q8`; `STREAMED` if they come from memory.
pub(super) struct Bytes<'a, const STREAMED: bool> {
    now: &'a [Pair],
    rest: &'a [Pair],
}

impl<'a, const STREAMED: bool> Bytes<'a, STREAMED> {
    #[target_feature(enable = "neon")]
    pub(super) fn new(codes: &'a [u8]) -> Self {
        let (now, rest) = (&[][..], codes.as_chunks().0);
        Self { now, rest }
    }
}

impl<const STREAMED: bool> Levels for Bytes<'_, STREAMED> {
    #[inline(always)]
    fn next(&mut self) {
        self.now = take(PAIRS, &mut self.rest);
    }

    #[inline(always)]
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2] {
        let codes = self.now[pair].as_chunks().0;
        let codes = [&codes[quad], &codes[quad + 16]];
        // SAFETY: `self` proves that the processor has the features.
        codes.map(|codes| unsafe { vreinterpretq_s8_u8(load(codes)) })
    }

    #[inline(always)]
    fn prefetch(&self, pair: usize, quad: usize) {
        if STREAMED {
            // SAFETY: as above.
            unsafe {
                prefetch(&self.now[pair], 16 * quad + AHEAD);
                prefetch(&self.now[pair], 16 * quad + 256 + AHEAD);
            }
        }
    }
}

/// Levels of `q4`.
pub(super) struct Nibbles<'a> {
    now: &'a [[u8; 256]],
    rest: &'a [[u8; 256]],
    codebook: int8x16_t,
}

impl<'a> Nibbles<'a> {
    #[target_feature(enable = "neon")]
    pub(super) fn new(codes: &'a [u8], codebook: &[i8; 16]) -> Self {
        Self {
            now: &[],
            rest: codes.as_chunks().0,
            codebook: load_i8(codebook),
        }
    }
}

impl Levels for Nibbles<'_> {
    #[inline(always)]
    fn next(&mut self) {
        self.now = take(PAIRS, &mut self.rest);
    }

    #[inline(always)]
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2] {
        let codes = &self.now[pair].as_chunks().0[quad];
        // SAFETY: `self` proves that the processor has the features.
        unsafe {
            let codes = load(codes);
            [
                vqtbl1q_s8(self.codebook, vandq_u8(codes, vdupq_n_u8(15))),
                vqtbl1q_s8(self.codebook, vshrq_n_u8::<4>(codes)),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(&self, pair: usize, quad: usize) {
        // SAFETY: as above.
        unsafe { prefetch(&self.now[pair], 16 * quad + AHEAD) };
    }
}

/// Levels of `s8`, or with `NIBBLES` of `s4`.
pub(super) struct Kept<'a, const NIBBLES: bool> {
    bitmap: &'a [[u8; 8]],
    codes: &'a [u8],
    codebook: int8x16_t,
    now: [[[u8; 64]; 8]; PAIRS],
    /// Buffer for the codes of the last words.
    end: [u8; 64],
}

impl<'a, const NIBBLES: bool> Kept<'a, NIBBLES> {
    #[target_feature(enable = "neon")]
    pub(super) fn new(bitmap: &'a [[u8; 8]], codes: &'a [u8], codebook: &[i8; 16]) -> Self {
        Self {
            bitmap,
            codes,
            codebook: load_i8(codebook),
            now: [[[0; 64]; 8]; PAIRS],
            end: [0; 64],
        }
    }

    #[inline(never)]
    #[target_feature(enable = "neon")]
    fn expand_block(&mut self) {
        let words = take(8 * PAIRS, &mut self.bitmap);
        for (i, (word, now)) in words.iter().zip(self.now.as_flattened_mut()).enumerate() {
            if i.is_multiple_of(8) {
                prefetch(word, AHEAD);
            }
            prefetch(self.codes, AHEAD);
            let codes = window(self.codes, &mut self.end);
            let n = expand::<NIBBLES>(codes, self.codebook, *word, now);
            let bytes = if NIBBLES { n.div_ceil(2) } else { n };
            self.codes = &self.codes[bytes..];
        }
    }
}

impl<const NIBBLES: bool> Levels for Kept<'_, NIBBLES> {
    #[inline(always)]
    fn next(&mut self) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { self.expand_block() }
    }

    #[inline(always)]
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2] {
        let levels = self.now[pair].as_flattened().as_chunks().0;
        // SAFETY: as above.
        unsafe {
            [
                vreinterpretq_s8_u8(load(&levels[quad])),
                vreinterpretq_s8_u8(load(&levels[quad + 16])),
            ]
        }
    }
}

/// Expands 64 weights to levels; returns the number of stored ones.
///
/// A weight whose bit is set in `word` takes the next level of `codes`; all others are 0.
#[inline]
#[target_feature(enable = "neon")]
fn expand<const NIBBLES: bool>(
    codes: &[u8; 64],
    codebook: int8x16_t,
    word: [u8; 8],
    out: &mut [u8; 64],
) -> usize {
    // Byte `i` of the product is the sum of the counts of bytes 0 to `i`, at most 64.
    let counts = vcnt_u8(vcreate_u8(u64::from_le_bytes(word)));
    let counts = vget_lane_u64::<0>(vreinterpret_u64_u8(counts));
    let stored = counts.wrapping_mul(0x0101_0101_0101_0101).to_le_bytes();
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let before = if i == 0 {
            0
        } else {
            usize::from(stored[2 * i - 1])
        };
        let places = vaddq_u8(
            load(&PLACES.0[0][usize::from(word[2 * i])]),
            load(&PLACES.0[1][usize::from(word[2 * i + 1])]),
        );
        let levels = if NIBBLES {
            // SAFETY: `before` is at most 16 * i, and i at most 3, so the 16 bytes from half of it
            // on are inside the 64 of the reference.
            let codes = unsafe {
                codes
                    .as_ptr()
                    .add(before / 2)
                    .cast::<[u64; 2]>()
                    .read_unaligned()
            };
            let pairs = vcreate_u8(sixteen_codes(codes, before % 2));
            let (low, high) = (vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8::<4>(pairs));
            let codes = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
            vreinterpretq_u8_s8(vqtbl1q_s8(codebook, codes))
        } else {
            // SAFETY: as above, also from `before` on.
            unsafe { vld1q_u8(codes.as_ptr().add(before)) }
        };
        store(out, vqtbl1q_u8(levels, places));
    }
    usize::from(stored[7])
}

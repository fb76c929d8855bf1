//! Decoding of single rows of a strip, for embeddings.
//!
//! These are plain loops, compiled for each instruction set. They read nothing of other rows except
//! the bits that locate the codes of this one.
#![forbid(unsafe_code)]

use super::activations::GROUP;
use super::views::{Codes, Primes, Strip};
use crate::codec::bitmap::WORD;
use crate::codec::stored::weight;
use crate::codec::strips::{STRIP_ROWS, TILE_COLS, TILE_WEIGHTS};
use crate::prime_lut::PRIME_LUT;
use crate::trellis_code::{self, STATES};

/// Tiles that are decoded together.
const TILES: usize = GROUP / TILE_COLS;

/// Rows of a tile that share a word of the bitmap.
const WORD_ROWS: usize = WORD / TILE_COLS;

/// Words of a tile.
const WORDS: usize = STRIP_ROWS / WORD_ROWS;

type Tile = [i8; TILE_COLS];

/// Decodes row `row` of a strip to `out [cols]`.
///
/// The result is bit-identical to [`crate::matrix::StoredMatrix::decode_rows`].
#[inline(always)]
pub(super) fn decode(strip: Strip<'_>, row: usize, out: &mut [f32]) {
    let scale = strip.scales[row];
    let mut kept = 0;
    for (block, out) in out.chunks_mut(GROUP).enumerate() {
        let mut levels = [[0; TILE_COLS]; TILES];
        let tiles = &mut levels[..out.len().div_ceil(TILE_COLS)];
        let first = block * TILES;
        match strip.codes {
            Codes::Bytes(codes) => bytes(codes, first, row, tiles),
            Codes::Nibbles(codes, codebook) => nibbles(codes, codebook, first, row, tiles),
            Codes::Kept {
                bitmap,
                codes,
                codebook,
            } => {
                kept += kept_codes(
                    &bitmap[first * WORDS..],
                    &codes[kept..],
                    codebook,
                    row,
                    tiles,
                )
            }
            Codes::Trellis { k, stream } => states(k, stream, first, row, tiles),
        }
        let group = match strip.primes {
            Primes::Rows(_) => GROUP,
            Primes::Groups { cols, .. } => cols,
        };
        let groups = out
            .chunks_mut(group)
            .zip(levels.as_flattened().chunks(group));
        for (i, (out, levels)) in groups.enumerate() {
            let index = match strip.primes {
                Primes::Rows(indices) => indices[row],
                Primes::Groups { indices, .. } => indices[block * (GROUP / group) + i][row],
            };
            let prime = PRIME_LUT[usize::from(index)];
            for (out, level) in out.iter_mut().zip(levels) {
                *out = weight(scale, prime, *level);
            }
        }
    }
}

/// Decodes one-byte levels of a row in the tiles from `first` on.
#[inline(always)]
fn bytes(codes: &[u8], first: usize, row: usize, tiles: &mut [Tile]) {
    for (tile, levels) in (first..).zip(tiles) {
        let at = tile * TILE_WEIGHTS + row * TILE_COLS;
        let codes: &Tile = bytemuck::cast_ref(
            codes[at..]
                .first_chunk::<TILE_COLS>()
                .expect("a whole tile"),
        );
        *levels = *codes;
    }
}

/// Decodes half-byte levels; tiles share their bytes in pairs.
#[inline(always)]
fn nibbles(codes: &[u8], codebook: &[i8; 16], first: usize, row: usize, tiles: &mut [Tile]) {
    for (tile, levels) in (first..).zip(tiles) {
        let at = tile / 2 * TILE_WEIGHTS + row * TILE_COLS;
        for (level, code) in levels.iter_mut().zip(&codes[at..at + TILE_COLS]) {
            *level = codebook[usize::from(code >> (tile % 2 * 4) & 15)];
        }
    }
}

/// Decodes levels of the weights whose bit is set; others are 0.
///
/// Returns the number of code bytes of all rows.
#[inline(always)]
fn kept_codes(
    bitmap: &[[u8; 8]],
    codes: &[u8],
    codebook: Option<&[i8; 16]>,
    row: usize,
    tiles: &mut [Tile],
) -> usize {
    let mut start = 0;
    for (words, levels) in bitmap.as_chunks::<WORDS>().0.iter().zip(tiles) {
        for (i, word) in words.iter().enumerate() {
            let bits = u64::from_le_bytes(*word);
            if i == row / WORD_ROWS {
                let below = row % WORD_ROWS * TILE_COLS;
                let mut place = (bits & ((1 << below) - 1)).count_ones() as usize;
                for (col, level) in levels.iter_mut().enumerate() {
                    let is_kept = bits >> (below + col) & 1;
                    // Branchless, because no branch predictor could predict it; past the last code
                    // no level is used.
                    let found = match codebook {
                        None => codes.get(start + place).map_or(0, |code| *code as i8),
                        Some(codebook) => codes.get(start + place / 2).map_or(0, |pair| {
                            codebook[usize::from(pair >> (place % 2 * 4) & 15)]
                        }),
                    };
                    *level = found * is_kept as i8;
                    place += is_kept as usize;
                }
            }
            let n = bits.count_ones() as usize;
            start += if codebook.is_none() { n } else { n.div_ceil(2) };
        }
    }
    start
}

/// Decodes levels from the states of a stream of `k` bits per weight.
#[inline(always)]
fn states(k: u8, stream: &[u8], first: usize, row: usize, tiles: &mut [Tile]) {
    let all = trellis_code::levels(k).expect("2, 3 or 4 bits");
    let k = usize::from(k);
    for (tile, levels) in (first..).zip(tiles) {
        // A row has 4 k bits. States start at a multiple of half a byte, and four of them end
        // within 32 bits, for which the end of a strip has room.
        let bit = k * (tile * TILE_WEIGHTS + row * TILE_COLS);
        let bytes = stream[bit / 8..].first_chunk().expect("the end of a strip");
        let bits = u32::from_le_bytes(*bytes) >> (bit % 8);
        for (i, out) in levels.iter_mut().enumerate() {
            *out = all[(bits >> (k * i)) as usize % STATES];
        }
    }
}

//! Packing of encoded rows into the strips of a matrix (`upg_kernel::matrix::strips`).
#![forbid(unsafe_code)]

use super::row::EncodedRow;
use rayon::prelude::*;
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, TILE_WEIGHTS, count, position};
use upg_kernel::matrix::{
    BITMAP_GROUP, BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, WORD as WORD_BITS,
};
use upg_kernel::{Error, ErrorKind, Result};

const WORD_BYTES: usize = WORD_BITS / 8;

const WORDS_PER_TILE: usize = TILE_WEIGHTS / WORD_BITS;

const ROWS_PER_WORD: usize = WORD_BITS / TILE_COLS;

/// The codes of whole rows in strips of `strip_len` elements: `put(strip, row, col, code)` adds
/// one of them.
pub(super) fn pack_all<T: Copy + Default + Send>(
    encoded: &[EncodedRow],
    strip_len: usize,
    put: impl Fn(&mut [T], usize, usize, u8) + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); count(encoded.len()) * strip_len];
    out.par_chunks_exact_mut(strip_len.max(1))
        .zip(encoded.par_chunks(STRIP_ROWS))
        .for_each(|(strip, encoded)| {
            for (row, encoded) in encoded.iter().enumerate() {
                for (col, &code) in encoded.codes.iter().enumerate() {
                    put(strip, row, col, code);
                }
            }
        });
    out
}

/// A matrix of these `levels`, with the primes and the scales of the rows.
pub(super) fn grouped(
    encoded: &[EncodedRow],
    cols: usize,
    group: usize,
    levels: Levels,
) -> Result<GroupedMatrix> {
    let primes = primes(encoded, cols.div_ceil(group));
    let scales = scales(encoded);
    GroupedMatrix::new(
        encoded.len(),
        cols,
        group,
        levels,
        primes.into(),
        scales.into(),
    )
}

/// Packs a matrix of the weights that are not zero.
///
/// `pack` appends the codes of a word of the bitmap as they are stored, `levels` wraps all of them.
pub(super) fn bitmap<T: Copy + Send + Sync>(
    weights: &[f32],
    encoded: &[EncodedRow],
    cols: usize,
    pack: impl Fn(&[u8], &mut Vec<T>) + Sync,
    levels: impl FnOnce(Vec<T>) -> Levels,
) -> Result<BitmapMatrix> {
    let (rows, groups) = (encoded.len(), cols.div_ceil(BITMAP_GROUP));
    let strip_bytes = groups * BITMAP_GROUP * STRIP_ROWS / 8;
    let mut bits = vec![0; count(rows) * strip_bytes];
    let strips: Vec<Vec<T>> = bits
        .par_chunks_exact_mut(strip_bytes.max(1))
        .zip(encoded.par_chunks(STRIP_ROWS))
        .zip(weights.par_chunks((STRIP_ROWS * cols).max(1)))
        .map(|((bits, encoded), weights)| pack_kept(weights, encoded, cols, bits, &pack))
        .collect();
    let mut pointers = vec![0; count(rows) + 1];
    let mut end = 0usize;
    for (pointer, strip) in pointers[1..].iter_mut().zip(&strips) {
        end += strip.len();
        let too_large = || {
            let message = "more than 4 GiB of codes in one matrix";
            Error::new(ErrorKind::TooLarge, message)
        };
        *pointer = u32::try_from(end).map_err(|_| too_large())?;
    }
    let arrays = BitmapArrays {
        bitmap: bits.into(),
        levels: levels(strips.concat()),
        strip_pointers: pointers.into(),
        prime_indices: primes(encoded, groups).into(),
        scales: scales(encoded).into(),
    };
    BitmapMatrix::new(rows, cols, arrays)
}

/// Sets the `bits` of a strip and returns its codes, word by word.
fn pack_kept<T>(
    weights: &[f32],
    encoded: &[EncodedRow],
    cols: usize,
    bits: &mut [u8],
    pack: &impl Fn(&[u8], &mut Vec<T>),
) -> Vec<T> {
    // Columns ascend from tile to tile: the codes of a row are taken one after the other.
    let mut rest: Vec<_> = encoded.iter().map(|row| row.codes.iter()).collect();
    let (mut out, mut codes) = (Vec::new(), Vec::with_capacity(WORD_BITS));
    for (i, word) in bits.as_chunks_mut::<WORD_BYTES>().0.iter_mut().enumerate() {
        let (col, row) = (
            i / WORDS_PER_TILE * TILE_COLS,
            i % WORDS_PER_TILE * ROWS_PER_WORD,
        );
        let mut kept = 0u64;
        codes.clear();
        for row in row..encoded.len().min(row + ROWS_PER_WORD) {
            for col in col..cols.min(col + TILE_COLS) {
                if weights[row * cols + col] != 0.0 {
                    kept |= 1 << (position(row, col) % WORD_BITS);
                    codes.extend(rest[row].next());
                }
            }
        }
        *word = kept.to_le_bytes();
        pack(&codes, &mut out);
    }
    out
}

/// `[strips, groups, 64]`.
fn primes(encoded: &[EncodedRow], groups: usize) -> Vec<u8> {
    let mut out = vec![0; count(encoded.len()) * groups * STRIP_ROWS];
    let strips = out.chunks_exact_mut((groups * STRIP_ROWS).max(1));
    for (out, encoded) in strips.zip(encoded.chunks(STRIP_ROWS)) {
        for (row, encoded) in encoded.iter().enumerate() {
            for (group, &prime) in encoded.primes.iter().enumerate() {
                out[group * STRIP_ROWS + row] = prime;
            }
        }
    }
    out
}

fn scales(encoded: &[EncodedRow]) -> Vec<f32> {
    encoded.iter().map(|row| row.scale).collect()
}

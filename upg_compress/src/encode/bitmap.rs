//! The encoders of `s8` and `s4`: a bitmap says which weights are stored, all others are zero.
#![forbid(unsafe_code)]

use super::encoder::{DefaultEmbedding, Encoder};
use super::rounding::levels::{Codebook, Kept8};
use super::rounding::row::EncodedRow;
use super::rounding::{encode, fit_codebook, levels, primes, scales};
use crate::sensitivity::curvature::Curvature;
use rayon::prelude::*;
use upg_kernel::format::Encoding;
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, TILE_WEIGHTS, count, position};
use upg_kernel::matrix::{BITMAP_GROUP, BitmapArrays, BitmapMatrix, WORD as WORD_BITS};
use upg_kernel::{Error, ErrorKind, Matrix, Result};

const WORD_BYTES: usize = WORD_BITS / 8;

const WORDS_PER_TILE: usize = TILE_WEIGHTS / WORD_BITS;

const ROWS_PER_WORD: usize = WORD_BITS / TILE_COLS;

pub(super) const S8: Encoder = Encoder {
    encoding: Encoding::S8,
    describe: |layer, _| layer.group = Some(BITMAP_GROUP),
    encode: |weights, layer, _, curvature, progress| {
        let matrix = round_s8(weights, layer.rows, layer.cols, curvature)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::Bitmap(matrix))
    },
    repeat: |_, _| Ok(None),
    scratch_bytes: |weights, _| weights,
    is_calibrated: true,
    takes_group: false,
    stores_zeros: true,
    sparse: None,
    by_row: true,
    embedding: DefaultEmbedding::Q8,
};

pub(super) const S4: Encoder = Encoder {
    encoding: Encoding::S4,
    encode: |weights, layer, _, curvature, progress| {
        let matrix = round_s4(weights, layer.rows, layer.cols, curvature)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::Bitmap(matrix))
    },
    ..S8
};

/// Rounds the weights that are not zero to `s8`.
///
/// Their levels are not zero either: exactly the zeros of `weights` stay zero. With a `curvature`
/// levels are chosen again, the zeros stay. Cost and errors: as [`round_q8`](super::round_q8), and
/// `TooLarge` from 4 GiB of codes on.
pub fn round_s8(
    weights: &[f32],
    rows: usize,
    cols: usize,
    curvature: Option<&Curvature>,
) -> Result<BitmapMatrix> {
    let encoded = encode(weights, rows, cols, BITMAP_GROUP, curvature, true, &Kept8)?;
    pack(weights, &encoded, cols, None)
}

/// Rounds the weights that are not zero to `s4`, with a codebook without a zero.
///
/// Otherwise as [`round_s8`].
pub fn round_s4(
    weights: &[f32],
    rows: usize,
    cols: usize,
    curvature: Option<&Curvature>,
) -> Result<BitmapMatrix> {
    let start = Codebook::without_zero();
    let codebook = fit_codebook(weights, rows, cols, BITMAP_GROUP, true, start)?;
    let encoded = encode(
        weights,
        rows,
        cols,
        BITMAP_GROUP,
        curvature,
        true,
        &codebook,
    )?;
    pack(weights, &encoded, cols, Some(&codebook))
}

/// Packs the levels, or codes into a codebook, of the weights that are not zero.
fn pack(
    weights: &[f32],
    encoded: &[EncodedRow],
    cols: usize,
    codebook: Option<&Codebook>,
) -> Result<BitmapMatrix> {
    let (rows, groups) = (encoded.len(), cols.div_ceil(BITMAP_GROUP));
    let strip_bytes = groups * BITMAP_GROUP * STRIP_ROWS / 8;
    let mut bits = vec![0; count(rows) * strip_bytes];
    let strips: Vec<Vec<u8>> = bits
        .par_chunks_exact_mut(strip_bytes.max(1))
        .zip(encoded.par_chunks(STRIP_ROWS))
        .zip(weights.par_chunks((STRIP_ROWS * cols).max(1)))
        .map(|((bits, encoded), weights)| {
            pack_strip(weights, encoded, cols, bits, codebook.is_some())
        })
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
        levels: levels(strips.concat(), codebook),
        strip_pointers: pointers.into(),
        prime_indices: primes(encoded, groups).into(),
        scales: scales(encoded).into(),
    };
    BitmapMatrix::new(rows, cols, arrays)
}

/// Sets the `bits` of a strip and returns its codes, word by word: a byte each, or two a byte.
fn pack_strip(
    weights: &[f32],
    encoded: &[EncodedRow],
    cols: usize,
    bits: &mut [u8],
    nibbles: bool,
) -> Vec<u8> {
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
        match nibbles {
            false => out.extend(&codes),
            true => out.extend(
                codes
                    .chunks(2)
                    .map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4),
            ),
        }
    }
    out
}

//! The encoders of `q8` and `q4`: a level for every weight, a prime for every group of columns.
#![forbid(unsafe_code)]

use super::encoder::{DefaultEmbedding, Encoder, Profile, SparseForm};
use super::repeat::{by_strip, cycled};
use super::rounding::levels::{Codebook, LevelSet, Linear8};
use super::rounding::row::EncodedRow;
use super::rounding::{encode, fit_codebook, primes, scales};
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use rayon::prelude::*;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS, count, nibble, position};
use upg_kernel::matrix::{GroupedMatrix, Levels};
use upg_kernel::{Matrix, Result};

/// Columns of a group, if the options do not say: with `q8`, and with `q4`.
const GROUPS: [usize; 2] = [64, 32];

/// `q8`, or with nibbles `q4`.
pub(super) struct Grouped {
    nibbles: bool,
}

pub(super) const Q8: Grouped = Grouped { nibbles: false };
pub(super) const Q4: Grouped = Grouped { nibbles: true };

impl Encoder for Grouped {
    fn profile(&self) -> Profile {
        let (encoding, level_bits) = match self.nibbles {
            false => (Encoding::S8, 8.0),
            true => (Encoding::S4, 4.0),
        };
        Profile {
            is_calibrated: true,
            takes_group: true,
            stores_zeros: false,
            sparse: Some(SparseForm {
                encoding,
                level_bits,
            }),
            by_row: true,
            embedding: DefaultEmbedding::Q8,
        }
    }

    fn describe(&self, layer: &mut LayerInfo, group: Option<usize>) {
        layer.group = Some(group.unwrap_or(GROUPS[usize::from(self.nibbles)]));
    }

    fn encode(
        &self,
        weights: &[f32],
        layer: &LayerInfo,
        _: u64,
        curvature: Option<&Curvature>,
        progress: &dyn Progress,
    ) -> Result<Matrix> {
        let group = layer.group.unwrap_or(GROUPS[0]);
        let round = if self.nibbles { round_q4 } else { round_q8 };
        let matrix = round(weights, layer.rows, layer.cols, group, curvature)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::Grouped(matrix))
    }

    fn repeat(&self, strip: &Matrix, rows: usize) -> Result<Option<Matrix>> {
        let Matrix::Grouped(m) = strip else {
            return Ok(None);
        };
        let levels = match m.levels() {
            Levels::Bytes(values) => Levels::Bytes(by_strip(values, TILE_COLS, rows)),
            Levels::Nibbles { codes, codebook } => Levels::Nibbles {
                codes: by_strip(codes, TILE_COLS, rows),
                codebook: codebook.clone(),
            },
        };
        let primes = by_strip(m.prime_indices(), 1, rows);
        let scales = cycled(m.scales(), rows);
        let matrix =
            GroupedMatrix::new(rows, strip.cols(), m.group(), levels, primes, scales.into());
        Ok(Some(Matrix::Grouped(matrix?)))
    }

    fn scratch_bytes(&self, weights: u64, _: u64) -> u64 {
        weights
    }
}

/// Rounds a matrix `[rows, cols]` to `q8` with groups of `group` columns.
///
/// Cost: an error evaluation for each prime in the range that the largest weight of a group
/// leaves, 115 for the group with the largest weight of its row. With a `curvature` also `rows *
/// cols^2 / 2` multiplications, and what
/// [`Feedback::new`](crate::sensitivity::hessian::Feedback::new) takes. Errors: `Shape` for a
/// wrong length or the curvature of another matrix, `Invalid` for a weight that is not finite;
/// those of `Feedback::new`.
pub fn round_q8(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
) -> Result<GroupedMatrix> {
    let encoded = encode(weights, rows, cols, group, curvature, false, &Linear8)?;
    let strip = cols.div_ceil(group) * group * STRIP_ROWS;
    let values = pack_all(&encoded, strip, |strip: &mut [i8], row, col, code| {
        strip[position(row, col)] = Linear8.level(code);
    });
    grouped(&encoded, cols, group, Levels::Bytes(values.into()))
}

/// Rounds a matrix to `q4`: fits a codebook to a sample of its rows, then proceeds as [`round_q8`].
///
/// Cost and errors: as [`round_q8`].
pub fn round_q4(
    weights: &[f32],
    rows: usize,
    cols: usize,
    group: usize,
    curvature: Option<&Curvature>,
) -> Result<GroupedMatrix> {
    let start = Codebook::gaussian();
    let codebook = fit_codebook(weights, rows, cols, group, false, start)?;
    let encoded = encode(weights, rows, cols, group, curvature, false, &codebook)?;
    let strip = cols.div_ceil(group) * group * STRIP_ROWS / 2;
    let codes = pack_all(&encoded, strip, |strip: &mut [u8], row, col, code| {
        let (byte, shift) = nibble(row, col);
        strip[byte] |= code << shift;
    });
    let levels = Levels::Nibbles {
        codes: codes.into(),
        codebook: codebook.levels().to_vec().into(),
    };
    grouped(&encoded, cols, group, levels)
}

/// The codes of whole rows in strips of `strip_len` elements: `put(strip, row, col, code)` adds
/// one of them.
fn pack_all<T: Copy + Default + Send>(
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
fn grouped(
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

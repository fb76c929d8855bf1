//! `q8` and `q4`: a level for every weight, a prime index for every group of columns.
#![forbid(unsafe_code)]

use super::stored::{StoredMatrix, checked_scales, weight};
use super::strips::{self, STRIP_ROWS};
use crate::array::Array;
use crate::error::Result;
use crate::format::rules;
use crate::kernels::views::{Codes, Primes, Strip};
use crate::matrix::Levels;
use crate::prime_lut::PRIME_LUT;

/// A matrix `[rows, cols]` of int8 levels (`q8`) or 4-bit codes into a codebook (`q4`).
///
/// In [`strips`], whose columns are padded to a whole number of groups.
#[derive(Debug, Clone)]
pub struct GroupedMatrix {
    rows: usize,
    cols: usize,
    group: usize,
    levels: Levels,
    prime_indices: Array<u8>,
    scales: Array<f32>,
}

impl GroupedMatrix {
    /// Checks all lengths; the content of every array but `scales` is valid whatever it is.
    ///
    /// With `S = ceil(rows / 64)` and `G = ceil(cols / group)`, `levels` is `[S, 64 * G * group]` levels at
    /// their [`strips::position`] or half as many bytes with codes at their [`strips::nibble`],
    /// `prime_indices` `[S, G, 64]`, and `scales` `[rows]`.
    /// Errors: `Shape` for a wrong length, `Invalid` for a group other than 32 or 64 or a scale that
    /// is not finite, `TooLarge` if sizes overflow.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        levels: Levels,
        prime_indices: Array<u8>,
        scales: Array<f32>,
    ) -> Result<Self> {
        rules::group(group)?;
        let weights = strips::padded_weights(cols, group)?;
        let (found, per_strip) = match &levels {
            Levels::Bytes(values) => (values.len(), weights),
            Levels::Nibbles { codes, codebook } => {
                rules::codebook(codebook)?;
                (codes.len(), weights / 2)
            }
        };
        let strips = strips::count(rows);
        rules::length("codes", found, &[strips, per_strip])?;
        let per_strip = [strips, cols.div_ceil(group), STRIP_ROWS];
        rules::length("prime_indices", prime_indices.len(), &per_strip)?;
        checked_scales(&scales, rows)?;
        Ok(Self {
            rows,
            cols,
            group,
            levels,
            prime_indices,
            scales,
        })
    }

    /// How many columns share a prime index.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The levels or codes.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// `[ceil(rows / 64), ceil(cols / group), 64]` indices into the first 256 primes.
    pub fn prime_indices(&self) -> &Array<u8> {
        &self.prime_indices
    }

    /// One scale a row.
    pub fn scales(&self) -> &Array<f32> {
        &self.scales
    }

    /// For others that are checked.
    pub(crate) fn scales_mut(&mut self) -> &mut Array<f32> {
        &mut self.scales
    }

    fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// Weights of a strip, padding included.
    fn strip_weights(&self) -> usize {
        self.groups() * self.group * STRIP_ROWS
    }

    fn level(&self, row: usize, col: usize) -> i8 {
        let strip = row / STRIP_ROWS * self.strip_weights();
        match &self.levels {
            Levels::Bytes(values) => values[strip + strips::position(row, col)],
            Levels::Nibbles { codes, codebook } => {
                let (byte, shift) = strips::nibble(row, col);
                codebook[usize::from(codes[strip / 2 + byte] >> shift & 15)]
            }
        }
    }
}

impl StoredMatrix for GroupedMatrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn strip(&self, index: usize) -> Option<Strip<'_>> {
        let weights = self.strip_weights();
        let codes = match &self.levels {
            Levels::Bytes(values) => {
                let values = values.get(index * weights..(index + 1) * weights)?;
                Codes::Bytes(bytemuck::cast_slice(values))
            }
            Levels::Nibbles { codes, codebook } => {
                let half = weights / 2;
                let codes = codes.get(index * half..(index + 1) * half)?;
                Codes::Nibbles(codes, codebook.first_chunk()?)
            }
        };
        let groups = self.groups();
        let (indices, _) = self.prime_indices.as_chunks();
        Some(Strip {
            codes,
            cols: self.cols,
            primes: Primes::Groups {
                indices: indices.get(index * groups..(index + 1) * groups)?,
                cols: self.group,
            },
            scales: self.scales.get(strips::rows(index, self.rows))?,
        })
    }

    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        let groups = self.groups();
        for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
            let row = first + i;
            let scale = self.scales[row];
            for (col, out) in out.iter_mut().enumerate() {
                let group = row / STRIP_ROWS * groups + col / self.group;
                let index = self.prime_indices[group * STRIP_ROWS + row % STRIP_ROWS];
                let prime = PRIME_LUT[usize::from(index)];
                *out = weight(scale, prime, self.level(row, col));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::test_data::{noise, signed};

    /// Random codes for all that is stored, padding included.
    fn matrix(rows: usize, cols: usize, group: usize, is_q8: bool) -> GroupedMatrix {
        let groups = rows.div_ceil(64) * cols.div_ceil(group);
        let levels = match is_q8 {
            true => Levels::Bytes(signed(noise(groups * group * 64, 1))),
            false => Levels::Nibbles {
                codes: noise(groups * group * 32, 2).into(),
                codebook: signed(noise(16, 3)),
            },
        };
        let scales: Vec<f32> = (0..rows).map(|row| 0.5 + row as f32).collect();
        let primes = noise(groups * 64, 4).into();
        GroupedMatrix::new(rows, cols, group, levels, primes, scales.into()).unwrap()
    }

    #[test]
    fn every_weight_follows_the_layout_and_any_range_is_a_part_of_the_whole() {
        for (rows, cols) in [(1, 1), (3, 34), (63, 70), (64, 8), (130, 65)] {
            for (group, is_q8) in [(32, true), (64, true), (32, false), (64, false)] {
                let m = matrix(rows, cols, group, is_q8);
                let groups = cols.div_ceil(group);
                let mut all = vec![f32::NAN; rows * cols];
                m.decode_rows(0, &mut all);
                for (i, &found) in all.iter().enumerate() {
                    let (row, col) = (i / cols, i % cols);
                    let strip = row / 64 * groups * group * 64;
                    let level = match &m.levels {
                        Levels::Bytes(values) => {
                            values[strip + (col / 4) * 256 + (row % 64) * 4 + col % 4]
                        }
                        Levels::Nibbles { codes, codebook } => {
                            let byte = (col / 8) * 256 + (row % 64) * 4 + col % 4;
                            let code = codes[strip / 2 + byte] >> (col % 8 / 4 * 4) & 15;
                            codebook[usize::from(code)]
                        }
                    };
                    let index = (row / 64 * groups + col / group) * 64 + row % 64;
                    let prime = PRIME_LUT[usize::from(m.prime_indices[index])] as i32;
                    let expected = (0.5 + row as f32) * (prime * i32::from(level)) as f32;
                    assert_eq!(found, expected, "[{rows}, {cols}] at {row}, {col}");
                }
                for (first, end) in [(0, rows), (rows / 2, rows), (rows - 1, rows)] {
                    let mut some = vec![f32::NAN; (end - first) * cols];
                    m.decode_rows(first, &mut some);
                    assert_eq!(some, all[first * cols..end * cols]);
                }
            }
        }
    }

    #[test]
    fn parts_of_another_size_are_refused() {
        let new = |values: usize, primes: usize, scales: usize, group: usize| {
            let levels = Levels::Bytes(vec![0; values].into());
            let (primes, scales) = (vec![0; primes].into(), vec![0.0; scales].into());
            let m = GroupedMatrix::new(65, 33, group, levels, primes, scales);
            m.map_err(|e| e.kind()).map(|_| ())
        };
        assert_eq!(new(2 * 64 * 64, 2 * 2 * 64, 65, 32), Ok(()));
        assert_eq!(
            new(2 * 64 * 64 - 1, 2 * 2 * 64, 65, 32),
            Err(ErrorKind::Shape)
        );
        assert_eq!(new(2 * 64 * 64, 65 * 2, 65, 32), Err(ErrorKind::Shape));
        assert_eq!(new(2 * 64 * 64, 2 * 2 * 64, 64, 32), Err(ErrorKind::Shape));
        assert_eq!(
            new(2 * 64 * 64, 2 * 2 * 64, 65, 48),
            Err(ErrorKind::Invalid)
        );
        let levels = Levels::Bytes(Vec::new().into());
        let e = GroupedMatrix::new(
            1,
            usize::MAX,
            64,
            levels,
            Vec::new().into(),
            vec![0.0].into(),
        );
        assert_eq!(e.unwrap_err().kind(), ErrorKind::TooLarge);
    }
}

//! `q8` and `q4`: a level for every weight, a prime index for every group of columns.
#![forbid(unsafe_code)]

use super::layer::{ArraySpec, Codec};
use super::levels::Levels;
use super::stored::{self, StoredMatrix, checked_scales, weight};
use super::strips::{self, STRIP_ROWS};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::kernels::views::{Codes, Primes, Strip};
use crate::prime_lut::PRIME_LUT;
use bytemuck::cast_slice;
use safetensors::Dtype;

/// Columns of a group in a description without `group`, which is invalid but has a size.
const DEFAULT_GROUP: usize = 64;

pub(super) const Q8: Codec<GroupedMatrix> = codec::<false>();
pub(super) const Q4: Codec<GroupedMatrix> = codec::<true>();

const fn codec<const NIBBLES: bool>() -> Codec<GroupedMatrix> {
    Codec {
        check: |layer| {
            let none = || layer.wrong_parameter("with 'group' None");
            check_group(layer.group.ok_or_else(none)?)?;
            layer.has_no("hadamard", layer.hadamard)
        },
        arrays: |layer| {
            let group = layer.group.unwrap_or(DEFAULT_GROUP);
            let strips = strips::count(layer.rows);
            let weights =
                strips::padded_weights(layer.cols, group).map_err(|e| e.rule(rules::LAYERS))?;
            let primes = [strips, layer.cols.div_ceil(group), STRIP_ROWS];
            let mut arrays = vec![
                match NIBBLES {
                    false => ArraySpec::fixed("values", Dtype::I8, &[strips, weights]),
                    true => ArraySpec::fixed("codes", Dtype::U8, &[strips, weights / 2]),
                },
                ArraySpec::fixed("prime_indices", Dtype::U8, &primes),
                ArraySpec::scales(layer),
            ];
            arrays.extend(NIBBLES.then(Levels::codebook_spec));
            Ok(arrays)
        },
        check_opened: |layer, arrays| stored::check_scales(arrays, layer.rows),
        matrix: |layer, arrays| {
            GroupedMatrix::new(
                layer.rows,
                layer.cols,
                layer.group.unwrap_or(DEFAULT_GROUP),
                Levels::read(arrays, NIBBLES)?,
                arrays.get("prime_indices")?,
                arrays.get("scales")?,
            )
        },
    }
}

fn check_group(group: usize) -> Result<()> {
    if matches!(group, 32 | 64) {
        return Ok(());
    }
    let message = format!("group of {group} columns, expected 32 or 64");
    Err(Error::new(ErrorKind::Invalid, message).rule(rules::ENCODING))
}

/// A matrix `[rows, cols]` of int8 levels (`q8`) or 4-bit codes into a codebook (`q4`).
///
/// It is stored in [`strips`], whose columns are padded to a whole number of groups.
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
    /// Makes a matrix of these arrays. Checks all lengths and scales.
    ///
    /// With `S = ceil(rows / 64)` and `G = ceil(cols / group)`, `levels` is `[S, 64 * G * group]`
    /// levels at their [`strips::position`] or half as many bytes with codes at their
    /// [`strips::nibble`], `prime_indices` is `[S, G, 64]` and `scales` `[rows]`.
    ///
    /// Errors: `Shape` for a wrong length, `Invalid` for a group other than 32 or 64 or a scale
    /// that is not finite, `TooLarge` if sizes overflow.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        levels: Levels,
        prime_indices: Array<u8>,
        scales: Array<f32>,
    ) -> Result<Self> {
        check_group(group)?;
        let weights = strips::padded_weights(cols, group)?;
        let per_strip = match levels {
            Levels::Bytes(_) => weights,
            Levels::Nibbles { .. } => weights / 2,
        };
        let strips = strips::count(rows);
        rules::length("codes", levels.checked_len()?, &[strips, per_strip])?;
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

    /// Columns that share a prime index.
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

    /// The scale of each row.
    pub fn scales(&self) -> &Array<f32> {
        &self.scales
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
    fn size(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn array(&self, suffix: &str) -> Option<&[u8]> {
        match suffix {
            "prime_indices" => Some(&self.prime_indices),
            "scales" => Some(cast_slice(&self.scales)),
            _ => self.levels.array(suffix),
        }
    }

    fn scales(&self) -> Option<&Array<f32>> {
        Some(&self.scales)
    }

    fn scales_mut(&mut self) -> Option<&mut Array<f32>> {
        Some(&mut self.scales)
    }

    fn strip(&self, index: usize) -> Option<Strip<'_>> {
        let weights = self.strip_weights();
        let codes = match &self.levels {
            Levels::Bytes(values) => {
                let values = values.get(index * weights..(index + 1) * weights)?;
                Codes::Bytes(cast_slice(values))
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
    use crate::test_data::grouped;

    fn matrix(rows: usize, cols: usize, group: usize, is_q8: bool) -> GroupedMatrix {
        let scales: Vec<f32> = (0..rows).map(|row| 0.5 + row as f32).collect();
        let scales = scales.into();
        GroupedMatrix {
            scales,
            ..grouped(rows, cols, group, !is_q8)
        }
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

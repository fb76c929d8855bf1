//! The trellis encodings `t2`, `t3`, `t4`: 2, 3 or 4 bits a weight in a rotated basis.
//!
//! A strip of 64 rows is one bit stream. Every weight reads 13 bits of it; the next weight reads 13
//! bits that start `k` later. So a weight costs `k` bits, but its level also depends on the weights
//! before it. A search over such chains (trellis-coded quantization) comes within 0.4 to 0.9 dB of
//! the best possible code of that size. Any weight can still be decoded on its own. Source: QTIP
//! (arXiv 2406.11235), with a different code ([`crate::trellis_code`]).
#![forbid(unsafe_code)]

use super::layer::{ArraySpec, Codec};
use super::stored::{self, StoredMatrix, checked_scales, weight};
use super::strips::{self, STRIP_ROWS, TILE_COLS, TILE_WEIGHTS};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::kernels::views::{Codes, Primes, Strip};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use crate::trellis_code::{self, STATES};
use bytemuck::cast_slice;
use safetensors::Dtype;

/// Bytes after the last tile of a strip: the end of the last state, and room for wide loads.
const STRIP_TAIL: usize = 16;

/// Tiles that are decoded row by row before the next ones: they stay in the L1 cache.
const TILES_AT_ONCE: usize = 16;

/// Weights in the stream of a strip of `cols` columns, padding included. `None`: overflow.
pub fn strip_weights(cols: usize) -> Option<usize> {
    cols.div_ceil(TILE_COLS).checked_mul(TILE_WEIGHTS)
}

/// Bytes of a strip of `cols` columns at `k` bits: `32 * k * ceil(cols / 4) + 16`.
///
/// `None`: overflow.
pub fn strip_bytes(cols: usize, k: u8) -> Option<usize> {
    (strip_weights(cols)? / 8)
        .checked_mul(usize::from(k))?
        .checked_add(STRIP_TAIL)
}

pub(super) const T2: Codec<TrellisMatrix> = codec::<2>();
pub(super) const T3: Codec<TrellisMatrix> = codec::<3>();
pub(super) const T4: Codec<TrellisMatrix> = codec::<4>();

const fn codec<const K: u8>() -> Codec<TrellisMatrix> {
    Codec {
        check: |layer| {
            layer.has_no("group", layer.group)?;
            let none = || layer.wrong_parameter("without 'hadamard'");
            rules::hadamard(layer.cols, layer.hadamard.ok_or_else(none)?)
        },
        arrays: |layer| {
            let strip = strip_bytes(layer.cols, K).ok_or_else(|| {
                let message = format!("a trellis matrix of {} columns", layer.cols);
                Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS)
            })?;
            let signs = layer.hadamard.unwrap_or(1).div_ceil(8);
            Ok(vec![
                ArraySpec::fixed("codes", Dtype::U8, &[strips::count(layer.rows), strip]),
                ArraySpec::fixed("prime_indices", Dtype::U8, &[layer.rows, 1]),
                ArraySpec::scales(layer),
                ArraySpec::fixed("signs", Dtype::U8, &[signs]),
            ])
        },
        check_opened: |layer, arrays| stored::check_scales(arrays, layer.rows),
        matrix: |layer, arrays| {
            let hadamard = layer.hadamard.unwrap_or(1);
            let parts = TrellisParts {
                codes: arrays.get("codes")?,
                prime_indices: arrays.get("prime_indices")?,
                scales: arrays.get("scales")?,
                rotation: Rotation::new(layer.cols, hadamard, arrays.get("signs")?)?,
            };
            TrellisMatrix::new(layer.rows, layer.cols, K, parts)
        },
    }
}

/// The arrays of a [`TrellisMatrix`], as a file stores them.
#[derive(Debug, Clone)]
pub struct TrellisParts {
    /// The strips, one after the other, [`strip_bytes`] each.
    pub codes: Array<u8>,
    /// An index into the first 256 primes for each row.
    pub prime_indices: Array<u8>,
    /// The scale of each row, finite.
    pub scales: Array<f32>,
    /// The rotation `R` of the input: the matrix holds `W R^T`.
    pub rotation: Rotation,
}

/// A matrix `[rows, cols]` in encoding `t2`, `t3` or `t4`: `k = 2, 3, 4` bits a weight.
///
/// In the rotated basis `w[r, c] = scales[r] * (PRIME_LUT[prime_indices[r]] * level)`: the integer
/// product is exact in f32, so there is one rounding.
#[derive(Debug, Clone)]
pub struct TrellisMatrix {
    rows: usize,
    cols: usize,
    k: u8,
    strip_bytes: usize,
    parts: TrellisParts,
    /// The level of every state.
    levels: &'static [i8; STATES],
}

impl TrellisMatrix {
    /// Makes a matrix of these parts. Checks all lengths and scales; every code is valid.
    ///
    /// Cost: reads `scales` once; `codes` is not read. Errors: `Unsupported` if `k` is not 2, 3 or
    /// 4; `Shape` for a part of a wrong length; `Invalid` if a scale is not finite or above 2^64;
    /// `TooLarge` if the sizes overflow.
    pub fn new(rows: usize, cols: usize, k: u8, parts: TrellisParts) -> Result<Self> {
        let levels = trellis_code::levels(k).ok_or_else(|| {
            let message = format!("trellis code of {k} bits a weight, expected 2, 3 or 4");
            Error::new(ErrorKind::Unsupported, message)
        })?;
        let strip_bytes = strip_bytes(cols, k).ok_or_else(|| {
            let message = format!("trellis matrix [{rows}, {cols}]");
            Error::new(ErrorKind::TooLarge, message)
        })?;
        let strips = strips::count(rows);
        rules::length("codes", parts.codes.len(), &[strips, strip_bytes])?;
        rules::length("prime_indices", parts.prime_indices.len(), &[rows])?;
        rules::length("columns of the rotation", parts.rotation.cols(), &[cols])?;
        checked_scales(&parts.scales, rows)?;
        Ok(Self {
            rows,
            cols,
            k,
            strip_bytes,
            parts,
            levels,
        })
    }

    /// Bits a weight: 2, 3 or 4.
    pub fn k(&self) -> u8 {
        self.k
    }

    /// The parts, as a file stores them.
    pub fn parts(&self) -> &TrellisParts {
        &self.parts
    }

    /// The levels of four neighbours in a row of a strip: columns `4 * tile ..`.
    fn levels_of_four(&self, strip: &[u8], tile: usize, row: usize) -> [i8; TILE_COLS] {
        let k = u32::from(self.k);
        // 4 k bits a row: 8, 12 or 16, so that a state starts at a half byte at most, and the
        // four of them end inside of 32 bits. The tail keeps the load inside of the strip.
        let bit = usize::from(self.k) * (tile * TILE_WEIGHTS + row * TILE_COLS);
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&strip[bit / 8..bit / 8 + 4]);
        let bits = u32::from_le_bytes(bytes) >> (bit % 8);
        std::array::from_fn(|i| self.levels[(bits >> (k * i as u32)) as usize % STATES])
    }

    /// Decodes `out.len() / cols` rows from row `first` on; all of them lie in one strip.
    fn decode_in_strip(&self, first: usize, out: &mut [f32]) {
        let start = first / STRIP_ROWS * self.strip_bytes;
        let strip = &self.parts.codes[start..start + self.strip_bytes];
        let tiles = self.cols.div_ceil(TILE_COLS);
        for tile in (0..tiles).step_by(TILES_AT_ONCE) {
            let end = tiles.min(tile + TILES_AT_ONCE);
            for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
                let row = first + i;
                let scale = self.parts.scales[row];
                let prime = PRIME_LUT[usize::from(self.parts.prime_indices[row])];
                let out = &mut out[tile * TILE_COLS..self.cols.min(end * TILE_COLS)];
                for (tile, out) in (tile..end).zip(out.chunks_mut(TILE_COLS)) {
                    let levels = self.levels_of_four(strip, tile, row % STRIP_ROWS);
                    for (out, level) in out.iter_mut().zip(levels) {
                        *out = weight(scale, prime, level);
                    }
                }
            }
        }
    }
}

impl StoredMatrix for TrellisMatrix {
    fn size(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn array(&self, suffix: &str) -> Option<&[u8]> {
        Some(match suffix {
            "codes" => &self.parts.codes,
            "prime_indices" => &self.parts.prime_indices,
            "scales" => cast_slice(&self.parts.scales),
            "signs" => self.parts.rotation.signs(),
            _ => return None,
        })
    }

    fn scales(&self) -> Option<&Array<f32>> {
        Some(&self.parts.scales)
    }

    fn scales_mut(&mut self) -> Option<&mut Array<f32>> {
        Some(&mut self.parts.scales)
    }

    fn strip(&self, index: usize) -> Option<Strip<'_>> {
        let start = index * self.strip_bytes;
        let rows = strips::rows(index, self.rows);
        Some(Strip {
            codes: Codes::Trellis {
                k: self.k,
                stream: self.parts.codes.get(start..start + self.strip_bytes)?,
            },
            cols: self.cols,
            primes: Primes::Rows(self.parts.prime_indices.get(rows.clone())?),
            scales: self.parts.scales.get(rows)?,
        })
    }

    fn decode_rows(&self, mut first: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let rows = STRIP_ROWS - first % STRIP_ROWS;
            let (now, rest) = out.split_at_mut(out.len().min(rows * self.cols));
            self.decode_in_strip(first, now);
            first += rows;
            out = rest;
        }
    }

    fn rotation(&self) -> Option<&Rotation> {
        Some(&self.parts.rotation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::Matrix;
    use crate::test_data::noise;
    use crate::trellis_code::TrellisCode;

    /// Random codes; identity rotation.
    fn parts(rows: usize, cols: usize, k: u8) -> TrellisParts {
        let codes = rows.div_ceil(64) * (32 * usize::from(k) * cols.div_ceil(4) + 16);
        TrellisParts {
            codes: noise(codes, 1).into(),
            prime_indices: noise(rows, 4).into(),
            scales: (0..rows).map(|r| 0.5 + r as f32).collect::<Vec<_>>().into(),
            rotation: Rotation::new(cols, 1, vec![0].into()).unwrap(),
        }
    }

    /// One bit after the other, straight from the layout.
    fn state_by_bits(m: &TrellisMatrix, row: usize, col: usize) -> u16 {
        let start = row / 64 * m.strip_bytes * 8
            + usize::from(m.k) * ((col / 4) * 256 + (row % 64) * 4 + col % 4);
        (0..13).fold(0, |state, i| {
            let bit = m.parts.codes[(start + i) / 8] >> ((start + i) % 8) & 1;
            state | u16::from(bit) << i
        })
    }

    #[test]
    fn a_stream_by_hand() {
        // k = 2, one row and three columns: states are bits 0..13, 2..15, 4..17 of the stream.
        let mut codes = vec![0; 32 * 2 + 16];
        codes[..3].copy_from_slice(&[0b1100_0101, 0b0100_0000, 0b1]);
        // bits 16..0: 1 0100 0000 1100 0101
        let states = [0b0_0000_1100_0101, 0b1_0000_0011_0001, 0b1_0100_0000_1100];
        let parts = TrellisParts {
            codes: codes.into(),
            prime_indices: vec![2].into(),
            scales: vec![0.25].into(),
            rotation: Rotation::new(3, 1, vec![1].into()).unwrap(),
        };
        let m = Matrix::Trellis(TrellisMatrix::new(1, 3, 2, parts).unwrap());
        // prime 5, scale 1/4; the rotation flips the signs of the first and the last column
        let code = TrellisCode::of(2).unwrap();
        let [a, b, c] = states.map(|state| 1.25 * f32::from(code.level(state)));
        assert_eq!(m.to_dense(), [-a, b, -c]);
    }

    #[test]
    fn every_weight_follows_the_layout() {
        for (rows, cols) in [(1, 1), (3, 5), (63, 2), (64, 4), (65, 67), (130, 9)] {
            for k in [2, 3, 4] {
                let m = TrellisMatrix::new(rows, cols, k, parts(rows, cols, k)).unwrap();
                let mut all = vec![f32::NAN; rows * cols];
                m.decode_rows(0, &mut all);
                for (i, &found) in all.iter().enumerate() {
                    let (row, col) = (i / cols, i % cols);
                    let state = state_by_bits(&m, row, col);
                    let level = TrellisCode::of(k).unwrap().level(state);
                    let prime = PRIME_LUT[m.parts.prime_indices[row] as usize] as i32;
                    let expected = m.parts.scales[row] * (prime * i32::from(level)) as f32;
                    assert_eq!(found, expected, "t{k} [{rows}, {cols}] at {row}, {col}");
                }
            }
        }
    }

    #[test]
    fn any_range_of_rows_is_a_part_of_the_whole() {
        let (rows, cols) = (150, 7);
        let m = TrellisMatrix::new(rows, cols, 3, parts(rows, cols, 3)).unwrap();
        let mut all = vec![0.0; rows * cols];
        m.decode_rows(0, &mut all);
        for (first, end) in [(0, 0), (0, 1), (63, 65), (64, 128), (10, 140), (149, 150)] {
            let mut some = vec![f32::NAN; (end - first) * cols];
            m.decode_rows(first, &mut some);
            assert_eq!(some, all[first * cols..end * cols], "rows {first}..{end}");
        }
    }

    /// The largest scale, prime and level in every column, all turned back into one.
    #[test]
    fn the_largest_weights_do_not_overflow_when_they_are_turned_back() {
        let cols = 6000;
        let mut parts = parts(1, cols, 4);
        // State 0 stands where the ring begins, at the lowest level there is.
        assert_eq!(TrellisCode::of(4).unwrap().level(0), i8::MIN);
        parts.codes = vec![0; parts.codes.len()].into();
        parts.prime_indices = vec![255].into();
        parts.scales = vec![2f32.powi(64)].into();
        parts.rotation = Rotation::new(cols, 4096, vec![0; 512].into()).unwrap();
        let m = Matrix::Trellis(TrellisMatrix::new(1, cols, 4, parts).unwrap());
        assert!(m.to_dense().iter().all(|w| w.is_finite()));
    }

    #[test]
    fn parts_of_another_size_are_refused() {
        type Damage = fn(&mut TrellisParts);
        let damages: [(ErrorKind, Damage); 7] = [
            (ErrorKind::Shape, |p| {
                p.codes = vec![0; p.codes.len() - 1].into()
            }),
            (ErrorKind::Shape, |p| {
                p.codes = vec![0; p.codes.len() + 1].into()
            }),
            (ErrorKind::Shape, |p| p.prime_indices = vec![0; 4].into()),
            (ErrorKind::Shape, |p| p.scales = vec![0.0; 6].into()),
            (ErrorKind::Invalid, |p| {
                p.scales = vec![0.0, 1.0, f32::INFINITY, 0.0, 0.0].into();
            }),
            (ErrorKind::Invalid, |p| p.scales = vec![f32::NAN; 5].into()),
            (ErrorKind::Shape, |p| {
                // as many bytes of signs, but another number of columns
                p.rotation = Rotation::new(7, 1, vec![0].into()).unwrap();
            }),
        ];
        for (i, (kind, damage)) in damages.into_iter().enumerate() {
            let mut parts = parts(5, 6, 3);
            damage(&mut parts);
            let e = TrellisMatrix::new(5, 6, 3, parts).unwrap_err();
            assert_eq!(e.kind(), kind, "damage {i}: {e}");
        }
        for k in [0, 1, 5, 255] {
            let e = TrellisMatrix::new(5, 6, k, parts(5, 6, k)).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
        }
        let sizes = [
            (usize::MAX, 4 << 40, ErrorKind::Shape),
            (1, usize::MAX, ErrorKind::TooLarge),
        ];
        for (rows, cols, kind) in sizes {
            let e = TrellisMatrix::new(rows, cols, 4, parts(1, 1, 4)).unwrap_err();
            assert_eq!(e.kind(), kind);
        }
    }
}

//! `s8` and `s4`: a bitmap says which weights are stored; the others are zero.
#![forbid(unsafe_code)]

use super::layer::{ArraySpec, Codec};
use super::levels::Levels;
use super::stored::{self, StoredMatrix, checked_scales, weight};
use super::strips::{self, STRIP_ROWS, TILE_COLS, TILE_WEIGHTS};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::kernels::views::{Codes, Primes, Strip};
use crate::prime_lut::PRIME_LUT;
use bytemuck::cast_slice;
use safetensors::Dtype;

/// Columns that share a prime index.
pub const BITMAP_GROUP: usize = 64;

/// Weights that share a word of the bitmap: sixteen rows of a tile.
pub const WORD: usize = 64;

const WORD_BYTES: usize = WORD / 8;

const WORDS_PER_TILE: usize = TILE_WEIGHTS / WORD;

pub(super) const S8: Codec<BitmapMatrix> = codec::<false>();
pub(super) const S4: Codec<BitmapMatrix> = codec::<true>();

const fn codec<const NIBBLES: bool>() -> Codec<BitmapMatrix> {
    Codec {
        check: |layer| {
            if layer.group != Some(BITMAP_GROUP) {
                return Err(layer.wrong_parameter(&format!("with 'group' {:?}", layer.group)));
            }
            layer.has_no("hadamard", layer.hadamard)
        },
        arrays: |layer| {
            let strips = strips::count(layer.rows);
            let weights = strips::padded_weights(layer.cols, BITMAP_GROUP)
                .map_err(|e| e.rule(rules::LAYERS))?;
            let primes = [strips, layer.cols.div_ceil(BITMAP_GROUP), STRIP_ROWS];
            let most = layer.weights();
            let mut arrays = vec![
                ArraySpec::fixed("bitmap", Dtype::U8, &[strips, weights / 8]),
                match NIBBLES {
                    false => ArraySpec::counted("values", Dtype::I8, most),
                    // Two codes a byte, and a strip starts with a byte of its own.
                    true => ArraySpec::counted("codes", Dtype::U8, most / 2 + layer.rows),
                },
                ArraySpec::fixed("strip_pointers", Dtype::U32, &[strips + 1]),
                ArraySpec::fixed("prime_indices", Dtype::U8, &primes),
                ArraySpec::scales(layer),
            ];
            arrays.extend(NIBBLES.then(Levels::codebook_spec));
            Ok(arrays)
        },
        check_opened: |layer, arrays| {
            stored::check_scales(arrays, layer.rows)?;
            let codes = if NIBBLES { "codes" } else { "values" };
            stored::check_pointers(arrays, "strip", strips::count(layer.rows), codes)
        },
        matrix: |layer, arrays| {
            let arrays = BitmapArrays {
                bitmap: arrays.get("bitmap")?,
                levels: Levels::read(arrays, NIBBLES)?,
                strip_pointers: arrays.get("strip_pointers")?,
                prime_indices: arrays.get("prime_indices")?,
                scales: arrays.get("scales")?,
            };
            BitmapMatrix::new(layer.rows, layer.cols, arrays)
        },
    }
}

/// A matrix `[rows, cols]` whose zeros are exact and take one bit.
///
/// It is stored in [`strips`], whose columns are padded to a whole number of groups. The codes of a
/// strip follow each other in the order of [`strips::position`], word by word of the bitmap. A word
/// with `n` stored weights has `n` bytes of codes (`s8`), or `ceil(n / 2)` (`s4`: low half first,
/// every word starts on a byte).
#[derive(Debug, Clone)]
pub struct BitmapMatrix {
    rows: usize,
    cols: usize,
    arrays: BitmapArrays,
}

/// The arrays of a [`BitmapMatrix`], as a file stores them.
///
/// `S` is `ceil(rows / 64)`, `G` is `ceil(cols / 64)`.
#[derive(Debug, Clone)]
pub struct BitmapArrays {
    /// `[S, 512 * G]`: the bit of each weight at its [`strips::position`], least significant bit
    /// first; 1 means stored.
    pub bitmap: Array<u8>,
    /// Levels or codes of the stored weights.
    pub levels: Levels,
    /// `[S + 1]`: the byte where the codes of each strip start, and where they end.
    pub strip_pointers: Array<u32>,
    /// `[S, G, 64]` indices into the first 256 primes.
    pub prime_indices: Array<u8>,
    /// `[rows]`.
    pub scales: Array<f32>,
}

impl BitmapMatrix {
    /// Makes a matrix of these arrays. Checks all lengths and counts every bit once.
    ///
    /// Errors: `Shape` for a wrong length; `Invalid` for strip pointers that are not ascending or
    /// do not match the bits, for bits past the last row or column, and for scales that are not
    /// finite; `TooLarge` if sizes overflow.
    pub fn new(rows: usize, cols: usize, arrays: BitmapArrays) -> Result<Self> {
        let (strips, groups) = (strips::count(rows), cols.div_ceil(BITMAP_GROUP));
        let bytes = strips::padded_weights(cols, BITMAP_GROUP)? / 8;
        rules::length("bitmap", arrays.bitmap.len(), &[strips, bytes])?;
        let per_strip = [strips, groups, STRIP_ROWS];
        rules::length("prime_indices", arrays.prime_indices.len(), &per_strip)?;
        checked_scales(&arrays.scales, rows)?;
        let stored = arrays.levels.checked_len()?;
        rules::pointers(&arrays.strip_pointers, "strip", strips, stored)?;
        let matrix = Self { rows, cols, arrays };
        (0..strips).try_for_each(|strip| matrix.check_bits(strip))?;
        Ok(matrix)
    }

    fn check_bits(&self, strip: usize) -> Result<()> {
        let invalid = |message| Err(Error::new(ErrorKind::Invalid, message).rule(rules::BITMAP));
        let rows = strips::rows(strip, self.rows).len();
        let mut bytes = 0;
        for (i, bits) in self.words(strip).enumerate() {
            let (tile, row) = (i / WORDS_PER_TILE, i % WORDS_PER_TILE * WORD / TILE_COLS);
            let cols = self.cols.saturating_sub(tile * TILE_COLS).min(TILE_COLS);
            let allowed = rows.saturating_sub(row).min(WORD / TILE_COLS);
            if bits & !first_bits(allowed, cols) != 0 {
                return invalid(format!(
                    "strip {strip} keeps weights past row {} or column {}",
                    self.rows, self.cols
                ));
            }
            bytes += self.code_bytes(bits);
        }
        let pointers = &self.arrays.strip_pointers;
        let given = pointers[strip + 1] - pointers[strip];
        if bytes != given as usize {
            return invalid(format!(
                "the bits of strip {strip} ask for {bytes} bytes of codes, its pointers give {given}"
            ));
        }
        Ok(())
    }

    /// The arrays, as a file stores them.
    pub fn arrays(&self) -> &BitmapArrays {
        &self.arrays
    }

    fn strip_words(&self) -> usize {
        self.cols.div_ceil(BITMAP_GROUP) * BITMAP_GROUP * STRIP_ROWS / WORD
    }

    fn words(&self, strip: usize) -> impl Iterator<Item = u64> {
        let n = self.strip_words();
        let words = &self.arrays.bitmap.as_chunks::<WORD_BYTES>().0[strip * n..(strip + 1) * n];
        words.iter().map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn code_bytes(&self, bits: u64) -> usize {
        let kept = bits.count_ones() as usize;
        match self.arrays.levels {
            Levels::Bytes(_) => kept,
            Levels::Nibbles { .. } => kept.div_ceil(2),
        }
    }

    /// The level of the `i`-th stored weight of the word whose codes start at byte `start`.
    fn level(&self, start: usize, i: usize) -> i8 {
        match &self.arrays.levels {
            Levels::Bytes(values) => values[start + i],
            Levels::Nibbles { codes, codebook } => {
                codebook[usize::from(codes[start + i / 2] >> (i % 2 * 4) & 15)]
            }
        }
    }

    /// Decodes rows of a strip, from row `first` of the strip on.
    fn decode_in_strip(&self, strip: usize, first: usize, out: &mut [f32]) {
        let groups = self.cols.div_ceil(BITMAP_GROUP);
        let (primes, _) = self.arrays.prime_indices.as_chunks::<STRIP_ROWS>();
        let mut start = self.arrays.strip_pointers[strip] as usize;
        for (i, bits) in self.words(strip).enumerate() {
            let tile = i / WORDS_PER_TILE;
            for in_word in 0..WORD / TILE_COLS {
                let in_strip = i % WORDS_PER_TILE * (WORD / TILE_COLS) + in_word;
                let Some(row) = in_strip.checked_sub(first) else {
                    continue;
                };
                let Some(out) = out.get_mut(row * self.cols..(row + 1) * self.cols) else {
                    break;
                };
                let scale = self.arrays.scales[strip * STRIP_ROWS + in_strip];
                for (col, out) in out
                    .iter_mut()
                    .enumerate()
                    .skip(tile * TILE_COLS)
                    .take(TILE_COLS)
                {
                    let bit = in_word * TILE_COLS + col % TILE_COLS;
                    let level = match bits >> bit & 1 {
                        1 => {
                            let kept = (bits & ((1 << bit) - 1)).count_ones() as usize;
                            self.level(start, kept)
                        }
                        _ => 0,
                    };
                    let index = primes[strip * groups + col / BITMAP_GROUP][in_strip];
                    *out = weight(scale, PRIME_LUT[usize::from(index)], level);
                }
            }
            start += self.code_bytes(bits);
        }
    }
}

/// Returns a word with the bits of its first `rows` rows and `cols` columns set.
fn first_bits(rows: usize, cols: usize) -> u64 {
    if (rows, cols) == (WORD / TILE_COLS, TILE_COLS) {
        return u64::MAX;
    }
    let row = (1 << cols) - 1;
    (0..rows).fold(0, |bits, i| bits | row << (i * TILE_COLS))
}

impl StoredMatrix for BitmapMatrix {
    fn size(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    fn array(&self, suffix: &str) -> Option<&[u8]> {
        let arrays = &self.arrays;
        match suffix {
            "bitmap" => Some(&arrays.bitmap),
            "strip_pointers" => Some(cast_slice(&arrays.strip_pointers)),
            "prime_indices" => Some(&arrays.prime_indices),
            "scales" => Some(cast_slice(&arrays.scales)),
            _ => arrays.levels.array(suffix),
        }
    }

    fn scales(&self) -> Option<&Array<f32>> {
        Some(&self.arrays.scales)
    }

    fn scales_mut(&mut self) -> Option<&mut Array<f32>> {
        Some(&mut self.arrays.scales)
    }

    fn strip(&self, index: usize) -> Option<Strip<'_>> {
        let (codes, codebook) = match &self.arrays.levels {
            Levels::Bytes(values) => (cast_slice(values), None),
            Levels::Nibbles { codes, codebook } => (&codes[..], Some(codebook.first_chunk()?)),
        };
        let start = *self.arrays.strip_pointers.get(index)? as usize;
        let (words, _) = self.arrays.bitmap.as_chunks::<WORD_BYTES>();
        let (n, groups) = (self.strip_words(), self.cols.div_ceil(BITMAP_GROUP));
        let (indices, _) = self.arrays.prime_indices.as_chunks();
        Some(Strip {
            codes: Codes::Kept {
                bitmap: words.get(index * n..(index + 1) * n)?,
                codes: codes.get(start..)?,
                codebook,
            },
            cols: self.cols,
            primes: Primes::Groups {
                indices: indices.get(index * groups..(index + 1) * groups)?,
                cols: BITMAP_GROUP,
            },
            scales: self.arrays.scales.get(strips::rows(index, self.rows))?,
        })
    }

    fn decode_rows(&self, mut first: usize, mut out: &mut [f32]) {
        while !out.is_empty() {
            let (strip, row) = (first / STRIP_ROWS, first % STRIP_ROWS);
            let rows = STRIP_ROWS - row;
            let (now, rest) = out.split_at_mut(out.len().min(rows * self.cols));
            self.decode_in_strip(strip, row, now);
            first += rows;
            out = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::{bitmap, signed};

    fn arrays(rows: usize, cols: usize, is_s8: bool) -> BitmapArrays {
        let scales: Vec<f32> = (0..rows).map(|row| 0.5 + row as f32).collect();
        BitmapArrays {
            scales: scales.into(),
            ..bitmap(rows, cols, !is_s8).arrays
        }
    }

    /// The codes of all weights in the order in which they are stored.
    #[test]
    fn every_weight_follows_the_layout_and_any_range_is_a_part_of_the_whole() {
        for (rows, cols) in [(1, 1), (3, 70), (63, 5), (64, 64), (130, 67)] {
            for is_s8 in [true, false] {
                let m = BitmapMatrix::new(rows, cols, arrays(rows, cols, is_s8)).unwrap();
                let mut all = vec![f32::NAN; rows * cols];
                m.decode_rows(0, &mut all);
                let groups = cols.div_ceil(64);
                let mut expected = vec![0.0; rows * cols];
                let mut half_bytes = 0;
                for n in 0..rows.div_ceil(64) * groups * 64 * 64 {
                    if n % 64 == 0 {
                        half_bytes += half_bytes % 2;
                    }
                    if m.arrays.bitmap[n / 8] >> (n % 8) & 1 == 0 {
                        continue;
                    }
                    let (strip, n) = (n / (groups * 4096), n % (groups * 4096));
                    let (row, col) = (strip * 64 + n % 256 / 4, n / 256 * 4 + n % 4);
                    let level = match &m.arrays.levels {
                        Levels::Bytes(values) => {
                            half_bytes += 2;
                            values[half_bytes / 2 - 1]
                        }
                        Levels::Nibbles { codes, codebook } => {
                            let code = codes[half_bytes / 2] >> (half_bytes % 2 * 4) & 15;
                            half_bytes += 1;
                            codebook[usize::from(code)]
                        }
                    };
                    let index = m.arrays.prime_indices[(strip * groups + col / 64) * 64 + row % 64];
                    let product = PRIME_LUT[usize::from(index)] as i32 * i32::from(level);
                    expected[row * cols + col] = (0.5 + row as f32) * product as f32;
                }
                assert_eq!(all, expected, "[{rows}, {cols}]");
                for (first, end) in [(0, 1), (rows / 2, rows), (rows - 1, rows)] {
                    let mut some = vec![f32::NAN; (end - first) * cols];
                    m.decode_rows(first, &mut some);
                    assert_eq!(some, all[first * cols..end * cols]);
                }
            }
        }
    }

    /// A bit that was set is cleared for each, so that there are as many as before.
    #[test]
    fn every_bit_of_a_weight_that_the_matrix_does_not_have_is_refused() {
        let (rows, cols) = (65, 66);
        let good = arrays(rows, cols, true);
        for (row, col) in (0..128 * 128).map(|i| (i / 128, i % 128)) {
            if row < rows && col < cols {
                continue;
            }
            let mut bitmap = good.bitmap.to_vec();
            let strip = &mut bitmap[row / 64 * 1024..][..1024];
            let set = strip.iter().position(|&byte| byte != 0).unwrap();
            strip[set] &= strip[set] - 1;
            let n = (col / 4) * 256 + (row % 64) * 4 + col % 4;
            strip[n / 8] |= 1 << (n % 8);
            let arrays = BitmapArrays {
                bitmap: bitmap.into(),
                ..good.clone()
            };
            let e = BitmapMatrix::new(rows, cols, arrays).unwrap_err();
            assert_eq!(e.broken_rule(), Some(rules::BITMAP));
            let message = e.to_string();
            assert!(message.contains("past row 65 or column 66"), "{message}");
        }
    }

    #[test]
    fn words_by_hand() {
        // One, two and three codes in words of the first tile, from rows 0, 16 and 32 on; one in
        // the second tile.
        let mut bitmap = vec![0u8; 512];
        (bitmap[0], bitmap[8], bitmap[16], bitmap[32]) = (0b1, 0b1001, 0b111, 0b1000);
        let arrays = BitmapArrays {
            bitmap: bitmap.into(),
            levels: Levels::Nibbles {
                codes: vec![0x01, 0x32, 0x54, 0x06, 0x07].into(),
                codebook: signed((0..16).collect()),
            },
            strip_pointers: vec![0, 5].into(),
            prime_indices: vec![0; 64].into(),
            scales: vec![-0.5; 33].into(),
        };
        let m = BitmapMatrix::new(33, 8, arrays).unwrap();
        let mut all = vec![f32::NAN; 33 * 8];
        m.decode_rows(0, &mut all);
        let kept = [(0, 0), (16, 0), (16, 3), (32, 0), (32, 1), (32, 2), (0, 7)];
        for (level, (row, col)) in (1..).zip(kept) {
            let w = std::mem::replace(&mut all[row * 8 + col], -0.0);
            assert_eq!(w, -(level as f32), "{row}, {col}");
        }
        // Not kept is level 0, here with the sign of the scale.
        assert!(all.iter().all(|w| w.to_bits() == (-0.0f32).to_bits()));
    }

    #[test]
    fn bits_and_pointers_that_do_not_fit_are_refused() {
        let (rows, cols) = (65, 66);
        let refused = |damage: fn(&mut Vec<u8>, &mut Vec<u32>)| {
            let mut arrays = arrays(rows, cols, true);
            let (mut bitmap, mut pointers) =
                (arrays.bitmap.to_vec(), arrays.strip_pointers.to_vec());
            damage(&mut bitmap, &mut pointers);
            arrays.bitmap = bitmap.into();
            arrays.strip_pointers = pointers.into();
            BitmapMatrix::new(rows, cols, arrays)
                .map_err(|e| e.kind())
                .err()
        };
        assert_eq!(refused(|_, _| {}), None);
        // Row 65, and column 66 of row 0, which do not exist; then a weight less.
        assert_eq!(
            refused(|bits, _| bits[1024] |= 1 << 4),
            Some(ErrorKind::Invalid)
        );
        assert_eq!(
            refused(|bits, _| bits[16 * 32] |= 1 << 2),
            Some(ErrorKind::Invalid)
        );
        assert_eq!(refused(|bits, _| bits[0] ^= 1), Some(ErrorKind::Invalid));
        assert_eq!(
            refused(|_, pointers| pointers[1] += 1),
            Some(ErrorKind::Invalid)
        );
        assert_eq!(
            refused(|_, pointers| pointers[0] = 1),
            Some(ErrorKind::Invalid)
        );
        assert_eq!(
            refused(|_, pointers| pointers.truncate(2)),
            Some(ErrorKind::Shape)
        );
        assert_eq!(
            refused(|bits, _| bits.truncate(1024)),
            Some(ErrorKind::Shape)
        );
    }
}

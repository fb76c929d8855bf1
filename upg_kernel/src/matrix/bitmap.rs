//! `s8` and `s4`: one bit a weight says kept or zero; levels are stored for the kept ones only.
#![forbid(unsafe_code)]

use super::{Levels, StoredMatrix, checked_scales, weight};
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::kernels::activations::Order;
use crate::kernels::views::{BitmapRows, Rows};
use crate::prime_lut::PRIME_LUT;

/// How many columns share a prime index and a run of codes.
pub const BITMAP_GROUP: usize = 64;

const BITMAP_BYTES: usize = BITMAP_GROUP / 8;

/// A matrix `[rows, cols]` whose zeros are kept exactly.
///
/// The codes of a row follow each other, group by group in column order. A group of `n` kept weights
/// takes `n` bytes (`s8`), or `ceil(n / 2)` (`s4`: low half first, every group starts on a byte).
#[derive(Debug, Clone)]
pub struct BitmapMatrix {
    rows: usize,
    cols: usize,
    arrays: BitmapArrays,
}

/// The arrays of a [`BitmapMatrix`], as they stand in a file.
#[derive(Debug, Clone)]
pub struct BitmapArrays {
    /// `[rows, ceil(cols / 64), 8]`, least significant bit first; 1 means kept.
    pub bitmap: Array<u8>,
    /// Levels or codes of the kept weights.
    pub levels: Levels,
    /// `[rows + 1]`, in bytes of the codes.
    pub row_pointers: Array<u32>,
    /// `[rows, ceil(cols / 64)]` indices into the first 256 primes.
    pub prime_indices: Array<u8>,
    /// `[rows]`.
    pub scales: Array<f32>,
}

impl BitmapMatrix {
    /// Checks all lengths and counts every bit once, so that nothing has to be checked later.
    ///
    /// Errors: `Shape` for a wrong length; `Invalid` for row pointers that are not ascending or do
    /// not match the bits, for bits past the last column, and for scales that are not finite.
    pub fn new(rows: usize, cols: usize, arrays: BitmapArrays) -> Result<Self> {
        let groups = cols.div_ceil(BITMAP_GROUP);
        rules::length("bitmap", arrays.bitmap.len(), &[rows, groups, BITMAP_BYTES])?;
        rules::length("prime_indices", arrays.prime_indices.len(), &[rows, groups])?;
        checked_scales(&arrays.scales, rows)?;
        let stored = match &arrays.levels {
            Levels::Bytes(values) => values.len(),
            Levels::Nibbles { codes, codebook } => {
                rules::codebook(codebook)?;
                codes.len()
            }
        };
        rules::row_pointers(&arrays.row_pointers, rows, stored)?;
        let matrix = Self { rows, cols, arrays };
        (0..rows).try_for_each(|row| matrix.check_bits(row))?;
        Ok(matrix)
    }

    fn check_bits(&self, row: usize) -> Result<()> {
        let invalid = |message| Err(Error::new(ErrorKind::Invalid, message).rule(rules::BITMAP));
        let mut bytes = 0;
        for (g, bits) in self.words(row).enumerate() {
            let columns = (self.cols - g * BITMAP_GROUP).min(BITMAP_GROUP);
            if columns < BITMAP_GROUP && bits >> columns != 0 {
                return invalid(format!("row {row} keeps weights past column {}", self.cols));
            }
            bytes += self.code_bytes(bits);
        }
        let (start, end) = (
            self.arrays.row_pointers[row],
            self.arrays.row_pointers[row + 1],
        );
        if bytes != (end - start) as usize {
            return invalid(format!(
                "the bits of row {row} ask for {bytes} bytes of codes, its row pointers give {}",
                end - start
            ));
        }
        Ok(())
    }

    /// The arrays, as a file stores them.
    pub fn arrays(&self) -> &BitmapArrays {
        &self.arrays
    }

    fn words(&self, row: usize) -> impl Iterator<Item = u64> {
        let row_bytes = self.cols.div_ceil(BITMAP_GROUP) * BITMAP_BYTES;
        self.arrays.bitmap[row * row_bytes..(row + 1) * row_bytes]
            .as_chunks::<BITMAP_BYTES>()
            .0
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn code_bytes(&self, bits: u64) -> usize {
        let kept = bits.count_ones() as usize;
        match self.arrays.levels {
            Levels::Bytes(_) => kept,
            Levels::Nibbles { .. } => kept.div_ceil(2),
        }
    }

    /// The level of the `i`-th kept weight of the group whose codes start at byte `start`.
    fn level(&self, start: usize, i: usize) -> i8 {
        match &self.arrays.levels {
            Levels::Bytes(values) => values[start + i],
            Levels::Nibbles { codes, codebook } => {
                codebook[usize::from(codes[start + i / 2] >> (i % 2 * 4) & 15)]
            }
        }
    }
}

impl StoredMatrix for BitmapMatrix {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn order(&self) -> Option<Order> {
        Some(Order::Natural)
    }

    fn rows_view(&self, first: usize, n: usize) -> Option<Rows<'_>> {
        let (codes, levels) = self.arrays.levels.view()?;
        let groups = self.cols.div_ceil(BITMAP_GROUP);
        let of_groups = first * groups..(first + n) * groups;
        let words = self.arrays.bitmap.as_chunks::<BITMAP_BYTES>().0;
        Some(Rows::Bitmap(BitmapRows {
            levels,
            bitmap: words.get(of_groups.clone())?,
            codes,
            row_pointers: self.arrays.row_pointers.get(first..first + n + 1)?,
            prime_indices: self.arrays.prime_indices.get(of_groups)?,
            groups,
            scales: self.arrays.scales.get(first..first + n)?,
        }))
    }

    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        let groups = self.cols.div_ceil(BITMAP_GROUP);
        for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
            let row = first + i;
            let scale = self.arrays.scales[row];
            let mut start = self.arrays.row_pointers[row] as usize;
            for (g, (bits, out)) in self
                .words(row)
                .zip(out.chunks_mut(BITMAP_GROUP))
                .enumerate()
            {
                let prime = PRIME_LUT[usize::from(self.arrays.prime_indices[row * groups + g])];
                let mut kept = 0;
                for (column, out) in out.iter_mut().enumerate() {
                    *out = 0.0;
                    if bits >> column & 1 == 1 {
                        *out = weight(scale, prime, self.level(start, kept));
                        kept += 1;
                    }
                }
                start += self.code_bytes(bits);
            }
        }
    }
}

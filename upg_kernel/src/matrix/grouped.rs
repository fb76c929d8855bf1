//! `q8` and `q4`: a level for every weight, a prime index for every group of columns.
#![forbid(unsafe_code)]

use super::{Levels, StoredMatrix, checked_scales, weight};
use crate::array::Array;
use crate::error::Result;
use crate::format::rules;
use crate::kernels::activations::Order;
use crate::kernels::views::{GroupedRows, Rows};
use crate::prime_lut::PRIME_LUT;

/// A matrix `[rows, cols]` of int8 levels (`q8`) or 4-bit codes into a codebook (`q4`).
///
/// Rows are padded to a whole number of groups. A `q4` group of `g` columns takes `g / 2` bytes: byte
/// `j` holds the code of column `j` in its low half and of column `j + g / 2` in its high half.
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
    /// `prime_indices` is `[rows, ceil(cols / group)]`, `scales` `[rows]`; `levels` as the type says.
    /// Errors: `Shape` for a wrong length, `Invalid` for a group other than 32 or 64 or a scale that
    /// is not finite.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        levels: Levels,
        prime_indices: Array<u8>,
        scales: Array<f32>,
    ) -> Result<Self> {
        rules::group(group)?;
        let groups = cols.div_ceil(group);
        let (found, per_group) = match &levels {
            Levels::Bytes(values) => (values.len(), group),
            Levels::Nibbles { codes, codebook } => {
                rules::codebook(codebook)?;
                (codes.len(), group / 2)
            }
        };
        rules::length("codes", found, &[rows, groups, per_group])?;
        rules::length("prime_indices", prime_indices.len(), &[rows, groups])?;
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

    /// `[rows, ceil(cols / group)]` indices into the first 256 primes.
    pub fn prime_indices(&self) -> &Array<u8> {
        &self.prime_indices
    }

    /// One scale a row.
    pub fn scales(&self) -> &Array<f32> {
        &self.scales
    }

    /// Decodes up to a group of weights that share `scale` and `prime`.
    fn decode_group(&self, group_index: usize, scale: f32, prime: u32, out: &mut [f32]) {
        match &self.levels {
            Levels::Bytes(values) => {
                let values = &values[group_index * self.group..][..out.len()];
                for (out, &value) in out.iter_mut().zip(values) {
                    *out = weight(scale, prime, value);
                }
            }
            Levels::Nibbles { codes, codebook } => {
                let mut weights = [0.0; 16];
                for (weight_of, &level) in weights.iter_mut().zip(codebook.iter()) {
                    *weight_of = weight(scale, prime, level);
                }
                let half = self.group / 2;
                let codes = &codes[group_index * half..][..half];
                let (low, high) = out.split_at_mut(half.min(out.len()));
                for (out, &code) in low.iter_mut().zip(codes) {
                    *out = weights[usize::from(code & 15)];
                }
                for (out, &code) in high.iter_mut().zip(codes) {
                    *out = weights[usize::from(code >> 4)];
                }
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

    fn order(&self) -> Option<Order> {
        Some(match self.levels {
            Levels::Bytes(_) => Order::Natural,
            Levels::Nibbles { .. } => Order::Nibbles(self.group),
        })
    }

    fn rows_view(&self, first: usize, n: usize) -> Option<Rows<'_>> {
        let (codes, levels) = self.levels.view()?;
        let groups = self.cols.div_ceil(self.group);
        let row_bytes = codes.len() / self.rows;
        Some(Rows::Grouped(GroupedRows {
            levels,
            codes: codes.get(first * row_bytes..(first + n) * row_bytes)?,
            row_bytes,
            prime_indices: self
                .prime_indices
                .get(first * groups..(first + n) * groups)?,
            groups,
            group: self.group,
            scales: self.scales.get(first..first + n)?,
        }))
    }

    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        let groups = self.cols.div_ceil(self.group);
        for (i, out) in out.chunks_exact_mut(self.cols).enumerate() {
            let row = first + i;
            for (g, out) in out.chunks_mut(self.group).enumerate() {
                let group_index = row * groups + g;
                let prime = PRIME_LUT[usize::from(self.prime_indices[group_index])];
                self.decode_group(group_index, self.scales[row], prime, out);
            }
        }
    }
}

//! What a kernel sees of a matrix: slices whose lengths the matrix has checked.
#![forbid(unsafe_code)]

use crate::prime_lut::PRIME_LUT;

/// A strip of a packed matrix: 64 rows, or those that are left, in tiles of 4 columns
/// ([`crate::matrix::strips`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strip<'a> {
    pub codes: Codes<'a>,
    pub cols: usize,
    pub primes: Primes<'a>,
    /// One for each row that the strip really has.
    pub scales: &'a [f32],
}

impl Strip<'_> {
    /// The rows of a product, given their sums without what all of a row is multiplied with.
    pub(super) fn put_rows(&self, sums: &[f32; 64], out: &mut [f32]) {
        let sums = sums.iter().zip(self.scales);
        match self.primes {
            Primes::Rows(indices) => {
                for ((out, (sum, scale)), index) in out.iter_mut().zip(sums).zip(indices) {
                    *out = scale * (PRIME_LUT[usize::from(*index)] as f32 * sum);
                }
            }
            Primes::Groups { .. } => {
                for (out, (sum, scale)) in out.iter_mut().zip(sums) {
                    *out = scale * sum;
                }
            }
        }
    }
}

/// What stands for the levels of a strip.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Codes<'a> {
    /// A level for each weight, whole groups of columns.
    Bytes(&'a [u8]),
    /// Two codes a byte into this codebook, whole groups of columns.
    Nibbles(&'a [u8], &'a [i8; 16]),
    /// Codes of those weights only whose bit is set.
    Kept {
        /// Sixteen rows of a tile each, whole groups of 64 columns.
        bitmap: &'a [[u8; 8]],
        /// From the first of this strip to the end of the matrix.
        codes: &'a [u8],
        /// `None`: the levels themselves.
        codebook: Option<&'a [i8; 16]>,
    },
    /// A stream of `k` bits a weight.
    Trellis {
        k: u8,
        stream: &'a [u8],
        shift_table: &'a [u8; 64],
        /// 128 or 256 entries.
        level_table: &'a [i8],
    },
}

/// The prime indices of a strip.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Primes<'a> {
    /// One for each row that the strip really has.
    Rows(&'a [u8]),
    /// One for each row of each group of so many columns, 32 or 64.
    Groups {
        indices: &'a [[u8; 64]],
        cols: usize,
    },
}

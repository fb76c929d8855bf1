//! Views of a matrix for the kernels: slices whose lengths the matrix has checked.
#![forbid(unsafe_code)]

use super::activations::GROUP;
#[cfg(target_arch = "x86_64")]
use super::activations::{Activations, Block};
use crate::prime_lut::PRIME_LUT;
#[cfg(target_arch = "x86_64")]
use std::ops::Range;

/// Pairs of tiles in a block of activations.
pub(super) const PAIRS: usize = GROUP / 8;

/// Strip of a packed matrix: up to 64 rows in tiles of 4 columns ([`crate::matrix::strips`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strip<'a> {
    pub codes: Codes<'a>,
    pub cols: usize,
    pub primes: Primes<'a>,
    /// Scale of each row that the strip really has.
    pub scales: &'a [f32],
}

/// Row of a validated [`crate::sparse::MdCSRMatrix`].
///
/// It has as many deltas and prime indices as values, every index is in the table, and columns are
/// increasing and inside the matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entries<'a> {
    pub scale: f32,
    pub values: &'a [i8],
    pub deltas: &'a [u8],
    pub primes: &'a [u16],
}

/// Columns with a common prime index and scale, whose products are summed as integers.
#[cfg(target_arch = "x86_64")]
pub(super) struct Group<'a> {
    /// Activations of the columns, and the pairs of tiles of this block that they are.
    pub block: &'a Block,
    pub pairs: Range<usize>,
    /// Correction for levels that are read as `level + 128`, to be added.
    pub offset: i32,
    /// Scale of the activations.
    pub scale: f32,
    /// Prime indices of the rows; `None` if a row has one for all columns.
    pub primes: Option<&'a [u8; 64]>,
}

impl<'a> Strip<'a> {
    /// Returns the groups of a product with `x`, in column order.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn groups(&self, x: &'a Activations) -> impl Iterator<Item = Group<'a>> {
        let (indices, per_block) = match self.primes {
            Primes::Rows(_) => (None, 1),
            Primes::Groups { indices, cols } => (Some(indices), GROUP / cols),
        };
        let all = self.cols.div_ceil(8);
        let width = PAIRS / per_block;
        (0..all.div_ceil(width)).map(move |group| {
            let (block, first) = (group / per_block, group % per_block * width);
            let offsets = x.offsets[block];
            Group {
                block: &x.blocks[block],
                pairs: first..(first + width).min(all - block * PAIRS),
                offset: match per_block {
                    1 => offsets[0] + offsets[1],
                    _ => offsets[group % per_block],
                },
                scale: x.scales[block],
                primes: indices.map(|indices| &indices[group]),
            }
        })
    }

    /// Returns the factors common to a whole row, for many products.
    pub(super) fn row_factors(&self) -> RowFactors {
        let mut factors = RowFactors {
            primes: [1.0; 64],
            scales: [0.0; 64],
        };
        if let Primes::Rows(indices) = self.primes {
            for (prime, index) in factors.primes.iter_mut().zip(indices) {
                *prime = PRIME_LUT[usize::from(*index)] as f32;
            }
        }
        factors.scales[..self.scales.len()].copy_from_slice(self.scales);
        factors
    }

    /// Computes the rows of one product from their sums,
    /// which lack the factor common to a whole row.
    pub(super) fn put_rows(&self, sums: &[f32; 64], out: &mut [f32]) {
        let sums = sums.iter().zip(self.scales);
        match self.primes {
            Primes::Rows(indices) => {
                for ((out, (sum, scale)), index) in out.iter_mut().zip(sums).zip(indices) {
                    *out = row(*scale, PRIME_LUT[usize::from(*index)] as f32, *sum);
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

/// Computes a row of a product from its sum, always rounded in this order.
#[inline(always)]
fn row(scale: f32, prime: f32, sum: f32) -> f32 {
    scale * (prime * sum)
}

/// Factors common to a whole row; arbitrary where the strip has no such row.
pub(super) struct RowFactors {
    /// Primes; 1 if they belong to groups of columns.
    primes: [f32; 64],
    scales: [f32; 64],
}

impl RowFactors {
    /// Runs [`Strip::put_rows`].
    pub(super) fn apply(&self, rows: &mut [f32; 64]) {
        for ((out, prime), scale) in rows.iter_mut().zip(&self.primes).zip(&self.scales) {
            *out = row(*scale, *prime, *out);
        }
    }
}

/// Packed codes of the levels of a strip.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Codes<'a> {
    /// One byte per weight, the level; whole groups of columns.
    Bytes(&'a [u8]),
    /// Two codes per byte, indices into this codebook; whole groups of columns.
    Nibbles(&'a [u8], &'a [i8; 16]),
    /// Codes of only those weights whose bit is set.
    Kept {
        /// Bitmap words of sixteen rows of a tile; whole groups of 64 columns.
        bitmap: &'a [[u8; 8]],
        /// Codes from the first of this strip to the end of the matrix.
        codes: &'a [u8],
        /// Codebook; `None` if the codes are the levels.
        codebook: Option<&'a [i8; 16]>,
    },
    /// Stream of `k` = 2, 3 or 4 bits per weight.
    Trellis { k: u8, stream: &'a [u8] },
}

/// Prime indices of a strip.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Primes<'a> {
    /// Prime index of each row that the strip really has.
    Rows(&'a [u8]),
    /// Prime index of each row per group of 32 or 64 columns.
    Groups {
        indices: &'a [[u8; 64]],
        cols: usize,
    },
}

/// Evaluates the second expression with the levels of a strip.
///
/// It uses the types of the module `levels`, which have the same names
/// for each instruction set of x86-64.
#[cfg(target_arch = "x86_64")]
macro_rules! with_levels {
    ($strip:expr, $levels:ident => $call:expr) => {{
        macro_rules! with {
            ($new:expr) => {{
                let $levels = $new;
                $call
            }};
        }
        match $strip.codes {
            $crate::kernels::views::Codes::Bytes(codes) => with!(levels::Bytes::new(codes)),
            $crate::kernels::views::Codes::Nibbles(codes, codebook) => {
                with!(levels::Nibbles::new(codes, codebook))
            }
            $crate::kernels::views::Codes::Kept {
                bitmap,
                codes,
                codebook,
            } => {
                let end = &mut [0; levels::END];
                match codebook {
                    None => with!(levels::Kept::<false>::new(bitmap, codes, &[0; 16], end)),
                    Some(codebook) => {
                        with!(levels::Kept::<true>::new(bitmap, codes, codebook, end))
                    }
                }
            }
            $crate::kernels::views::Codes::Trellis { k, stream } => {
                let end = &mut [0; levels::TRELLIS_END];
                match k {
                    2 => with!(levels::Trellis::<2>::new(stream, end)),
                    3 => with!(levels::Trellis::<3>::new(stream, end)),
                    _ => with!(levels::Trellis::<4>::new(stream, end)),
                }
            }
        }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(super) use with_levels;

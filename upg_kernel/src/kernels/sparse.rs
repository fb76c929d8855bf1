//! Rows of `mdcsr`, in blocks of 64 entries.
//!
//! These are plain loops, compiled for each instruction set that has no kernel of its own.
#![forbid(unsafe_code)]

use super::lanes::Lanes;
use super::views::Entries;
use crate::prime_lut::PRIME_LUT;

/// Entries that are processed together.
pub(super) const BLOCK: usize = 64;

/// Consecutive entries of a row.
pub(super) struct Block<'a> {
    pub values: &'a [i8; BLOCK],
    pub deltas: &'a [u8; BLOCK],
    pub primes: &'a [u16; BLOCK],
    /// Number of entries. The rest is padded with value 0, delta 1 and prime index 0.
    pub len: usize,
    pub place: Place,
}

/// Columns of the entries of a block.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// Consecutive columns from this one on.
    From(usize),
    /// Columns given by the deltas to the previous entry.
    Apart,
}

/// Entries of a row, block by block.
pub(super) struct Blocks<'a> {
    entries: Entries<'a>,
    /// Flag: every column has an entry.
    pub is_full: bool,
    /// Number of entries before the next block.
    before: usize,
    /// Padded copy of a partial last block.
    ends: ([i8; BLOCK], [u8; BLOCK], [u16; BLOCK]),
}

impl<'a> Blocks<'a> {
    #[inline(always)]
    pub fn new(entries: Entries<'a>, cols: usize) -> Self {
        Self {
            entries,
            // Columns are increasing: as many entries as columns leave none out.
            is_full: entries.values.len() == cols,
            before: 0,
            ends: ([0; BLOCK], [1; BLOCK], [0; BLOCK]),
        }
    }

    /// Returns the next block.
    ///
    /// `column` is the column of the previous entry. If the entries of the block are not
    /// consecutive, the caller advances it.
    // Neither an iterator nor a function with a closure argument: all of it must be compiled for
    // the instructions of the caller.
    #[inline(always)]
    pub fn next(&mut self, column: &mut usize) -> Option<Block<'_>> {
        let before = self.before;
        let len = BLOCK.min(self.entries.values.len() - before);
        if len == 0 {
            return None;
        }
        self.before += len;
        let values = window(&self.entries.values[before..], &mut self.ends.0);
        let deltas = window(&self.entries.deltas[before..], &mut self.ends.1);
        let primes = window(&self.entries.primes[before..], &mut self.ends.2);
        let first = match self.is_full {
            true => Some(before),
            false => is_run(deltas).then(|| *column + usize::from(deltas[0])),
        };
        let place = first.map_or(Place::Apart, |first| {
            *column = first + len - 1;
            Place::From(first)
        });
        Some(Block {
            values,
            deltas,
            primes,
            len,
            place,
        })
    }
}

/// Returns whether all entries except the first directly follow the previous one.
#[inline(always)]
fn is_run(deltas: &[u8; BLOCK]) -> bool {
    let odd = |delta: u8| u32::from(delta ^ 1);
    deltas.iter().fold(0, |sum, delta| sum + odd(*delta)) == odd(deltas[0])
}

/// Decodes a row; `round` rounds every weight.
///
/// The result is bit-identical to [`crate::matrix::StoredMatrix::decode_rows`], rounded to nearest,
/// ties to even.
#[inline(always)]
pub(super) fn decode<T: Copy + Default>(
    round: impl Fn(&[f32], &mut [T]),
    entries: Entries<'_>,
    out: &mut [T],
) {
    let mut blocks = Blocks::new(entries, out.len());
    if !blocks.is_full {
        out.fill(T::default());
    }
    let (mut primes, mut weights) = ([0; BLOCK], [0.0; BLOCK]);
    let (mut rounded, mut column) = ([T::default(); BLOCK], 0);
    while let Some(block) = blocks.next(&mut column) {
        put_weights(&block, entries.scale, &mut primes, &mut weights);
        match block.place {
            Place::From(first) => {
                let out = &mut out[first..first + block.len];
                round(&weights[..block.len], out);
            }
            Place::Apart => {
                round(&weights, &mut rounded);
                column = put_apart(&block, &rounded, column, out);
            }
        }
    }
}

/// Stores the weights of a block with gaps; returns the last column.
///
/// `column` is the column of the previous entry. Each store checks its column: another process may
/// change the deltas of a mapped file while they are read.
#[inline(always)]
pub(super) fn put_apart<T: Copy>(
    block: &Block<'_>,
    weights: &[T; BLOCK],
    column: usize,
    out: &mut [T],
) -> usize {
    // A constant trip count where possible, so that the loop is unrolled.
    match block.len {
        BLOCK => put_entries(block.deltas, weights, column, out),
        len => put_entries(&block.deltas[..len], &weights[..len], column, out),
    }
}

#[inline(always)]
fn put_entries<T: Copy>(deltas: &[u8], weights: &[T], mut column: usize, out: &mut [T]) -> usize {
    for (delta, weight) in deltas.iter().zip(weights) {
        column += usize::from(*delta);
        out[column] = *weight;
    }
    column
}

/// Computes the product with `x [cols]` in f32.
///
/// There are 64 partial sums; each adds every 64th entry in order.
#[inline(always)]
pub(super) fn dot<L: Lanes>(proof: L::Proof, entries: Entries<'_>, x: &[f32]) -> f32 {
    let mut blocks = Blocks::new(entries, x.len());
    let (mut primes, mut weights) = ([0; BLOCK], [0.0; BLOCK]);
    let (mut picked, mut column) = ([0.0; BLOCK], 0);
    let mut sums = [L::splat(proof, 0.0); BLOCK / 16];
    while let Some(block) = blocks.next(&mut column) {
        put_weights(&block, entries.scale, &mut primes, &mut weights);
        let run = match block.place {
            Place::From(first) => Some(&x[first..first + block.len]),
            Place::Apart => None,
        };
        let x = match run.and_then(<[f32]>::first_chunk) {
            Some(run) => run,
            None => {
                match run {
                    Some(run) => picked[..block.len].copy_from_slice(run),
                    None => {
                        column = match block.len {
                            BLOCK => pick_apart(block.deltas, x, column, &mut picked),
                            len => pick_apart(&block.deltas[..len], x, column, &mut picked),
                        }
                    }
                }
                // A weight of 0 would not cancel a leftover non-finite value of the previous block.
                picked[block.len..].fill(0.0);
                &picked
            }
        };
        let pairs = weights.as_chunks().0.iter().zip(x.as_chunks().0);
        for (sum, (weights, x)) in sums.iter_mut().zip(pairs) {
            *sum = L::load(proof, weights).mul_add(L::load(proof, x), *sum);
        }
    }
    let mut lanes = [[0.0; 16]; BLOCK / 16];
    for (lanes, sum) in lanes.iter_mut().zip(sums) {
        sum.store(lanes);
    }
    lanes.as_flattened().iter().sum()
}

/// Inverse of [`put_entries`]: gathers the elements of `x` in the columns of the entries.
#[inline(always)]
fn pick_apart(deltas: &[u8], x: &[f32], mut column: usize, picked: &mut [f32]) -> usize {
    for (delta, picked) in deltas.iter().zip(picked) {
        column += usize::from(*delta);
        *picked = x[column];
    }
    column
}

/// Computes the weights of a block.
#[inline(always)]
fn put_weights(
    block: &Block<'_>,
    scale: f32,
    primes: &mut [i32; BLOCK],
    weights: &mut [f32; BLOCK],
) {
    for (prime, index) in primes.iter_mut().zip(block.primes) {
        *prime = PRIME_LUT[usize::from(*index)] as i32;
    }
    let pairs = primes.iter().zip(block.values);
    for (weight, (prime, value)) in weights.iter_mut().zip(pairs) {
        *weight = scale * (prime * i32::from(*value)) as f32;
    }
}

/// Returns the first [`BLOCK`] elements. If there are fewer,
/// copies them to the start of `end`.
#[inline(always)]
fn window<'a, T: Copy>(slice: &'a [T], end: &'a mut [T; BLOCK]) -> &'a [T; BLOCK] {
    match slice.first_chunk() {
        Some(block) => block,
        None => {
            end[..slice.len()].copy_from_slice(slice);
            end
        }
    }
}

#[cfg(test)]
mod tests;

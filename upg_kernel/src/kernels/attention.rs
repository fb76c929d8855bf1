//! Attention of several queries to the keys and values of one head.
//!
//! Written once over vectors of sixteen numbers ([`Lanes`]), which every instruction set represents
//! in its own way. Values that are not f32 are first widened block by block.
#![forbid(unsafe_code)]

use super::lanes::Lanes;
use super::scalar::exp;
use half::f16;
use std::ops::Range;

mod slab;

pub(crate) use slab::Slab;

pub(crate) use crate::inference::cache::{BLOCK, SCALED};

/// Blocks that are allocated together, so that those of one head are contiguous.
pub(crate) const SLAB: usize = 16;

/// Keys and values in blocks of 16 positions, with [`SLAB`] blocks per allocation.
///
/// A slab has for each head the keys of its blocks, `[SLAB, dim, 16]`, so that 16 scores are
/// computed side by side, and then the values, `[SLAB, 16, dim]`. Slabs that are not
/// allocated are empty.
#[derive(Debug)]
pub(crate) enum Blocks {
    F32(Vec<Slab<f32>>),
    F16(Vec<Slab<f16>>),
    /// Integers with a scale per 32 elements: `[SLAB, dim / 32, 16]` for keys,
    /// `[SLAB, 16, dim / 32]` for values.
    Int8(Vec<Slab<i8>>, Vec<Slab<f32>>),
}

/// Returns the range of the keys or values of a block in its slab, for a head with `size`
/// elements per block.
pub(crate) fn place_in_slab(head: usize, is_key: bool, block: usize, size: usize) -> Range<usize> {
    let start = ((2 * head + usize::from(!is_key)) * SLAB + block % SLAB) * size;
    start..start + size
}

/// Keys and values of one head of a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Head<'a> {
    pub blocks: &'a Blocks,
    /// Block numbers of the sequence.
    pub table: &'a [u32],
    /// Index of the head in each block.
    pub index: usize,
    /// Elements of a key or value.
    pub dim: usize,
}

/// Queries of the heads that share one key/value head.
pub(crate) struct Task<'a> {
    pub head: Head<'a>,
    /// Queries `[n, head_dim]`, scaled.
    pub queries: &'a [f32],
    /// Positions that each query attends to. Non-finite values may affect neighbouring queries.
    pub seen: &'a [Range<usize>],
    pub scratch: &'a mut Scratch,
    /// Softmax total of each query; overwritten.
    pub totals: &'a mut [Total],
    /// Output `[n, head_dim]`; every element is overwritten.
    pub out: &'a mut [f32],
}

/// Sum of the softmax weights of some values. A weight is `exp(score - largest)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Total {
    pub largest: f32,
    pub sum: f32,
}

impl Total {
    /// Total of no values.
    pub(crate) const NONE: Self = Self {
        largest: f32::NEG_INFINITY,
        sum: 0.0,
    };

    /// Adds `found`, a sum over other positions with its own total, to `out`,
    /// whose total this is.
    ///
    /// Source: Flash-Decoding, <https://crfm.stanford.edu/2023/10/12/flashdecoding.html>. The order
    /// of the calls changes the result by rounding.
    pub(crate) fn join(&mut self, out: &mut [f32], other: Self, found: &[f32]) {
        if other.sum == 0.0 {
            return;
        }
        if self.sum == 0.0 {
            *self = other;
            out.copy_from_slice(found);
            return;
        }
        let largest = match other.largest > self.largest {
            true => other.largest,
            false => self.largest,
        };
        let [own, others] = [self.largest, other.largest].map(|l| exp(l - largest));
        for (out, found) in out.iter_mut().zip(found) {
            *out = *out * own + found * others;
        }
        let sum = self.sum * own + other.sum * others;
        *self = Self { largest, sum };
    }

    /// Divides the sum `out` by the total, which gives the average.
    pub(crate) fn divide(self, out: &mut [f32]) {
        let inverse = 1.0 / self.sum;
        out.iter_mut().for_each(|out| *out *= inverse);
    }
}

/// Maximum queries that share widened blocks: with pieces of 512 positions their scores take
/// 32 KiB.
const QUERIES: usize = 16;

/// Memory of [`attend`], reused between calls.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    columns: Vec<f32>,
    scores: Vec<[f32; BLOCK]>,
    block: Vec<f32>,
}

/// Computes `out[i] / totals[i].sum = softmax(queries[i] K^T) V` over the
/// positions `seen[i]`.
///
/// Without positions, `out[i]` is zeros and the sum 0. `MOST` queries, a power of two up to
/// 8, are processed together: as many as there are registers for their sums. Groups of them
/// share widened blocks.
#[inline(always)]
pub(crate) fn attend<L: Lanes, const MOST: usize>(proof: L::Proof, task: Task<'_>) {
    let Task {
        head,
        queries,
        seen,
        scratch,
        totals,
        out,
    } = task;
    let mut first = 0;
    while first < seen.len() {
        let together = match MOST.min(seen.len() - first) {
            8.. => 8,
            4.. => 4,
            left => left,
        };
        let groups = ((seen.len() - first) / together).min(QUERIES / together);
        let rows = groups * together;
        let range = first * head.dim..(first + rows) * head.dim;
        let (queries, out) = (&queries[range.clone()], &mut out[range]);
        let seen = &seen[first..first + rows];
        let totals = &mut totals[first..first + rows];
        match together {
            8 => attend_rows::<L, 8>(proof, head, queries, seen, scratch, totals, out),
            4 => attend_rows::<L, 4>(proof, head, queries, seen, scratch, totals, out),
            3 => attend_rows::<L, 3>(proof, head, queries, seen, scratch, totals, out),
            2 => attend_rows::<L, 2>(proof, head, queries, seen, scratch, totals, out),
            _ => attend_rows::<L, 1>(proof, head, queries, seen, scratch, totals, out),
        }
        first += rows;
    }
}

/// Processes whole groups of `ROWS` queries.
#[inline(always)]
fn attend_rows<L: Lanes, const ROWS: usize>(
    proof: L::Proof,
    head: Head<'_>,
    queries: &[f32],
    seen: &[Range<usize>],
    scratch: &mut Scratch,
    totals: &mut [Total],
    out: &mut [f32],
) {
    let dim = head.dim;
    let start = seen.iter().map(|seen| seen.start).min().unwrap_or(0);
    let end = seen.iter().map(|seen| seen.end).max().unwrap_or(0);
    let blocks = start / BLOCK..end.div_ceil(BLOCK);
    let width = blocks.len();
    // All positions that these queries see may lie in other pieces.
    if width == 0 {
        totals.fill(Total::NONE);
        out.fill(0.0);
        return;
    }
    let Scratch {
        columns,
        scores,
        block,
    } = scratch;
    // Transposed: the same element of every query of a group is contiguous.
    columns.resize(queries.len(), 0.0);
    let groups = columns.chunks_exact_mut(dim * ROWS);
    for (columns, queries) in groups.zip(queries.chunks_exact(dim * ROWS)) {
        for (d, column) in columns.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
            for (row, element) in column.iter_mut().enumerate() {
                *element = queries[row * dim + d];
            }
        }
    }
    scores.resize(seen.len() * width, [0.0; BLOCK]);

    for (i, number) in blocks.clone().enumerate() {
        let keys = widened::<L>(proof, head, number, true, block);
        let groups = columns.chunks_exact(dim * ROWS);
        for (columns, scores) in groups.zip(scores.chunks_exact_mut(ROWS * width)) {
            let columns = columns.as_chunks::<ROWS>().0;
            let mut sums = [L::splat(proof, 0.0); ROWS];
            for (keys, column) in keys.as_chunks::<BLOCK>().0.iter().zip(columns) {
                let keys = L::load(proof, keys);
                for row in 0..ROWS {
                    sums[row] = L::splat(proof, column[row]).mul_add(keys, sums[row]);
                }
            }
            for (row, sums) in sums.into_iter().enumerate() {
                sums.store(&mut scores[row * width + i]);
            }
        }
    }

    for (row, scores) in scores.chunks_exact_mut(width).enumerate() {
        let seen = seen[row].start - blocks.start * BLOCK..seen[row].end - blocks.start * BLOCK;
        totals[row] = softmax(scores, seen);
    }

    out.fill(0.0);
    for (i, number) in blocks.enumerate() {
        let values = widened::<L>(proof, head, number, false, block);
        // Skips positions of the block that no query sees.
        let seen = start.saturating_sub(number * BLOCK)..(end - number * BLOCK).min(BLOCK);
        let groups = out.chunks_exact_mut(dim * ROWS);
        for (out, scores) in groups.zip(scores.chunks_exact(ROWS * width)) {
            let mut weights = [[0.0; BLOCK]; ROWS];
            for (row, weights) in weights.iter_mut().enumerate() {
                *weights = scores[row * width + i];
            }
            for lane in (0..dim).step_by(BLOCK) {
                let lanes = BLOCK.min(dim - lane);
                let mut sums = [L::splat(proof, 0.0); ROWS];
                for (row, sums) in sums.iter_mut().enumerate() {
                    *sums = load_some(proof, &out[row * dim + lane..][..lanes]);
                }
                for position in seen.clone() {
                    let values: L = load_some(proof, &values[position * dim + lane..][..lanes]);
                    for row in 0..ROWS {
                        let weight = L::splat(proof, weights[row][position % BLOCK]);
                        sums[row] = weight.mul_add(values, sums[row]);
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    store_some(sums, &mut out[row * dim + lane..][..lanes]);
                }
            }
        }
    }
}

/// Loads up to 16 numbers and fills the rest with zeros.
#[inline(always)]
fn load_some<L: Lanes>(proof: L::Proof, values: &[f32]) -> L {
    match values.first_chunk() {
        Some(values) => L::load(proof, values),
        None => {
            let mut padded = [0.0; BLOCK];
            padded[..values.len()].copy_from_slice(values);
            L::load(proof, &padded)
        }
    }
}

/// Stores the first numbers, up to 16.
#[inline(always)]
fn store_some<L: Lanes>(lanes: L, out: &mut [f32]) {
    match out.first_chunk_mut() {
        Some(out) => lanes.store(out),
        None => {
            let mut padded = [0.0; BLOCK];
            lanes.store(&mut padded);
            out.copy_from_slice(&padded[..out.len()]);
        }
    }
}

/// Replaces scores by `exp(score - largest)`, and unseen ones by 0; returns their total.
#[inline(always)]
fn softmax(scores: &mut [[f32; BLOCK]], seen: Range<usize>) -> Total {
    let flat = scores.as_flattened_mut();
    flat[..seen.start].fill(f32::NEG_INFINITY);
    flat[seen.end..].fill(f32::NEG_INFINITY);
    let mut largest = [f32::NEG_INFINITY; BLOCK];
    for block in &*scores {
        for lane in 0..BLOCK {
            // Unlike `f32::max` this is one instruction; a NaN propagates through the exponentials
            // in any case.
            largest[lane] = match block[lane] > largest[lane] {
                true => block[lane],
                false => largest[lane],
            };
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for block in &mut *scores {
        for score in block {
            *score = exp(*score - largest);
        }
    }
    let flat = scores.as_flattened_mut();
    flat[..seen.start].fill(0.0);
    flat[seen.end..].fill(0.0);
    let mut sums = [0.0; BLOCK];
    for block in &*scores {
        for lane in 0..BLOCK {
            sums[lane] += block[lane];
        }
    }
    let sum = sums.iter().sum();
    Total { largest, sum }
}

/// Returns a block of keys or values as f32, widened into `memory` if it is stored otherwise.
#[inline(always)]
fn widened<'a, L: Lanes>(
    proof: L::Proof,
    head: Head<'a>,
    number: usize,
    is_key: bool,
    memory: &'a mut Vec<f32>,
) -> &'a [f32] {
    let (dim, block) = (head.dim, head.table[number] as usize);
    let (slab, size) = (block / SLAB, BLOCK * dim);
    let range = place_in_slab(head.index, is_key, block, size);
    memory.resize(size, 0.0);
    match head.blocks {
        Blocks::F32(slabs) => return &slabs[slab].as_slice()[range],
        Blocks::F16(slabs) => {
            let values = slabs[slab].as_slice()[range].as_chunks().0;
            for (out, values) in memory.as_chunks_mut().0.iter_mut().zip(values) {
                L::widen(proof, values).store(out);
            }
        }
        Blocks::Int8(values, scales) => {
            let groups = dim.div_ceil(SCALED);
            let place = place_in_slab(head.index, is_key, block, groups * BLOCK);
            let scales = &scales[slab].as_slice()[place];
            let values = &values[slab].as_slice()[range];
            match is_key {
                true => {
                    let rows = memory.as_chunks_mut::<BLOCK>().0.iter_mut();
                    let rows = rows.zip(values.as_chunks::<BLOCK>().0);
                    for (d, (out, values)) in rows.enumerate() {
                        let scales = &scales[d / SCALED * BLOCK..][..BLOCK];
                        for lane in 0..BLOCK {
                            out[lane] = f32::from(values[lane]) * scales[lane];
                        }
                    }
                }
                false => {
                    let rows = memory.chunks_exact_mut(dim).zip(values.chunks_exact(dim));
                    for ((out, values), scales) in rows.zip(scales.chunks_exact(groups)) {
                        let parts = out.chunks_mut(SCALED).zip(values.chunks(SCALED));
                        for ((out, values), scale) in parts.zip(scales) {
                            for (out, &value) in out.iter_mut().zip(values) {
                                *out = f32::from(value) * scale;
                            }
                        }
                    }
                }
            }
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    /// Tolerance for an average of values up to 1 with exponentials of sums of up to 128 products
    /// as weights; measured: 3e-6.
    const TOLERANCE: f64 = 1e-5;

    fn value(i: usize) -> f32 {
        ((i * 7919 % 1009) as f32 / 504.5) - 1.0
    }

    /// Computes the result in f64 from rows `[positions, dim]`.
    fn expected(query: &[f32], keys: &[f32], values: &[f32], seen: Range<usize>) -> Vec<f64> {
        let dim = query.len();
        let row = |all: &[f32], p: usize| -> Vec<f64> {
            all[p * dim..(p + 1) * dim]
                .iter()
                .map(|&x| f64::from(x))
                .collect()
        };
        let score = |p| -> f64 {
            let products = row(keys, p).into_iter().zip(query);
            products.map(|(k, &q)| k * f64::from(q)).sum()
        };
        let weights: Vec<f64> = seen.clone().map(|p| score(p).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; dim];
        for (weight, p) in weights.iter().zip(seen) {
            for (out, value) in out.iter_mut().zip(row(values, p)) {
                *out += weight / total * value;
            }
        }
        out
    }

    #[test]
    fn every_kernel_attends_as_sums_in_f64_do() {
        for kernels in Kernels::available() {
            let mut scratch = Scratch::default();
            let sizes = [
                (2usize, 1usize),
                (6, 5),
                (16, 16),
                (20, 33),
                (64, 300),
                (128, 70),
            ];
            for (dim, positions) in sizes {
                let blocks = positions.div_ceil(BLOCK);
                let keys: Vec<f32> = (0..positions * dim).map(value).collect();
                let values: Vec<f32> = (0..positions * dim).map(|i| value(i + 5)).collect();
                // Unseen values must not be read.
                let size = BLOCK * dim;
                let slab = |_| {
                    let mut slab = Slab::zeros(4 * SLAB * size).unwrap();
                    slab.as_mut_slice().fill(f32::NAN);
                    slab
                };
                let mut memory: Vec<_> = (0..blocks.div_ceil(SLAB)).map(slab).collect();
                // The second of two heads, in blocks that are not in order.
                let table: Vec<u32> = (0..blocks as u32).rev().collect();
                for p in 0..positions {
                    let block = table[p / BLOCK] as usize;
                    let slab = memory[block / SLAB].as_mut_slice();
                    let [key, value] =
                        [true, false].map(|is_key| place_in_slab(1, is_key, block, size).start);
                    for d in 0..dim {
                        slab[key + d * BLOCK + p % BLOCK] = keys[p * dim + d];
                        slab[value + p % BLOCK * dim + d] = values[p * dim + d];
                    }
                }
                let head = Head {
                    blocks: &Blocks::F32(memory),
                    table: &table,
                    index: 1,
                    dim,
                };
                for n in [1, 2, 3, 4, 5, 8, 13, 17, 37] {
                    let queries: Vec<f32> = (0..n * dim).map(|i| value(i + 77)).collect();
                    let seen: Vec<_> = (0..n)
                        .map(|i| {
                            (i * 5) % positions.div_ceil(2)..positions - i % positions.div_ceil(2)
                        })
                        .collect();
                    let mut out = vec![f32::NAN; n * dim];
                    let mut totals = vec![Total::NONE; n];
                    kernels.attend(Task {
                        head,
                        queries: &queries,
                        seen: &seen,
                        scratch: &mut scratch,
                        totals: &mut totals,
                        out: &mut out,
                    });
                    for (out, total) in out.chunks_exact_mut(dim).zip(totals) {
                        total.divide(out);
                    }
                    for (i, out) in out.chunks_exact(dim).enumerate() {
                        let query = &queries[i * dim..(i + 1) * dim];
                        let expected = expected(query, &keys, &values, seen[i].clone());
                        for (found, expected) in out.iter().zip(expected) {
                            let error = (f64::from(*found) - expected).abs();
                            let name = kernels.name();
                            assert!(error <= TOLERANCE, "{name} {dim} {:?}: {error}", seen[i]);
                        }
                    }
                }
            }
        }
    }
}

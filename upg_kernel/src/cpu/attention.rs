//! Causal attention with grouped key/value heads over the KV caches of several sequences.
#![forbid(unsafe_code)]

use super::Cpu;
use super::cache::LayerView;
use crate::device::Heads;
use crate::inference::pass::Segment;
use crate::kernels::Kernels;
use crate::kernels::attention::{Scratch, Task, Total};
use std::cell::RefCell;
use std::iter::repeat_n;
use std::ops::Range;

/// Minimum positions of a sequence for tasks of several positions and all heads.
///
/// With fewer positions a task is one head of one position.
const MANY: usize = 8;

/// Positions per task in that case.
const TOGETHER: usize = 16;

/// Positions of a context that share one softmax.
///
/// The partial results of a context are joined in order. Pieces start at multiples of this number
/// in the sequence, so that a result does not depend on which thread computes them.
const PIECE: usize = 512;

/// Tasks per thread below which each piece becomes a task: with so few, one task more or less
/// makes a difference.
const TASKS_PER_THREAD: usize = 4;

/// Scratch memory of one thread.
#[derive(Default)]
struct TaskScratch {
    queries: Vec<f32>,
    /// Positions that the queries attend to, in total and within a piece.
    seen: Vec<Range<usize>>,
    seen_here: Vec<Range<usize>>,
    totals: Vec<Total>,
    totals_here: Vec<Total>,
    out: Vec<f32>,
    out_here: Vec<f32>,
    kernel: Scratch,
}

thread_local! {
    static SCRATCH: RefCell<TaskScratch> = RefCell::default();
}

/// Tasks of an attention pass, the same for all layers.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    cuts: Vec<Cut>,
    /// End of each task in the output.
    ends: Vec<usize>,
    /// Flag: each task is one row and one head.
    is_single: bool,
    /// Partial results of each task and piece: weighted sums of values, maximum scores and sums
    /// of weights.
    sums: Vec<f32>,
}

/// Task: some rows of a segment and some key/value heads, contiguous in the output.
#[derive(Debug, Clone)]
struct Cut {
    segment: usize,
    rows: Range<usize>,
    kv_heads: Range<usize>,
}

impl Tasks {
    /// Replaces the tasks by new ones for these segments, which are consecutive.
    pub(crate) fn make(&mut self, segments: &[Segment], shape: Heads) {
        self.cuts.clear();
        self.ends.clear();
        self.is_single = segments.iter().all(|segment| segment.rows.len() < MANY);
        let heads = shape.kv;
        for (segment, Segment { rows, .. }) in segments.iter().enumerate() {
            let (rows_at_once, heads_at_once) = match rows.len() < MANY {
                true => (1, 1),
                false => (TOGETHER, heads),
            };
            for row in rows.clone().step_by(rows_at_once) {
                let rows = row..rows.end.min(row + rows_at_once);
                for head in (0..heads).step_by(heads_at_once) {
                    let kv_heads = head..head + heads_at_once;
                    let end = (rows.end - 1) * heads + kv_heads.end;
                    self.ends.push(end * shape.group() * shape.dim);
                    self.cuts.push(Cut {
                        segment,
                        rows: rows.clone(),
                        kv_heads,
                    });
                }
            }
        }
    }
}

/// Attention of the queries of all heads, at consecutive positions of each
/// of several sequences.
pub(crate) struct Attention<'a, F> {
    /// Cache of each segment.
    pub(crate) cache: F,
    pub(crate) segments: &'a [Segment],
    /// Queries, keys and values side by side, `[n, width]`.
    pub(crate) queries: &'a [f32],
    pub(crate) shape: Heads,
}

impl<'a, F: Fn(usize) -> LayerView<'a> + Sync> Attention<'_, F> {
    /// Computes `softmax(q K^T / sqrt(head_dim)) V` for each query and head.
    ///
    /// The caches already hold the keys and values of all positions. Every element of
    /// `out [n, num_heads * head_dim]` is overwritten. `plan` was made for the segments. Neither
    /// the number of threads nor `n` changes the result. Memory per thread: 64 bytes per position
    /// of a piece.
    pub(crate) fn compute(&self, cpu: &Cpu, plan: &mut Tasks, out: &mut [f32]) {
        let threads = cpu.threads();
        let is_few = threads > 1 && plan.cuts.len() < threads * TASKS_PER_THREAD;
        let pieces = plan.cuts.iter().map(|cut| self.pieces(cut).len());
        match pieces.max().unwrap_or(0) {
            pieces @ 2.. if is_few && plan.is_single => self.split(cpu, plan, pieces, out),
            _ => self.whole(cpu, plan, out),
        }
    }

    /// Computes every task over all positions it attends to.
    fn whole(&self, cpu: &Cpu, plan: &Tasks, out: &mut [f32]) {
        let of_kv_head = self.shape.group() * self.shape.dim;
        cpu.team().pieces(out, &plan.ends, |index, out| {
            let cut = &plan.cuts[index];
            // Elements between two rows; a cut with only some of the heads has a single row.
            let row = self.shape.query_size();
            SCRATCH.with_borrow_mut(|scratch| {
                for (head, kv_head) in cut.kv_heads.clone().enumerate() {
                    self.attend(cpu.kernels(), cut, kv_head, self.pieces(cut), scratch);
                    let TaskScratch {
                        out: found, totals, ..
                    } = &mut *scratch;
                    let heads = found.chunks_exact_mut(self.shape.dim);
                    heads.zip(totals).for_each(|(out, total)| total.divide(out));
                    for (i, found) in found.chunks_exact(of_kv_head).enumerate() {
                        out[i * row + head * of_kv_head..][..of_kv_head].copy_from_slice(found);
                    }
                }
            });
        });
    }

    /// Computes at most `pieces` pieces of a task separately, then joins them as
    /// [`Attention::attend`] does.
    fn split(&self, cpu: &Cpu, plan: &mut Tasks, pieces: usize, out: &mut [f32]) {
        let Tasks {
            cuts, ends, sums, ..
        } = plan;
        let (group, dim) = (self.shape.group(), self.shape.dim);
        let width = group * (dim + 2);
        sums.resize(cuts.len() * pieces * width, 0.0);
        cpu.team().chunks(sums, width, |index, sums| {
            let cut = &cuts[index / pieces];
            let piece = self.pieces(cut).start + index % pieces;
            SCRATCH.with_borrow_mut(|scratch| {
                self.attend(
                    cpu.kernels(),
                    cut,
                    cut.kv_heads.start,
                    piece..piece + 1,
                    scratch,
                );
                let (sums, totals) = sums.split_at_mut(group * dim);
                sums.copy_from_slice(&scratch.out);
                for (to, total) in totals.as_chunks_mut().0.iter_mut().zip(&scratch.totals) {
                    *to = [total.largest, total.sum];
                }
            });
        });
        cpu.team().pieces(out, ends, |index, out| {
            let sums = &sums[index * pieces * width..(index + 1) * pieces * width];
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let mut total = Total::NONE;
                for piece in sums.chunks_exact(width) {
                    let (sums, totals) = piece.split_at(group * dim);
                    let [largest, sum] = totals.as_chunks().0[head];
                    total.join(out, Total { largest, sum }, &sums[head * dim..][..dim]);
                }
                total.divide(out);
            }
        });
    }

    /// Returns the pieces of the sequence that the rows of a cut attend to.
    fn pieces(&self, cut: &Cut) -> Range<usize> {
        let cache = (self.cache)(cut.segment);
        let start = cache.seen(self.position(cut, cut.rows.start)).start;
        let end = cache.seen(self.position(cut, cut.rows.end - 1)).end;
        (cache.first() + start) / PIECE..(cache.first() + end).div_ceil(PIECE)
    }

    /// Returns the position in its sequence of a row of a cut.
    fn position(&self, cut: &Cut, row: usize) -> usize {
        let segment = &self.segments[cut.segment];
        segment.first + row - segment.rows.start
    }

    /// Computes the query heads that share `kv_head` in the rows of a cut over some pieces.
    ///
    /// Writes sums and totals to `scratch`.
    fn attend(
        &self,
        kernels: Kernels,
        cut: &Cut,
        kv_head: usize,
        pieces: Range<usize>,
        scratch: &mut TaskScratch,
    ) {
        let shape = self.shape;
        let scale = 1.0 / (shape.dim as f32).sqrt();
        let of_kv_head = shape.group() * shape.dim;
        let cache = (self.cache)(cut.segment);
        let TaskScratch {
            queries,
            seen,
            seen_here,
            totals,
            totals_here,
            out,
            out_here,
            kernel,
        } = scratch;
        queries.clear();
        seen.clear();
        for row in cut.rows.clone() {
            let unscaled = &self.queries[row * shape.width() + kv_head * of_kv_head..];
            queries.extend(unscaled[..of_kv_head].iter().map(|q| q * scale));
            seen.extend(repeat_n(cache.seen(self.position(cut, row)), shape.group()));
        }
        totals.clear();
        totals.resize(seen.len(), Total::NONE);
        totals_here.resize(seen.len(), Total::NONE);
        out.resize(queries.len(), 0.0);
        out_here.resize(queries.len(), 0.0);
        for piece in pieces {
            let entries = |position: usize| position.saturating_sub(cache.first());
            let (start, end) = (entries(piece * PIECE), entries((piece + 1) * PIECE));
            seen_here.clear();
            let here = seen
                .iter()
                .map(|seen| seen.start.clamp(start, end)..seen.end.clamp(start, end));
            seen_here.extend(here);
            if seen_here.iter().all(Range::is_empty) {
                continue;
            }
            kernels.attend(Task {
                head: cache.head(kv_head),
                queries,
                seen: seen_here,
                scratch: kernel,
                totals: totals_here,
                out: out_here,
            });
            let heads = out.chunks_exact_mut(shape.dim);
            let heads = heads.zip(out_here.chunks_exact(shape.dim));
            for ((out, here), (total, total_here)) in
                heads.zip(totals.iter_mut().zip(&*totals_here))
            {
                total.join(out, *total_here, here);
            }
        }
    }
}

#[cfg(test)]
mod tests;

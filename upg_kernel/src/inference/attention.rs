//! Causal attention with grouped key/value heads over the [`LayerCache`]s of some sequences.
#![forbid(unsafe_code)]

use super::kv_cache::LayerCache;
use super::model::Segment;
use crate::kernels::Kernels;
use crate::kernels::attention::{Scratch, Task};
use crate::team::Team;
use std::cell::RefCell;
use std::iter::repeat_n;
use std::ops::Range;

/// From this many positions of a sequence on a task takes some of them with all heads; before, one head of one
/// position.
const MANY: usize = 8;

/// Positions of a task, then.
const TOGETHER: usize = 16;

/// Memory of one thread.
#[derive(Default)]
struct TaskScratch {
    queries: Vec<f32>,
    seen: Vec<Range<usize>>,
    out: Vec<f32>,
    kernel: Scratch,
}

thread_local! {
    static SCRATCH: RefCell<TaskScratch> = RefCell::default();
}

/// The sizes of an attention.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Elements of a row of queries; those of the heads come first.
    pub(crate) width: usize,
}

impl Shape {
    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    /// Elements of a row of the output.
    fn row(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// The tasks of an attention, the same for all layers.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    cuts: Vec<Cut>,
    /// Where each of them ends in the output.
    ends: Vec<usize>,
}

/// A task: some rows of a segment and some key/value heads, which lie together in the output.
#[derive(Debug, Clone)]
struct Cut {
    segment: usize,
    rows: Range<usize>,
    kv_heads: Range<usize>,
}

impl Plan {
    /// Replaces what it was by tasks for these segments, which follow one another.
    pub(crate) fn make(&mut self, segments: &[Segment], shape: Shape) {
        self.cuts.clear();
        self.ends.clear();
        let heads = shape.num_kv_heads;
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
                    self.ends.push(end * shape.group() * shape.head_dim);
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

/// Queries of some sequences, at consecutive positions of each, of all heads.
pub(crate) struct Attention<'a, F> {
    /// The cache of each segment.
    pub(crate) cache: F,
    pub(crate) segments: &'a [Segment],
    /// `[n, width]`.
    pub(crate) queries: &'a [f32],
    pub(crate) shape: Shape,
}

impl<'a, F: Fn(usize) -> &'a LayerCache + Sync> Attention<'_, F> {
    /// `softmax(q K^T / sqrt(head_dim)) V` for each query and head.
    ///
    /// The caches already hold the keys and values of all positions; every element of `out [n, num_heads *
    /// head_dim]` is overwritten. `plan` was made for the segments. Neither the number of threads nor `n` changes the
    /// result. Memory: up to 32 bytes per seen position and thread.
    pub(crate) fn compute(&self, kernels: Kernels, plan: &Plan, out: &mut [f32]) {
        let of_kv_head = self.shape.group() * self.shape.head_dim;
        Team::global().pieces(out, &plan.ends, |index, out| {
            let cut = &plan.cuts[index];
            // Elements between two rows, of which a cut with some heads only has one.
            let row = self.shape.row();
            for (head, kv_head) in cut.kv_heads.clone().enumerate() {
                self.attend(kernels, cut, kv_head, |i, found| {
                    out[i * row + head * of_kv_head..][..of_kv_head].copy_from_slice(found);
                });
            }
        });
    }

    /// The query heads that share `kv_head` in the rows of a cut; `put` gets the number and the output of each row.
    fn attend(
        &self,
        kernels: Kernels,
        cut: &Cut,
        kv_head: usize,
        mut put: impl FnMut(usize, &[f32]),
    ) {
        let shape = self.shape;
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let of_kv_head = shape.group() * shape.head_dim;
        let segment = &self.segments[cut.segment];
        let cache = (self.cache)(cut.segment);
        SCRATCH.with_borrow_mut(|scratch| {
            let TaskScratch {
                queries,
                seen,
                out,
                kernel,
            } = scratch;
            queries.clear();
            seen.clear();
            for row in cut.rows.clone() {
                let unscaled = &self.queries[row * shape.width + kv_head * of_kv_head..];
                queries.extend(unscaled[..of_kv_head].iter().map(|q| q * scale));
                let position = segment.first + row - segment.rows.start;
                seen.extend(repeat_n(cache.seen(position), shape.group()));
            }
            out.resize(queries.len(), 0.0);
            kernels.attend(Task {
                head: cache.head(kv_head),
                queries,
                seen,
                scratch: kernel,
                out,
            });
            for (i, out) in out.chunks_exact(of_kv_head).enumerate() {
                put(i, out);
            }
        });
    }
}

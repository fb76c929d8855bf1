//! Causal attention with grouped key/value heads over a [`LayerCache`].
#![forbid(unsafe_code)]

use super::kv_cache::LayerCache;
use crate::kernels::Kernels;
use crate::kernels::attention::{Scratch, Task};
use crate::team::Team;
use std::cell::RefCell;
use std::iter::repeat_n;
use std::ops::Range;

/// From this many positions on a task takes some of them with all heads; before, one head of one position.
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

/// Queries at consecutive positions, of all heads.
pub(crate) struct Attention<'a> {
    pub(crate) cache: &'a LayerCache,
    /// `[n, width]`.
    pub(crate) queries: &'a [f32],
    /// The position of the first row.
    pub(crate) first: usize,
    pub(crate) shape: Shape,
}

impl Attention<'_> {
    /// `softmax(q K^T / sqrt(head_dim)) V` for each query and head.
    ///
    /// The cache already holds the keys and values of all positions; every element of `out [n, num_heads *
    /// head_dim]` is overwritten. Neither the number of threads nor `n` changes the result. Memory: up to 32
    /// bytes per seen position and thread.
    pub(crate) fn compute(&self, kernels: Kernels, out: &mut [f32]) {
        let Shape {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = self.shape;
        let row = num_heads * head_dim;
        let of_kv_head = row / num_kv_heads;
        if out.len() / row < MANY {
            Team::global().chunks(out, of_kv_head, |index, out| {
                let (position, kv_head) = (index / num_kv_heads, index % num_kv_heads);
                self.attend(kernels, position..position + 1, kv_head, |_, found| {
                    out.copy_from_slice(found);
                });
            });
            return;
        }
        Team::global().chunks(out, TOGETHER * row, |index, out| {
            let start = index * TOGETHER;
            let positions = start..start + out.len() / row;
            for kv_head in 0..num_kv_heads {
                self.attend(kernels, positions.clone(), kv_head, |i, found| {
                    out[i * row + kv_head * of_kv_head..][..of_kv_head].copy_from_slice(found);
                });
            }
        });
    }

    /// The query heads that share `kv_head` in some rows; `put` gets the number and the output of each.
    fn attend(
        &self,
        kernels: Kernels,
        rows: Range<usize>,
        kv_head: usize,
        mut put: impl FnMut(usize, &[f32]),
    ) {
        let shape = self.shape;
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let heads = shape.num_heads / shape.num_kv_heads;
        let of_kv_head = heads * shape.head_dim;
        SCRATCH.with_borrow_mut(|scratch| {
            let TaskScratch {
                queries,
                seen,
                out,
                kernel,
            } = scratch;
            queries.clear();
            seen.clear();
            for row in rows {
                let unscaled = &self.queries[row * shape.width + kv_head * of_kv_head..];
                queries.extend(unscaled[..of_kv_head].iter().map(|q| q * scale));
                seen.extend(repeat_n(self.cache.seen(self.first + row), heads));
            }
            out.resize(queries.len(), 0.0);
            kernels.attend(Task {
                head: self.cache.head(kv_head),
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

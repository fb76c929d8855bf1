//! Causal attention with grouped key/value heads over a [`LayerCache`].
#![forbid(unsafe_code)]

use super::kv_cache::LayerCache;
use crate::kernels::Kernels;
use crate::kernels::attention::Scratch;
use crate::team::Team;
use std::cell::RefCell;
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

/// `softmax(q K^T / sqrt(head_dim)) V` for each query and head.
///
/// The rows of `queries [n, width]` are at the positions `first..first + n`, whose keys and values the cache
/// already holds; every element of `out [n, num_heads * head_dim]` is overwritten. Neither the number of
/// threads nor `n` changes the result. Memory: up to 32 bytes per seen position and thread.
pub(crate) fn attention(
    kernels: Kernels,
    cache: &LayerCache,
    queries: &[f32],
    first: usize,
    shape: Shape,
    out: &mut [f32],
) {
    let row = shape.num_heads * shape.head_dim;
    let of_kv_head = row / shape.num_kv_heads;
    let n = out.len() / row;
    if n < MANY {
        Team::global().chunks(out, of_kv_head, |index, out| {
            let (position, kv_head) = (index / shape.num_kv_heads, index % shape.num_kv_heads);
            let positions = position..position + 1;
            attend(
                kernels,
                cache,
                queries,
                first,
                shape,
                positions,
                kv_head,
                |_, found| {
                    out.copy_from_slice(found);
                },
            );
        });
        return;
    }
    Team::global().chunks(out, TOGETHER * row, |index, out| {
        let start = index * TOGETHER;
        let positions = start..start + out.len() / row;
        for kv_head in 0..shape.num_kv_heads {
            let positions = positions.clone();
            attend(
                kernels,
                cache,
                queries,
                first,
                shape,
                positions,
                kv_head,
                |i, found| {
                    out[i * row + kv_head * of_kv_head..][..of_kv_head].copy_from_slice(found);
                },
            );
        }
    });
}

/// The query heads that share `kv_head` at some positions; `put` gets the number and the output of each.
#[expect(clippy::too_many_arguments)]
fn attend(
    kernels: Kernels,
    cache: &LayerCache,
    queries: &[f32],
    first: usize,
    shape: Shape,
    positions: Range<usize>,
    kv_head: usize,
    mut put: impl FnMut(usize, &[f32]),
) {
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let heads = shape.num_heads / shape.num_kv_heads;
    let of_kv_head = heads * shape.head_dim;
    SCRATCH.with_borrow_mut(|scratch| {
        let TaskScratch {
            queries: scaled,
            seen,
            out,
            kernel,
        } = scratch;
        scaled.clear();
        seen.clear();
        for position in positions {
            let row = &queries[position * shape.width + kv_head * of_kv_head..][..of_kv_head];
            scaled.extend(row.iter().map(|q| q * scale));
            seen.extend(std::iter::repeat_n(cache.seen(first + position), heads));
        }
        out.resize(scaled.len(), 0.0);
        kernels.attend(cache.head(kv_head), scaled, seen, kernel, out);
        for (i, out) in out.chunks_exact(of_kv_head).enumerate() {
            put(i, out);
        }
    });
}

//! Causal attention with grouped key/value heads over a [`LayerCache`].
#![forbid(unsafe_code)]

use super::kv_cache::LayerCache;
use crate::kernels::scalar::dot;
use crate::team::Team;
use std::cell::RefCell;

thread_local! {
    static SCORES: RefCell<Vec<f32>> = RefCell::default();
}

/// `softmax(q K^T / sqrt(head_dim)) V` for each query and head.
///
/// The first `num_heads * head_dim` elements of each row of `width` of `queries` are at the positions
/// `first..first + n`, whose keys and values the cache already holds; every element of `out [n, num_heads *
/// head_dim]` is overwritten.
/// One task per position and head, each a plain loop in f32, so that neither the number of threads
/// nor `n` changes the result. Scratch: 4 bytes per seen position and thread.
pub(crate) fn attention(
    cache: &LayerCache,
    queries: &[f32],
    width: usize,
    first: usize,
    num_heads: usize,
    head_dim: usize,
    out: &mut [f32],
) {
    let scale = 1.0 / (head_dim as f32).sqrt();
    Team::global().chunks(out, head_dim, |index, out| {
        let query = &queries[index / num_heads * width + index % num_heads * head_dim..][..head_dim];
        SCORES.with_borrow_mut(|scores| {
            let seen = cache.seen(first + index / num_heads);
            let head = cache.head(index % num_heads, num_heads);
            let entries = seen.start * head_dim..seen.end * head_dim;
            let keys = head.keys[entries.clone()].chunks_exact(head_dim);
            let values = head.values[entries].chunks_exact(head_dim);

            scores.clear();
            scores.extend(keys.map(|key| dot(query, key) * scale));
            let total = exponentials(scores);
            out.fill(0.0);
            for (weight, value) in scores.iter().zip(values) {
                for (out, value) in out.iter_mut().zip(value) {
                    *out += weight * value;
                }
            }
            let inverse = 1.0 / total;
            out.iter_mut().for_each(|out| *out *= inverse);
        });
    });
}

/// Replaces scores by `exp(score - largest)`; returns their sum.
fn exponentials(scores: &mut [f32]) -> f32 {
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for score in scores {
        *score = (*score - largest).exp();
        total += *score;
    }
    total
}

//! Causal attention over whole sequences, forward and backward,
//! with all probabilities in memory.
#![forbid(unsafe_code)]

use crate::cpu::Cpu;
use crate::device::Heads;
use crate::kernels::gemm::{View, product};
use crate::kernels::scalar::exp;

/// Heads of several sequences of `len` positions each.
///
/// A task is one key/value head of one sequence, with the query heads that share it; its memory is
/// `8 * len * len` bytes.
pub(super) struct Attention {
    shape: Heads,
    len: usize,
    /// Positions that a query attends to, including its own.
    window: usize,
}

impl Attention {
    pub(super) fn new(shape: Heads, len: usize, window: usize) -> Self {
        Self { shape, len, window }
    }

    /// Computes attention on `qkv [n, width]` after RoPE: `[n, query size]`.
    pub(super) fn mix(&self, cpu: &Cpu, qkv: &[f32]) -> Vec<f32> {
        let head_dim = self.shape.dim;
        let (group, size) = (self.shape.group(), self.len * head_dim);
        let row = self.shape.query_size();
        // For each task its heads one after the other, `[len, head_dim]` each.
        let mut by_head = vec![0.0; qkv.len() / self.shape.width() * row];
        cpu.team().chunks(&mut by_head, group * size, |task, out| {
            let of_task = self.task(qkv, task);
            let mut probabilities = vec![0.0; self.len * self.len];
            for (head, out) in out.chunks_exact_mut(size).enumerate() {
                of_task.probabilities(head, &mut probabilities);
                let probabilities = View::new(&probabilities, self.len, self.len, self.len);
                product(probabilities, of_task.values(), false, out);
            }
        });
        let mut mixed = vec![0.0; by_head.len()];
        cpu.team().chunks(&mut mixed, row, |number, row| {
            let (sequence, position) = (number / self.len, number % self.len);
            for (head, out) in row.chunks_exact_mut(head_dim).enumerate() {
                let head = sequence * self.shape.queries + head;
                let from = head * size + position * head_dim;
                out.copy_from_slice(&by_head[from..from + head_dim]);
            }
        });
        mixed
    }

    /// Computes the gradients of `qkv` from those of the output of [`Attention::mix`].
    pub(super) fn back(&self, cpu: &Cpu, qkv: &[f32], of_mixed: &[f32]) -> Vec<f32> {
        let Heads {
            queries: num_heads,
            kv: num_kv_heads,
            dim: head_dim,
        } = self.shape;
        let width = self.shape.width();
        let (len, row) = (self.len, self.shape.query_size());
        let (group, size) = (self.shape.group(), len * head_dim);
        // For each task its query heads one after the other, its keys, its values.
        let mut by_head = vec![0.0; qkv.len()];
        cpu.team()
            .chunks(&mut by_head, (group + 2) * size, |task, out| {
                let of_task = self.task(qkv, task);
                let (sequence, kv_head) = (task / num_kv_heads, task % num_kv_heads);
                let (of_queries, rest) = out.split_at_mut(group * size);
                let (of_keys, of_values) = rest.split_at_mut(size);
                let mut probabilities = vec![0.0; len * len];
                let mut of_scores = vec![0.0; len * len];
                for (head, of_queries) in of_queries.chunks_exact_mut(size).enumerate() {
                    of_task.probabilities(head, &mut probabilities);
                    let first = sequence * len * row + (kv_head * group + head) * head_dim;
                    let of_output = View::new(&of_mixed[first..], len, head_dim, row);
                    let weights = View::new(&probabilities, len, len, len);
                    product(weights.transposed(), of_output, true, of_values);
                    product(
                        of_output,
                        of_task.values().transposed(),
                        false,
                        &mut of_scores,
                    );
                    let scores = of_scores.chunks_exact_mut(len);
                    for (g, p) in scores.zip(probabilities.chunks_exact(len)) {
                        let mean: f32 = g.iter().zip(p).map(|(g, p)| g * p).sum();
                        for (g, p) in g.iter_mut().zip(p) {
                            *g = p * (*g - mean) * self.scale();
                        }
                    }
                    let of_scores = View::new(&of_scores, len, len, len);
                    product(of_scores, of_task.keys(), false, of_queries);
                    product(of_scores.transposed(), of_task.queries(head), true, of_keys);
                }
            });
        let mut of_qkv = vec![0.0; qkv.len()];
        cpu.team().chunks(&mut of_qkv, width, |number, out| {
            let (sequence, position) = (number / len, number % len);
            for (part, out) in out.chunks_exact_mut(head_dim).enumerate() {
                let (kv_head, place) = match part {
                    query if query < num_heads => (query / group, query % group),
                    other => (
                        (other - num_heads) % num_kv_heads,
                        group + (other - num_heads) / num_kv_heads,
                    ),
                };
                let task = sequence * num_kv_heads + kv_head;
                let from = (task * (group + 2) + place) * size + position * head_dim;
                out.copy_from_slice(&by_head[from..from + head_dim]);
            }
        });
        of_qkv
    }

    /// Returns the factor of the attention scores.
    fn scale(&self) -> f32 {
        1.0 / (self.shape.dim as f32).sqrt()
    }

    fn task<'a>(&'a self, qkv: &'a [f32], task: usize) -> Task<'a> {
        let kv_heads = self.shape.kv;
        let size = self.len * self.shape.width();
        Task {
            heads: self,
            qkv: &qkv[task / kv_heads * size..][..size],
            kv_head: task % kv_heads,
        }
    }
}

/// One key/value head of one sequence.
struct Task<'a> {
    heads: &'a Attention,
    /// Rows `[len, width]`.
    qkv: &'a [f32],
    kv_head: usize,
}

impl<'a> Task<'a> {
    /// Returns the columns of head number `part`, counting the heads of queries, keys and values.
    fn part(&self, part: usize) -> View<'a> {
        let shape = &self.heads.shape;
        let from = part * shape.dim;
        View::new(&self.qkv[from..], self.heads.len, shape.dim, shape.width())
    }

    fn queries(&self, head: usize) -> View<'a> {
        self.part(self.kv_head * self.heads.shape.group() + head)
    }

    fn keys(&self) -> View<'a> {
        self.part(self.heads.shape.queries + self.kv_head)
    }

    fn values(&self) -> View<'a> {
        let shape = &self.heads.shape;
        self.part(shape.queries + shape.kv + self.kv_head)
    }

    /// Computes the attention probabilities of a head, `[len, len]`.
    fn probabilities(&self, head: usize, out: &mut [f32]) {
        let len = self.heads.len;
        product(self.queries(head), self.keys().transposed(), false, out);
        for (position, row) in out.chunks_exact_mut(len).enumerate() {
            let first = (position + 1).saturating_sub(self.heads.window);
            row[..first].fill(0.0);
            row[position + 1..].fill(0.0);
            let seen = &mut row[first..=position];
            let most = seen.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            seen.iter_mut()
                .for_each(|s| *s = exp((*s - most) * self.heads.scale()));
            let scale = 1.0 / seen.iter().sum::<f32>();
            seen.iter_mut().for_each(|p| *p *= scale);
        }
    }
}

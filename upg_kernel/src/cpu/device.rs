//! Steps of a decoder layer on the CPU; each is computed when it is called.
#![forbid(unsafe_code)]

use super::Cpu;
use super::attention::{Attention, Tasks};
use super::cache::CpuCache;
use super::product::{self, multiply};
use crate::device::{Device, Heads, Linear, Norm, Write};
use crate::error::Result;
use crate::inference::cache::CacheLayout;
use crate::inference::pass::Pass;
use crate::inference::rope::{Rope, RopeTable};
use crate::matrix::Matrix;

/// Scratch memory shared by the steps of a pass.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    heads: Option<Heads>,
    rope: RopeTable,
    tasks: Tasks,
    pub(crate) product: product::Scratch,
}

impl Scratch {
    fn heads(&self) -> Heads {
        self.heads.expect("a pass that has begun")
    }
}

/// The CPU as the device of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct CpuDevice(pub(crate) Cpu);

impl Device for CpuDevice {
    type Buffer = Vec<f32>;
    type Weight = Matrix;
    type Vector = Vec<f32>;
    type Cache = CpuCache;
    type Scratch = Scratch;

    fn matrix(&self, matrix: Matrix) -> Result<Matrix> {
        Ok(matrix)
    }

    fn vector(&self, vector: Vec<f32>) -> Result<Vec<f32>> {
        Ok(vector)
    }

    fn cache(&self, layout: &CacheLayout) -> Result<CpuCache> {
        Ok(CpuCache::new(layout))
    }

    fn in_turn<R>(&self, compute: impl FnOnce(&mut dyn FnMut()) -> R) -> R {
        let mut turn = self.0.team().turn();
        compute(&mut || {
            if let Some(turn) = &mut turn {
                turn.pass_on();
            }
        })
    }

    fn begin(
        &self,
        pass: &Pass,
        rope: &Rope,
        heads: Heads,
        cache: &mut CpuCache,
        scratch: &mut Scratch,
    ) -> Result<()> {
        scratch.rope.clear();
        for segment in &pass.segments {
            let (first, n) = (segment.first, segment.rows.len());
            rope.extend(&mut scratch.rope, first, n, segment.long);
        }
        scratch.heads = Some(heads);
        scratch.tasks.make(&pass.segments, heads);
        cache.begin(pass)
    }

    fn gather(&self, embedding: &Matrix, tokens: &[u32], out: &mut Vec<f32>) -> Result<()> {
        out.resize(tokens.len() * embedding.cols(), 0.0);
        embedding.gather_on(&self.0, tokens, out)
    }

    fn norm(&self, norm: &Norm, x: &Vec<f32>, out: &mut Vec<f32>) {
        norm_rows(&self.0, norm, x, out);
    }

    fn linear(
        &self,
        parts: &[Linear],
        x: &Vec<f32>,
        n: usize,
        write: Write,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let width: usize = parts.iter().map(|part| part.weight.rows()).sum();
        out.resize(n * width, 0.0);
        linear(&self.0, parts, x, n, write, &mut scratch.product, out)
    }

    fn rope_append(
        &self,
        pass: &Pass,
        layer: usize,
        norms: Option<&[Norm; 2]>,
        qkv: &mut Vec<f32>,
        cache: &mut CpuCache,
        scratch: &mut Scratch,
    ) {
        debug_assert_eq!(qkv.len(), pass.rows() * scratch.heads().width());
        let (heads, rope) = (scratch.heads(), &scratch.rope);
        self.0.team().chunks(qkv, heads.width(), |number, row| {
            rotate(&self.0, heads, norms, rope, number, row);
            if let Some(rotation) = cache.rotation() {
                for head in row.chunks_exact_mut(heads.dim) {
                    self.0.kernels().rotate(rotation, head);
                }
            }
        });
        cache.append(self.0.team(), layer, qkv, heads.width());
    }

    fn attend(
        &self,
        pass: &Pass,
        layer: usize,
        qkv: &Vec<f32>,
        cache: &CpuCache,
        scratch: &mut Scratch,
        out: &mut Vec<f32>,
    ) {
        let shape = scratch.heads();
        out.resize(pass.rows() * shape.query_size(), 0.0);
        let attention = Attention {
            cache: |segment| cache.view(pass, segment, layer),
            segments: &pass.segments,
            queries: qkv,
            shape,
        };
        attention.compute(&self.0, &mut scratch.tasks, out);
        if let Some(rotation) = cache.rotation() {
            self.0.team().chunks(out, shape.query_size(), |_, row| {
                for head in row.chunks_exact_mut(shape.dim) {
                    self.0.kernels().rotate_back(rotation, head);
                }
            });
        }
    }

    fn gated_silu(&self, gate_up: &Vec<f32>, size: usize, out: &mut Vec<f32>) {
        gated_silu(&self.0, gate_up, size, out);
    }

    fn select(&self, x: &Vec<f32>, width: usize, rows: &[usize], out: &mut Vec<f32>) {
        out.clear();
        for row in rows {
            out.extend_from_slice(&x[row * width..(row + 1) * width]);
        }
    }

    fn read(&self, x: &Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        out.extend_from_slice(x);
        Ok(())
    }
}

/// Normalizes each row of `x [n, gain.len()]` into `out`.
pub(crate) fn norm_rows(cpu: &Cpu, norm: &Norm, x: &[f32], out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(x);
    let len = norm.gain.len().max(1);
    cpu.team().chunks(out, len, |_, row| {
        cpu.kernels().rms_norm(row, &norm.gain, norm.eps);
    });
}

/// Maximum matrices with a common input: queries, keys and values.
const MOST_PARTS: usize = 3;

/// Multiplies `x [n, inputs]` by several matrices and adds their biases:
/// `out [n, outputs of all]`.
pub(crate) fn linear(
    cpu: &Cpu,
    parts: &[Linear],
    x: &[f32],
    n: usize,
    write: Write,
    scratch: &mut product::Scratch,
    out: &mut [f32],
) -> Result<()> {
    debug_assert!(parts.len() <= MOST_PARTS);
    let weights: [_; MOST_PARTS] = std::array::from_fn(|i| parts.get(i).map(|part| &part.weight));
    multiply(cpu, weights, x, n, write, scratch, out)?;
    let width = (out.len() / n.max(1)).max(1);
    let mut first = 0;
    for part in parts {
        if let Some(bias) = &part.bias {
            for row in out.chunks_exact_mut(width) {
                let outputs = row[first..].iter_mut();
                outputs.zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
        first += part.weight.rows();
    }
    Ok(())
}

/// Computes `silu(gate) * up` for the rows `[gate, up]` of `gate_up`: `out [n, size]`.
pub(crate) fn gated_silu(cpu: &Cpu, gate_up: &[f32], size: usize, out: &mut Vec<f32>) {
    out.resize(gate_up.len() / 2, 0.0);
    cpu.team().chunks(out, size.max(1), |row, out| {
        let (gate, up) = gate_up[row * 2 * size..(row + 1) * 2 * size].split_at(size);
        cpu.kernels().gated_silu(gate, up, out);
    });
}

/// Applies the query and key norms, if any, and RoPE for position number `index` to the heads
/// of a row.
pub(crate) fn rotate(
    cpu: &Cpu,
    heads: Heads,
    norms: Option<&[Norm; 2]>,
    rope: &RopeTable,
    index: usize,
    row: &mut [f32],
) {
    let (queries, rest) = row.split_at_mut(heads.query_size());
    let keys = &mut rest[..heads.kv_size()];
    if let Some(norms) = norms {
        for (norm, part) in norms.iter().zip([&mut *queries, &mut *keys]) {
            for head in part.chunks_exact_mut(heads.dim) {
                cpu.kernels().rms_norm(head, &norm.gain, norm.eps);
            }
        }
    }
    rope.apply(index, queries, heads.dim);
    rope.apply(index, keys, heads.dim);
}

#[cfg(test)]
mod tests;

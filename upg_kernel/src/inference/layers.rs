//! The small parts of a decoder layer: linear layers, norms and the gated activation.
#![forbid(unsafe_code)]

use crate::cpu::Cpu;
use crate::cpu::product::{Scratch, Write, multiply};
use crate::error::Result;
use crate::kernels::Kernels;
use crate::matrix::Matrix;

/// A matrix and, in some families, a bias of its `rows`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Matrix,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// `out = W X + b` for `x [n, inputs]`, or that added to `out [n, outputs]`.
    pub(crate) fn multiply(
        &self,
        cpu: &Cpu,
        x: &[f32],
        n: usize,
        write: Write,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<()> {
        multiply(cpu, [Some(&self.weight)], x, n, write, scratch, out)?;
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len().max(1)) {
                add(row, bias);
            }
        }
        Ok(())
    }
}

/// Linear layers with the same input: q, k, v or gate, up. Either one matrix for each output, or a
/// fused one whose rows are the outputs one after the other.
#[derive(Debug, Clone)]
pub(crate) struct Joint<const N: usize> {
    /// One or `N` of them; the rows add up to those of all outputs.
    pub(crate) parts: Vec<Linear>,
}

impl<const N: usize> Joint<N> {
    /// The outputs side by side, `out [n, all outputs]`, for `x [n, inputs]`.
    pub(crate) fn multiply(
        &self,
        cpu: &Cpu,
        x: &[f32],
        n: usize,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) -> Result<()> {
        let parts: [_; N] = std::array::from_fn(|i| self.parts.get(i).map(|part| &part.weight));
        multiply(cpu, parts, x, n, Write::Set, scratch, out)?;
        let width = (out.len() / n.max(1)).max(1);
        let mut first = 0;
        for part in &self.parts {
            if let Some(bias) = &part.bias {
                for row in out.chunks_exact_mut(width) {
                    add(&mut row[first..first + bias.len()], bias);
                }
            }
            first += part.weight.rows();
        }
        Ok(())
    }
}

/// Root mean square norm (arXiv 1910.07467) with a gain per element.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub(crate) gain: Vec<f32>,
    pub(crate) eps: f32,
}

impl RmsNorm {
    /// Normalizes `x`, as many elements as there are gains, in place.
    pub(crate) fn apply(&self, kernels: Kernels, x: &mut [f32]) {
        kernels.rms_norm(x, &self.gain, self.eps);
    }

    /// Each row of `x [n, gain.len()]`, normalized, into `out`, which gets that length.
    pub(crate) fn of(&self, cpu: &Cpu, x: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.extend_from_slice(x);
        let len = self.gain.len().max(1);
        cpu.team()
            .chunks(out, len, |_, row| self.apply(cpu.kernels(), row));
    }
}

/// `gate * sigmoid(gate) * up` for the rows `[gate | up]` of `gate_up`; `out [n, size]` gets that length.
pub(crate) fn gated_silu(cpu: &Cpu, gate_up: &[f32], size: usize, out: &mut Vec<f32>) {
    out.resize(gate_up.len() / 2, 0.0);
    cpu.team().chunks(out, size.max(1), |row, out| {
        let (gate, up) = gate_up[row * 2 * size..(row + 1) * 2 * size].split_at(size);
        cpu.kernels().gated_silu(gate, up, out);
    });
}

/// `a += b`.
fn add(a: &mut [f32], b: &[f32]) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{DenseMatrix, DenseValues};

    fn linear(rows: usize, cols: usize, weights: &[f32], bias: Option<&[f32]>) -> Linear {
        let values = DenseValues::F32(weights.to_vec().into());
        Linear {
            weight: Matrix::Dense(DenseMatrix::new(rows, cols, values).unwrap()),
            bias: bias.map(<[f32]>::to_vec),
        }
    }

    #[test]
    fn a_fused_matrix_gives_what_its_parts_give() {
        let weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let bias = [0.5, -0.5, 10.0];
        let fused = Joint::<2> {
            parts: vec![linear(3, 2, &weights, Some(&bias))],
        };
        let split = Joint::<2> {
            parts: vec![
                linear(2, 2, &weights[..4], Some(&bias[..2])),
                linear(1, 2, &weights[4..], Some(&bias[2..])),
            ],
        };
        let x = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        let expected = [1.5, 2.5, 15.0, 2.5, 3.5, 16.0, 3.5, 6.5, 21.0];
        for joint in [fused, split] {
            let mut out = [f32::NAN; 9];
            joint
                .multiply(
                    Cpu::shared().unwrap(),
                    &x,
                    3,
                    &mut Scratch::default(),
                    &mut out,
                )
                .unwrap();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn a_product_is_added_to_what_is_there() {
        let linear = linear(2, 1, &[1.0, 2.0], Some(&[0.5, 0.25]));
        let mut out = [10.0, 20.0];
        let scratch = &mut Scratch::default();
        linear
            .multiply(
                Cpu::shared().unwrap(),
                &[3.0],
                1,
                Write::Add,
                scratch,
                &mut out,
            )
            .unwrap();
        assert_eq!(out, [13.5, 26.25]);
    }

    #[test]
    fn norm_and_silu_by_hand() {
        let norm = RmsNorm {
            gain: vec![1.0, 2.0],
            eps: 0.5,
        };
        // Mean square 12.5, plus 0.5: a scale of 1 / sqrt(13).
        let scale = 13f32.sqrt();
        for kernels in Kernels::available() {
            let mut out = Vec::new();
            let cpu = &Cpu::new(kernels, 2);
            norm.of(cpu, &[3.0, 4.0], &mut out);
            assert_eq!(out, [3.0 / scale, 8.0 / scale]);
            gated_silu(cpu, &[0.0, 1.0, -100.0, 5.0, 2.0, 3.0], 3, &mut out);
            assert_eq!(out[0], 0.0);
            assert!((out[1] - 2.0 * 0.731_058_6).abs() < 1e-6);
            assert!(out[2].abs() < 1e-30);
        }
    }
}

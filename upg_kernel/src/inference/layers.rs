//! The small parts of a decoder layer: linear layers, norms and the gated activation.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::kernels::scalar::dot;
use crate::matrix::Matrix;
use rayon::prelude::*;

/// A matrix and, in some families, a bias of its `rows`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Matrix,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// `W X + b` for `x [n, inputs]`; returns `[n, outputs]`.
    pub(crate) fn multiply(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let mut out = self.weight.spmm(x, n)?;
        if let Some(bias) = &self.bias {
            for row in out.chunks_exact_mut(bias.len().max(1)) {
                add(row, bias);
            }
        }
        Ok(out)
    }
}

/// Linear layers with the same input: q, k, v or gate, up. Either one matrix for each output, or a
/// fused one whose rows are the outputs one after the other.
///
/// The place where an input that every part wants rotated alike would be rotated once.
#[derive(Debug, Clone)]
pub(crate) struct Joint<const N: usize> {
    /// One or `N` of them; the rows add up to those of `outputs`.
    pub(crate) parts: Vec<Linear>,
    /// Length of each output.
    pub(crate) outputs: [usize; N],
}

impl<const N: usize> Joint<N> {
    /// Every output for `x [n, inputs]`, `[n, outputs[i]]` each.
    pub(crate) fn multiply(&self, x: &[f32], n: usize) -> Result<[Vec<f32>; N]> {
        let mut products = self.parts.iter().map(|part| part.multiply(x, n));
        let mut results = [const { Vec::new() }; N];
        if self.parts.len() == N {
            for (result, product) in results.iter_mut().zip(products) {
                *result = product?;
            }
        } else if let Some(fused) = products.next() {
            let fused = fused?;
            let width: usize = self.outputs.iter().sum();
            for row in fused.chunks_exact(width.max(1)) {
                let mut rest = row;
                for (result, &len) in results.iter_mut().zip(&self.outputs) {
                    let (output, others) = rest.split_at(len);
                    result.extend_from_slice(output);
                    rest = others;
                }
            }
        }
        Ok(results)
    }
}

/// Root mean square norm (arXiv 1910.07467) with a gain per element.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    pub(crate) gain: Vec<f32>,
    pub(crate) eps: f32,
}

impl RmsNorm {
    /// Normalizes each row of `x [n, gain.len()]` in place.
    pub(crate) fn apply(&self, x: &mut [f32]) {
        let len = self.gain.len().max(1);
        x.par_chunks_exact_mut(len).for_each(|row| {
            let mean_square = dot(row, row) / len as f32;
            let scale = 1.0 / (mean_square + self.eps).sqrt();
            for (x, gain) in row.iter_mut().zip(&self.gain) {
                *x = gain * (*x * scale);
            }
        });
    }

    /// A normalized copy.
    pub(crate) fn of(&self, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        self.apply(&mut out);
        out
    }
}

/// How many elements one task of an element-wise loop takes.
const ELEMENTS_PER_TASK: usize = 4096;

/// `gate = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
pub(crate) fn gated_silu(gate: &mut [f32], up: &[f32]) {
    gate.par_chunks_mut(ELEMENTS_PER_TASK)
        .zip(up.par_chunks(ELEMENTS_PER_TASK))
        .for_each(|(gate, up)| {
            for (g, u) in gate.iter_mut().zip(up) {
                *g = *g / (1.0 + (-*g).exp()) * u;
            }
        });
}

/// `a += b`.
pub(crate) fn add(a: &mut [f32], b: &[f32]) {
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
        let outputs = [2, 1];
        let fused = Joint {
            parts: vec![linear(3, 2, &weights, Some(&bias))],
            outputs,
        };
        let split = Joint {
            parts: vec![
                linear(2, 2, &weights[..4], Some(&bias[..2])),
                linear(1, 2, &weights[4..], Some(&bias[2..])),
            ],
            outputs,
        };
        let x = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        let expected = [vec![1.5, 2.5, 2.5, 3.5, 3.5, 6.5], vec![15.0, 16.0, 21.0]];
        assert_eq!(fused.multiply(&x, 3).unwrap(), expected);
        assert_eq!(split.multiply(&x, 3).unwrap(), expected);
    }

    #[test]
    fn norm_and_silu_by_hand() {
        let norm = RmsNorm {
            gain: vec![1.0, 2.0],
            eps: 0.5,
        };
        // Mean square 12.5, plus 0.5: a scale of 1 / sqrt(13).
        let scale = 13f32.sqrt();
        assert_eq!(norm.of(&[3.0, 4.0]), [3.0 / scale, 8.0 / scale]);
        let mut gate = [0.0, 1.0, -100.0];
        gated_silu(&mut gate, &[5.0, 2.0, 3.0]);
        assert_eq!(gate[0], 0.0);
        assert!((gate[1] - 2.0 * 0.731_058_6).abs() < 1e-6);
        assert!(gate[2].abs() < 1e-30);
    }
}

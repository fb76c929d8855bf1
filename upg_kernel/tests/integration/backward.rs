//! Gradients of every matrix of tiny models of every family, compared with finite differences
//! of the loss.
//!
//! The decoder computes the loss in a forward pass, with a matrix moved a little to both sides.

use crate::common::{MODELS, cases, config, exact, source};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::Arc;
use upg_kernel::inference::{
    Backward, Head, LayerInput, Layerwise, Model, ModelConfig, Session, WeightSource,
};
use upg_kernel::matrix::{DenseMatrix, DenseValues, Matrix};
use upg_kernel::{ErrorKind, Result};

/// Relative step of a matrix.
///
/// Smaller steps drown in the rounding of the loss; for larger ones the loss is not linear.
const STEP: f32 = 2e-3;

/// Tolerance relative to the largest difference of all matrices of a model;
/// measured: up to 0.0002.
const TOLERANCE: f64 = 0.001;

/// Seed of the signs in the loss.
const SEED: u64 = 7;

/// Source with one tensor changed.
struct Changed<'a> {
    source: &'a dyn WeightSource,
    name: &'a str,
    change: &'a dyn Fn(&mut [f32]),
}

impl WeightSource for Changed<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = self.source.matrix(name, rows, cols)?;
        if name != self.name {
            return Ok(matrix);
        }
        let mut values = matrix.to_dense();
        (self.change)(&mut values);
        let values = DenseValues::F32(values.into());
        Ok(Matrix::Dense(DenseMatrix::new(rows, cols, values)?))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let mut vector = self.source.vector(name, len)?;
        if name == self.name {
            (self.change)(&mut vector);
        }
        Ok(vector)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }
}

/// Multiplies rows of a matrix, or values of a vector, by `1 + by`.
fn scale(values: &mut [f32], by: &[f32]) {
    let cols = values.len() / by.len();
    let rows = values.chunks_exact_mut(cols).zip(by);
    rows.for_each(|(row, by)| row.iter_mut().for_each(|w| *w *= 1.0 + by));
}

/// Computes the logits of all positions of the sequences.
fn logits(config: &ModelConfig, source: &dyn WeightSource, tokens: &[u32], len: usize) -> Vec<f32> {
    let model = Arc::new(Model::load(config.clone(), source).unwrap());
    let of_sequence = |sequence| {
        let mut session = Session::new(Arc::clone(&model), &exact()).unwrap();
        session.forward(sequence).unwrap().to_vec()
    };
    tokens.chunks_exact(len).flat_map(of_sequence).collect()
}

/// Returns the factors of the logits in the loss: `p * sum(s * e) - s * e` at each position,
/// with random signs `e`.
fn factors(logits: &[f32], vocab: usize, seed: u64) -> Vec<f64> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let of_position = |logits: &[f32]| {
        let exponentials: Vec<f64> = logits.iter().map(|&l| f64::from(l).exp()).collect();
        let sum: f64 = exponentials.iter().sum();
        let mut signs = 0;
        let mut signed = Vec::new();
        for (i, exponential) in exponentials.iter().enumerate() {
            signs = if i % 64 == 0 {
                random.next_u64()
            } else {
                signs >> 1
            };
            let sign = if signs % 2 == 1 { -1.0 } else { 1.0 };
            signed.push(sign * (exponential / sum).sqrt());
        }
        let along: f64 = signed.iter().sum();
        let factor = |(e, s): (&f64, &f64)| e / sum * along - s;
        let factors: Vec<f64> = exponentials.iter().zip(&signed).map(factor).collect();
        factors
    };
    logits.chunks_exact(vocab).flat_map(of_position).collect()
}

#[test]
fn gradients_are_differences_of_the_loss() {
    for (name, weights) in MODELS {
        let (config, source) = (config(name), source(weights));
        let case = cases(name).pop().unwrap();
        let len = case.prompt.len();
        let other: Vec<u32> = case.prompt.iter().rev().copied().collect();
        let tokens = [case.prompt, other].concat();
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden);
        let mut forward =
            Layerwise::new(config.clone(), &embedding.unwrap(), &tokens, len).unwrap();
        let mut before = Vec::new();
        for layer in 0..config.num_layers {
            before.push(forward.hidden().to_vec());
            let observe = &mut |_, _, _: &[f32]| Ok(());
            forward.layer(layer, &source, observe).unwrap();
        }
        let mut run = Backward::new(config.clone(), &source, forward.hidden(), len, SEED).unwrap();
        let factors = factors(&logits(&config, &source, &tokens, len), vocab, SEED);

        // For each matrix the direction of the step, and its expected effect.
        let mut expected: HashMap<String, (Vec<f32>, f64)> = HashMap::new();
        for layer in (0..config.num_layers).rev() {
            let mut inputs = Vec::new();
            let mut observe = |input: LayerInput, x: &[f32], gradients: &[f32]| {
                inputs.push(input);
                let parts = input.matrices(&config);
                let width: usize = parts.iter().map(|(_, rows)| rows).sum();
                let n = gradients.len() / width;
                let cols = x.len() / n;
                assert!(n == tokens.len() && x.len() == n * cols);
                let mut first = 0;
                for (part, rows) in parts {
                    let matrix = format!("model.layers.{layer}.{part}.weight");
                    let values = source.matrix(&matrix, rows, cols)?.to_dense();
                    let squares: f32 = values.iter().map(|w| w * w).sum();
                    let step = STEP * (squares / values.len() as f32).sqrt();
                    // Signs from a product with an odd number:
                    // balanced, and different for every matrix.
                    let by: Vec<f32> = (0..values.len() as u32)
                        .map(|i| (i + layer as u32).wrapping_mul(0x9E37_79B1).count_ones() % 2)
                        .map(|odd| if odd == 1 { step } else { -step })
                        .collect();
                    let mut change = 0.0;
                    for (x, g) in x.chunks_exact(cols).zip(gradients.chunks_exact(width)) {
                        for (by, g) in by.chunks_exact(cols).zip(&g[first..first + rows]) {
                            let moved: f32 = by.iter().zip(x).map(|(by, x)| by * x).sum();
                            change += f64::from(moved) * f64::from(*g);
                        }
                    }
                    expected.insert(matrix, (by, change));
                    first += rows;
                }
                Ok(())
            };
            run.layer(layer, &source, &before[layer], &mut observe)
                .unwrap();
            let all = [
                LayerInput::Down,
                LayerInput::FeedForward,
                LayerInput::Output,
                LayerInput::Attention,
            ];
            assert_eq!(inputs, all);
        }
        let most = expected.values().map(|(_, c)| c.abs()).fold(0.0, f64::max);
        let mut worst: f64 = 0.0;
        for (matrix, (by, change)) in &expected {
            let at = |sign: f32| {
                let moved = Changed {
                    source: &source,
                    name: matrix,
                    change: &|values| {
                        let pairs = values.iter_mut().zip(by);
                        pairs.for_each(|(w, by)| *w += sign * by);
                    },
                };
                let logits = logits(&config, &moved, &tokens, len);
                let products = logits.iter().zip(&factors).map(|(l, c)| f64::from(*l) * c);
                products.sum::<f64>()
            };
            let difference = (at(1.0) - at(-1.0)) / 2.0;
            worst = worst.max((difference - change).abs() / most);
            assert!(
                (difference - change).abs() <= TOLERANCE * most,
                "{name} {matrix}: {difference} {change}, largest {most}"
            );
        }
        println!(
            "{name}: {} matrices, largest error {worst:.1e}",
            expected.len()
        );
    }
}

/// Returns all results of [`Backward::toward`] for `tokens`.
///
/// These are the divergence, and by name the gradients of row factors and of gain factors.
fn toward(
    config: &ModelConfig,
    student: &dyn WeightSource,
    teacher: &dyn WeightSource,
    tokens: &[u32],
    len: usize,
) -> (f64, HashMap<String, Vec<f64>>) {
    let forward = |source: &dyn WeightSource| {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden);
        let mut run = Layerwise::new(config.clone(), &embedding.unwrap(), tokens, len).unwrap();
        let mut before = Vec::new();
        for layer in 0..config.num_layers {
            before.push(run.hidden().to_vec());
            run.layer(layer, source, &mut |_, _, _| Ok(())).unwrap();
        }
        (before, run.hidden().to_vec())
    };
    let (before, hidden) = forward(student);
    let (_, wanted) = forward(teacher);
    let head = Head::new(config, teacher).unwrap();
    let back = Backward::toward(config.clone(), student, &hidden, len, &head, &wanted);
    let (mut run, divergence) = back.unwrap();
    let mut found = HashMap::new();
    let of_gains = |name: &str, gradients: &[f32]| {
        let gains = student.vector(name, config.hidden_size).unwrap();
        let pairs = gradients.iter().zip(gains);
        pairs
            .map(|(g, gain)| f64::from(*g) * f64::from(gain))
            .collect::<Vec<_>>()
    };
    let last = "model.norm.weight".to_owned();
    found.insert(last.clone(), of_gains(&last, run.of_last_gain()));
    for layer in (0..config.num_layers).rev() {
        let mut observe = |input: LayerInput, x: &[f32], gradients: &[f32]| {
            let parts = input.matrices(config);
            let width: usize = parts.iter().map(|(_, rows)| rows).sum();
            let n = gradients.len() / width;
            let mut first = 0;
            for (part, rows) in parts {
                let name = format!("model.layers.{layer}.{part}.weight");
                let y = student.matrix(&name, rows, x.len() / n)?.spmm(x, n)?;
                let of_row = |row: usize| {
                    let products = (0..n).map(|i| {
                        f64::from(y[i * rows + row]) * f64::from(gradients[i * width + first + row])
                    });
                    products.sum()
                };
                found.insert(name, (0..rows).map(of_row).collect());
                first += rows;
            }
            Ok(())
        };
        let gains = run
            .layer(layer, student, &before[layer], &mut observe)
            .unwrap();
        let name = |norm: &str| format!("model.layers.{layer}.{norm}.weight");
        for (norm, gradients) in [
            ("input_layernorm", gains.input),
            ("post_attention_layernorm", gains.feed_forward),
        ] {
            found.insert(name(norm), of_gains(&name(norm), &gradients));
        }
    }
    (divergence, found)
}

/// Computes the divergence from `wanted` to the predictions of `logits`, in nats,
/// summed over positions.
fn divergence(wanted: &[f32], logits: &[f32], vocab: usize) -> f64 {
    let log_probabilities = |logits: &[f32]| {
        let sum: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let of_all: Vec<f64> = logits.iter().map(|&l| f64::from(l) - sum.ln()).collect();
        of_all
    };
    let positions = wanted.chunks_exact(vocab).zip(logits.chunks_exact(vocab));
    positions
        .map(|(p, q)| {
            let (p, q) = (log_probabilities(p), log_probabilities(q));
            p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        })
        .sum()
}

#[test]
fn gradients_of_the_divergence_are_its_differences() {
    for (name, weights) in MODELS {
        let (config, source) = (config(name), source(weights));
        let case = cases(name).pop().unwrap();
        let (mut tokens, len) = (case.prompt[..48].to_vec(), 24);
        if name == MODELS[0].0 {
            // More positions than the logits that are computed at once.
            tokens = tokens.repeat(6);
        }
        // The student has another first layer: rows a tenth up and down.
        let size = match config.family.fused {
            true => 2 * config.intermediate_size,
            false => config.intermediate_size,
        };
        let part = if config.family.fused {
            "gate_up_proj"
        } else {
            "gate_proj"
        };
        let up_and_down = |i: usize| if i.is_multiple_of(2) { 0.3 } else { -0.3 };
        let by: Vec<f32> = (0..size).map(up_and_down).collect();
        let student = Changed {
            source: &source,
            name: &format!("model.layers.0.mlp.{part}.weight"),
            change: &|values| scale(values, &by),
        };
        let wanted = logits(&config, &source, &tokens, len);
        let (found, gradients) = toward(&config, &student, &source, &tokens, len);
        let expected = divergence(
            &wanted,
            &logits(&config, &student, &tokens, len),
            config.vocab_size,
        );
        assert!(
            (found - expected).abs() <= 1e-3 * expected,
            "{name}: {found} {expected}"
        );
        // A step along the gradients, of the same length for all.
        let norm = |g: &[f64]| g.iter().map(|g| g * g).sum::<f64>().sqrt();
        let most = gradients.values().map(|g| norm(g)).fold(0.0, f64::max);
        for (tensor, gradient) in &gradients {
            let length = norm(gradient);
            assert!(length > 0.0, "{name} {tensor}");
            let at = |step: f64| {
                let by = gradient.iter().map(|g| (step * g / length) as f32);
                let by: Vec<f32> = by.collect();
                let moved = Changed {
                    source: &student,
                    name: tensor,
                    change: &|values| scale(values, &by),
                };
                divergence(
                    &wanted,
                    &logits(&config, &moved, &tokens, len),
                    config.vocab_size,
                )
            };
            let difference = (at(0.01) - at(-0.01)) / 0.02;
            assert!(
                (difference - length).abs() <= 0.01 * length.max(0.1 * most),
                "{name} {tensor}: {difference} {length}, largest {most}"
            );
        }
    }
}

#[test]
fn another_head_is_refused() {
    let (name, weights) = MODELS[0];
    let (config, source) = (config(name), source(weights));
    let head = Head::new(&config, &source).unwrap();
    let hidden = vec![0.5; 4 * config.hidden_size];
    let refused = |wanted: &[f32]| {
        let back = Backward::toward(config.clone(), &source, &hidden, 2, &head, wanted);
        back.unwrap_err().kind()
    };
    assert_eq!(refused(&hidden[1..]), ErrorKind::Argument);
    assert_eq!(refused(&[]), ErrorKind::Argument);
    let bad = vec![f32::NAN; hidden.len()];
    assert_eq!(refused(&bad), ErrorKind::Invalid);
}

#[test]
fn other_sizes_are_refused() {
    let (name, weights) = MODELS[0];
    let (config, source) = (config(name), source(weights));
    let hidden = vec![0.5; 3 * config.hidden_size];
    let new = |len| Backward::new(config.clone(), &source, &hidden, len, 0);
    for len in [0, 2, usize::MAX] {
        assert_eq!(new(len).unwrap_err().kind(), ErrorKind::Argument);
    }
    let mut run = new(3).unwrap();
    let mut ask = |index, hidden: &[f32]| {
        let refused = run.layer(index, &source, hidden, &mut |_, _, _| Ok(()));
        refused.unwrap_err().kind()
    };
    assert_eq!(ask(config.num_layers, &hidden), ErrorKind::Argument);
    assert_eq!(ask(0, &hidden[1..]), ErrorKind::Argument);
    let bad = vec![f32::NAN; hidden.len()];
    let refused = Backward::new(config.clone(), &source, &bad, 3, 0);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
}

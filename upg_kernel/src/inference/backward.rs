//! Backward pass through a decoder, layer by layer:
//! the gradients of the outputs of every matrix.
#![forbid(unsafe_code)]

use super::config::ModelConfig;
use super::layer_input::LayerInput;
use super::layerwise::POSITIONS_TOGETHER;
use super::rope::{Rope, RopeTable};
use super::weights::{HeadWeights, Layer, WeightSource};
use crate::cpu::Cpu;
use crate::cpu::device::{gated_silu, linear, norm_rows, rotate};
use crate::cpu::product::{Scratch, multiply};
use crate::device::{Heads, Linear, Norm, Write};
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::gemm::{View, product};
use crate::kernels::scalar::exp;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

mod heads;

use heads::Attention;

/// Positions whose logits are computed at once.
const LOGITS_TOGETHER: usize = 256;

/// Rows of a product that one task computes.
const TASK_ROWS: usize = 64;

/// Callback for the inputs and gradients of a layer.
///
/// It gets the kind of input, its rows `x [n, cols]`, and the gradients `[n, outputs]` of the
/// outputs of all matrices with this input, side by side. An error ends the pass.
pub type GradientObserver<'a> = &'a mut dyn FnMut(LayerInput, &[f32], &[f32]) -> Result<()>;

/// Gradients of the hidden states of several sequences in a backward pass through a decoder.
///
/// This is the partner of [`Layerwise`](super::Layerwise).
///
/// The pass starts from the logits of all positions, summed with random factors
/// `c = p * sum(s * e) - s * e`. Here `p` are the probabilities that the model predicts at a
/// position, `s` their square roots, and `e` random signs. The covariance of `c` is
/// `diag(p) - p p^T`. That is the covariance of the log-likelihood gradient when the token is
/// sampled from `p`. So the second moments of these gradients are the Fisher information `F`:
/// to second order, a change `d` causes a Kullback-Leibler divergence of half of `d^T F d` from
/// the model's predictions. Unlike the gradient of a sampled token, `c` is about as large as
/// its average each time. A token that is nearly certain would be sampled nearly always and
/// carry no information.
///
/// The signs are the bits of ChaCha8 seeded with `ChaCha8Rng::seed_from_u64(seed)`, 64 at a time
/// from the least significant one on, 1 for `e = -1`. Every position starts with new bits. All
/// arithmetic is f32.
#[derive(Debug)]
pub struct Backward {
    cpu: Cpu,
    config: ModelConfig,
    /// RoPE table of the positions of one sequence.
    rope: RopeTable,
    /// Tokens of each sequence.
    len: usize,
    /// Gradients `[sequences, len, hidden]`.
    gradients: Vec<f32>,
    /// Gradients of the gains of the last norm.
    of_gain: Vec<f32>,
    scratch: Scratch,
}

/// Gradients of the gains of the norms of a layer, `[hidden]` each,
/// summed over all positions.
#[derive(Debug, Clone)]
pub struct GainGradients {
    /// Gradients of the norm before attention.
    pub input: Vec<f32>,
    /// Gradients of the norm before gate and up.
    pub feed_forward: Vec<f32>,
}

/// Last norm and output head, which turn the last hidden states into logits.
#[derive(Debug)]
pub struct Head {
    cpu: Cpu,
    weights: HeadWeights,
}

impl Head {
    /// Loads the head of the model in `source`.
    ///
    /// Errors: those of loading ([`Model::load`](super::Model::load)).
    pub fn new(config: &ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        Ok(Self {
            cpu: Cpu::shared()?.clone(),
            weights: HeadWeights::load(config, source)?,
        })
    }

    /// Computes the logits of `hidden [n, hidden]`: `[n, vocab]`.
    fn logits(&self, hidden: &[f32], scratch: &mut Scratch, out: &mut Vec<f32>) -> Result<()> {
        let Self { cpu, weights } = self;
        let HeadWeights { norm, matrix } = weights;
        let mut normed = Vec::new();
        norm_rows(cpu, norm, hidden, &mut normed);
        let n = hidden.len() / matrix.cols().max(1);
        out.resize(n * matrix.rows(), 0.0);
        multiply(cpu, [Some(matrix)], &normed, n, Write::Set, scratch, out)
    }

    fn check(&self, vocab: usize, positions: usize, hidden: &[f32]) -> Result<()> {
        let matrix = &self.weights.matrix;
        if matrix.rows() == vocab && hidden.len() == positions * matrix.cols() {
            return Ok(());
        }
        let message = format!(
            "{} hidden values and a vocabulary of {}, expected {positions} positions and {vocab}",
            hidden.len(),
            matrix.rows()
        );
        Err(Error::new(ErrorKind::Argument, message))
    }
}

impl Backward {
    /// Starts after the last layer, whose output is `hidden [sequences, len, hidden]`.
    ///
    /// Uses norm and head of `source`, and signs drawn with `seed`.
    ///
    /// Memory: as many values as `hidden` has, the head as f32 twice, and the logits of 512
    /// positions. Errors: `Argument` if `hidden` is not whole sequences; `Invalid` for logits that
    /// are not finite; those of loading ([`Model::load`](super::Model::load)).
    pub fn new(
        config: ModelConfig,
        source: &dyn WeightSource,
        hidden: &[f32],
        len: usize,
        seed: u64,
    ) -> Result<Self> {
        let (mut random, vocab) = (ChaCha8Rng::seed_from_u64(seed), config.vocab_size);
        Self::from_logits(config, source, hidden, len, |_, logits| {
            let mut positions = logits.chunks_exact_mut(vocab);
            positions.try_for_each(|logits| fluctuate(logits, &mut random))
        })
    }

    /// Starts like [`Backward::new`], with the gradients of the divergence
    /// from another model's predictions.
    ///
    /// This is the Kullback-Leibler divergence, summed over all positions, in nats. The gradients
    /// of the logits are `q - p`. That model's `wanted_hidden` belong to the same tokens. Also
    /// returns the divergence.
    ///
    /// Memory: also the logits of 256 positions. Errors: also `Argument` if the numbers of hidden
    /// states or the vocabulary sizes differ.
    pub fn toward(
        config: ModelConfig,
        source: &dyn WeightSource,
        hidden: &[f32],
        len: usize,
        wanted: &Head,
        wanted_hidden: &[f32],
    ) -> Result<(Self, f64)> {
        let (vocab, positions) = (config.vocab_size, hidden.len() / config.hidden_size.max(1));
        wanted.check(vocab, positions, wanted_hidden)?;
        let (mut divergence, mut scratch, mut p) = (0.0, Scratch::default(), Vec::new());
        let of_wanted = wanted_hidden.len() / positions.max(1);
        let back = Self::from_logits(config, source, hidden, len, |first, logits| {
            let n = logits.len() / vocab;
            let rows = &wanted_hidden[first * of_wanted..][..n * of_wanted];
            wanted.logits(rows, &mut scratch, &mut p)?;
            let of_positions = logits.par_chunks_exact_mut(vocab);
            let divergences = of_positions.zip(p.par_chunks_exact_mut(vocab));
            let divergences: Vec<f64> = divergences
                .map(|(q, p)| part_from(q, p))
                .collect::<Result<_>>()?;
            // Summed in order, so that the number of threads does not change the result.
            divergence += divergences.iter().sum::<f64>();
            Ok(())
        })?;
        Ok((back, divergence))
    }

    /// Starts from logits.
    ///
    /// `gradient` gets the index of a position and the logits from there on, and turns these into
    /// their gradients.
    fn from_logits(
        config: ModelConfig,
        source: &dyn WeightSource,
        hidden: &[f32],
        len: usize,
        mut gradient: impl FnMut(usize, &mut [f32]) -> Result<()>,
    ) -> Result<Self> {
        config.check()?;
        let size = len.checked_mul(config.hidden_size);
        if !size.is_some_and(|size| size > 0 && hidden.len().is_multiple_of(size)) {
            let message = format!("{} values as sequences of {len} positions", hidden.len());
            return Err(Error::new(ErrorKind::Argument, message));
        }
        let head = Head::new(&config, source)?;
        let weights = head.weights.matrix.to_dense();
        let mut scratch = Scratch::default();
        let mut logits = Vec::new();
        let mut gradients = vec![0.0; hidden.len()];
        let mut of_gain = vec![0.0; config.hidden_size];
        let together = LOGITS_TOGETHER * config.hidden_size;
        let chunks = hidden.chunks(together).zip(gradients.chunks_mut(together));
        for (number, (x, gradients)) in chunks.enumerate() {
            head.logits(x, &mut scratch, &mut logits)?;
            gradient(number * LOGITS_TOGETHER, &mut logits)?;
            let n = x.len() / config.hidden_size;
            let logits = View::new(&logits, n, config.vocab_size, config.vocab_size);
            back(&head.cpu, logits, &weights, false, gradients);
            add(
                &mut of_gain,
                &gain_gradients(&head.weights.norm, x, gradients),
            );
            norm_back(&head.cpu, &head.weights.norm, x, gradients);
        }
        let rope = Rope::new(&config.rope);
        Ok(Self {
            cpu: head.cpu,
            rope: rope.table(0, len, rope.is_long(len)),
            config,
            len,
            gradients,
            of_gain,
            scratch,
        })
    }

    /// Returns the gradients of the gains of the last norm, `[hidden]`.
    pub fn of_last_gain(&self) -> &[f32] {
        &self.of_gain
    }

    /// Returns the gradients `[sequences, len, hidden]`.
    ///
    /// They belong to the input of the last layer that was passed, or to the output of the model
    /// before the first.
    pub fn gradients(&self) -> &[f32] {
        &self.gradients
    }

    /// Propagates the gradients back through layer `index`, whose input was `hidden [sequences,
    /// len, hidden]`.
    ///
    /// `observe` sees the four [`LayerInput`](super::LayerInput)s from the last to the first, for a
    /// few sequences at a time. Returns the gradients of the gains of its norms. Cost: about three
    /// times a forward pass of the layer.
    ///
    /// Errors: `Argument` for another number of values; those of loading the layer and of
    /// `observe`. After an error the gradients are unusable.
    pub fn layer(
        &mut self,
        index: usize,
        source: &dyn WeightSource,
        hidden: &[f32],
        observe: GradientObserver<'_>,
    ) -> Result<GainGradients> {
        let argument = |message| Err(Error::new(ErrorKind::Argument, message));
        let Some(&window) = self.config.windows.get(index) else {
            return argument(format!("layer {index} of {}", self.config.num_layers));
        };
        if hidden.len() != self.gradients.len() {
            let expected = self.gradients.len();
            return argument(format!("{} values, expected {expected}", hidden.len()));
        }
        let layer = Layer::load(&self.config, source, index)?;
        let pass = Pass {
            cpu: &self.cpu,
            config: &self.config,
            layer: &layer,
            rope: &self.rope,
            len: self.len,
            window: window.unwrap_or(self.len),
        };
        let size = self.len * self.config.hidden_size;
        let together = (POSITIONS_TOGETHER / self.len).max(1) * size;
        let mut of_gains = GainGradients {
            input: vec![0.0; self.config.hidden_size],
            feed_forward: vec![0.0; self.config.hidden_size],
        };
        for (x, gradients) in hidden
            .chunks(together)
            .zip(self.gradients.chunks_mut(together))
        {
            pass.run(x, gradients, &mut self.scratch, &mut of_gains, observe)?;
        }
        Ok(of_gains)
    }
}

/// Several sequences and the layer they pass.
struct Pass<'a> {
    cpu: &'a Cpu,
    config: &'a ModelConfig,
    layer: &'a Layer,
    rope: &'a RopeTable,
    len: usize,
    /// Positions that a query attends to.
    window: usize,
}

impl Pass<'_> {
    /// Processes the input `x [n, hidden]`.
    ///
    /// On entry `gradients` are those of the output, on return those of `x`.
    fn run(
        &self,
        x: &[f32],
        gradients: &mut [f32],
        scratch: &mut Scratch,
        of_gains: &mut GainGradients,
        observe: GradientObserver<'_>,
    ) -> Result<()> {
        let &Self {
            cpu, config, layer, ..
        } = self;
        let n = x.len() / config.hidden_size;
        let heads = Heads::new(config);
        let width = heads.width();
        let (query, size) = (config.query_size(), config.intermediate_size);

        // Forward.
        let mut normed = Vec::new();
        norm_rows(cpu, &layer.input_norm, x, &mut normed);
        let mut qkv = vec![0.0; n * width];
        linear(cpu, &layer.qkv, &normed, n, Write::Set, scratch, &mut qkv)?;
        let projected = layer.head_norms.as_ref().map(|_| qkv.clone());
        cpu.team().chunks(&mut qkv, width, |number, row| {
            rotate(
                cpu,
                heads,
                layer.head_norms.as_ref(),
                self.rope,
                number % self.len,
                row,
            );
        });
        let attention = Attention::new(heads, self.len, self.window);
        let mixed = attention.mix(cpu, &qkv);
        let mut middle = x.to_vec();
        let output = std::slice::from_ref(&layer.output);
        linear(cpu, output, &mixed, n, Write::Add, scratch, &mut middle)?;
        let mut mlp_normed = Vec::new();
        norm_rows(cpu, &layer.mlp_norm, &middle, &mut mlp_normed);
        let mut gate_up = vec![0.0; n * 2 * size];
        let parts = &layer.gate_up;
        linear(
            cpu,
            parts,
            &mlp_normed,
            n,
            Write::Set,
            scratch,
            &mut gate_up,
        )?;
        let mut gated = Vec::new();
        gated_silu(cpu, &gate_up, size, &mut gated);

        // Backward: `gradients` are of the output, then of `middle`, then of `x`.
        observe(LayerInput::Down, &gated, gradients)?;
        let hidden = config.hidden_size;
        let of_gated = &mut gated;
        back(
            cpu,
            View::new(gradients, n, hidden, hidden),
            &layer.down.weight.to_dense(),
            false,
            of_gated,
        );
        gated_silu_back(cpu, &mut gate_up, size, of_gated);
        observe(LayerInput::FeedForward, &mlp_normed, &gate_up)?;
        let of_normed = &mut mlp_normed;
        joint_back(cpu, &layer.gate_up, &gate_up, n, of_normed);
        let of_gain = gain_gradients(&layer.mlp_norm, &middle, of_normed);
        add(&mut of_gains.feed_forward, &of_gain);
        norm_back(cpu, &layer.mlp_norm, &middle, of_normed);
        add(gradients, of_normed);

        observe(LayerInput::Output, &mixed, gradients)?;
        let mut of_mixed = mixed;
        back(
            cpu,
            View::new(gradients, n, hidden, hidden),
            &layer.output.weight.to_dense(),
            false,
            &mut of_mixed,
        );
        let mut of_qkv = attention.back(cpu, &qkv, &of_mixed);
        cpu.team().chunks(&mut of_qkv, width, |number, row| {
            let head_dim = config.head_dim;
            let (q, kv) = row.split_at_mut(query);
            let k = &mut kv[..config.kv_size()];
            self.rope.apply_transposed(number % self.len, q, head_dim);
            self.rope.apply_transposed(number % self.len, k, head_dim);
            if let (Some([q_norm, k_norm]), Some(projected)) = (&layer.head_norms, &projected) {
                let projected = &projected[number * width..][..width];
                for (norm, at, heads) in [(q_norm, 0, q), (k_norm, query, k)] {
                    let inputs = projected[at..].chunks_exact(head_dim);
                    let gradients = heads.chunks_exact_mut(head_dim);
                    gradients
                        .zip(inputs)
                        .for_each(|(gradients, x)| norm_back_row(norm, x, gradients));
                }
            }
        });
        observe(LayerInput::Attention, &normed, &of_qkv)?;
        let of_normed = &mut normed;
        joint_back(cpu, &layer.qkv, &of_qkv, n, of_normed);
        let of_gain = gain_gradients(&layer.input_norm, x, of_normed);
        add(&mut of_gains.input, &of_gain);
        norm_back(cpu, &layer.input_norm, x, of_normed);
        add(gradients, of_normed);
        Ok(())
    }
}

/// Turns the logits of a position into the factors `c` of [`Backward`].
///
/// Errors (`Invalid`): a logit is not finite.
fn fluctuate(logits: &mut [f32], random: &mut ChaCha8Rng) -> Result<()> {
    check_finite(logits)?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for logit in &mut *logits {
        *logit = exp(*logit - most);
        sum += f64::from(*logit);
    }
    let scale = (1.0 / sum) as f32;
    let mut along = 0.0;
    for logits in logits.chunks_mut(64) {
        let signs = random.next_u64();
        for (bit, logit) in logits.iter_mut().enumerate() {
            let root = (*logit * scale).sqrt();
            *logit = if signs >> bit & 1 == 1 { -root } else { root };
            along += f64::from(*logit);
        }
    }
    let along = along as f32;
    for value in logits {
        *value = *value * *value * along - *value;
    }
    Ok(())
}

/// Turns the logits `q` of a position into the gradients of the divergence from `p`; returns
/// the divergence.
///
/// `p` are the logits of the target predictions and are overwritten. The divergence is in nats.
///
/// Errors (`Invalid`): a logit is not finite.
fn part_from(q: &mut [f32], p: &mut [f32]) -> Result<f64> {
    let of_q = log_sum(q)?;
    let of_p = log_sum(p)?;
    let mut divergence = 0.0;
    for (q, p) in q.iter_mut().zip(p) {
        let (log_q, log_p) = (*q - of_q, *p - of_p);
        let probability = exp(log_p);
        divergence += f64::from(probability) * f64::from(log_p - log_q);
        *q = exp(log_q) - probability;
    }
    Ok(divergence)
}

/// Returns the log-sum-exp of the logits, which subtracted from them gives log-probabilities.
fn log_sum(logits: &[f32]) -> Result<f32> {
    check_finite(logits)?;
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(exp(l - most))).sum();
    Ok(most + sum.ln() as f32)
}

fn check_finite(logits: &[f32]) -> Result<()> {
    match logits.iter().find(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(bad) => {
            let message = format!("the model predicts a logit of {bad}");
            Err(Error::new(ErrorKind::Invalid, message)
                .hint("its weights give no finite numbers for this text"))
        }
    }
}

/// Computes `out [n, inputs] = gradients [n, outputs] * weights [outputs, inputs]`, or adds
/// it with `add`.
fn back(cpu: &Cpu, gradients: View<'_>, weights: &[f32], add: bool, out: &mut [f32]) {
    let outputs = gradients.cols();
    let inputs = weights.len() / outputs;
    let weights = View::new(weights, outputs, inputs, inputs);
    cpu.team().chunks(out, TASK_ROWS * inputs, |task, out| {
        let first = task * TASK_ROWS;
        let rows = first..first + out.len() / inputs;
        product(gradients.rows_of(rows), weights, add, out);
    });
}

/// Runs [`back`] through matrices with the same input, whose gradients are side by side.
fn joint_back(cpu: &Cpu, joint: &[Linear], gradients: &[f32], n: usize, out: &mut [f32]) {
    let width = gradients.len() / n.max(1);
    let mut first = 0;
    for part in joint {
        let outputs = part.weight.rows();
        let of_part = View::new(&gradients[first..], n, outputs, width);
        back(cpu, of_part, &part.weight.to_dense(), first > 0, out);
        first += outputs;
    }
}

/// Propagates back through a norm with the inputs `x`.
///
/// On entry `gradients` are those of its outputs, on return those of `x`.
fn norm_back(cpu: &Cpu, norm: &Norm, x: &[f32], gradients: &mut [f32]) {
    let len = norm.gain.len().max(1);
    cpu.team().chunks(gradients, len, |row, gradients| {
        norm_back_row(norm, &x[row * len..][..len], gradients);
    });
}

/// Computes the gradients of the gains of a norm from its inputs `x` and output gradients:
/// `sum of dy * x * r`.
fn gain_gradients(norm: &Norm, x: &[f32], gradients: &[f32]) -> Vec<f32> {
    let len = norm.gain.len().max(1);
    let mut sums = vec![0.0; len];
    for (x, gradients) in x.chunks_exact(len).zip(gradients.chunks_exact(len)) {
        let r = one_over_size(norm, x) as f32;
        let pairs = x.iter().zip(gradients);
        sums.iter_mut()
            .zip(pairs)
            .for_each(|(sum, (x, g))| *sum += x * r * g);
    }
    sums
}

/// Computes `1 / sqrt(mean(x^2) + eps)`.
fn one_over_size(norm: &Norm, x: &[f32]) -> f64 {
    let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
    1.0 / (squares / x.len() as f64 + f64::from(norm.eps)).sqrt()
}

/// Computes `r * gain * dy - x * r^3 * mean(gain * dy * x)` for one row.
///
/// This is the gradient of `y = gain * x * r` with `r = 1 / sqrt(mean(x^2) + eps)`.
fn norm_back_row(norm: &Norm, x: &[f32], gradients: &mut [f32]) {
    let (len, r) = (x.len() as f64, one_over_size(norm, x));
    let mut along = 0.0;
    for ((g, &gain), &x) in gradients.iter_mut().zip(&norm.gain).zip(x) {
        *g *= gain;
        along += f64::from(*g) * f64::from(x);
    }
    let (scale, share) = (r as f32, (r.powi(3) * along / len) as f32);
    for (g, &x) in gradients.iter_mut().zip(x) {
        *g = *g * scale - x * share;
    }
}

/// Turns rows `[gate | up]` of `gate_up` into their gradients.
///
/// `gradients [n, size]` are those of `silu(gate) * up`.
fn gated_silu_back(cpu: &Cpu, gate_up: &mut [f32], size: usize, gradients: &[f32]) {
    cpu.team().chunks(gate_up, 2 * size.max(1), |row, gate_up| {
        let (gate, up) = gate_up.split_at_mut(size);
        let gradients = &gradients[row * size..][..size];
        for ((gate, up), g) in gate.iter_mut().zip(up).zip(gradients) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * sigmoid;
            (*gate, *up) = (g * *up * (sigmoid + silu * (1.0 - sigmoid)), g * silu);
        }
    });
}

fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

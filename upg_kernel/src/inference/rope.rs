//! Rotary position embedding (RoFormer, arXiv 2104.09864) with the extensions of
//! [`RopeScaling`].
//!
//! Element `i` of the first half of the rotated part of a head and element `i` of the second half
//! are one point of a plane, which is rotated by `position * frequency[i]`. Frequencies and angles
//! are computed in f64; only cos and sin are rounded to f32.
#![forbid(unsafe_code)]

use super::config::{RopeConfig, RopeScaling};
use std::f64::consts::PI;

/// Frequencies of a model.
#[derive(Debug, Clone)]
pub struct Rope {
    short: Vec<f64>,
    /// Sequence length above which other frequencies apply, and these frequencies.
    long: Option<(usize, Vec<f64>)>,
    attention_factor: f64,
}

/// Cos and sin for some positions, `[n, dim / 2]` each.
#[derive(Debug, Default)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    /// Computes the frequencies that `config` specifies.
    pub fn new(config: &RopeConfig) -> Self {
        let frequencies = |divisor: &dyn Fn(usize) -> f64| -> Vec<f64> {
            base_frequencies(config)
                .enumerate()
                .map(|(i, frequency)| frequency / divisor(i))
                .collect()
        };
        let mut long = None;
        let mut attention_factor = 1.0;
        let short = match &config.scaling {
            RopeScaling::Default => frequencies(&|_| 1.0),
            RopeScaling::Linear { factor } => frequencies(&|_| *factor),
            RopeScaling::Llama3 { .. } => llama3(config),
            RopeScaling::Yarn {
                attention_factor: factor,
                ..
            } => {
                attention_factor = *factor;
                yarn(config)
            }
            RopeScaling::LongRope {
                short,
                long: divisors,
                original_context,
                attention_factor: factor,
            } => {
                attention_factor = *factor;
                long = Some((*original_context, frequencies(&|i| divisors[i])));
                frequencies(&|i| short[i])
            }
        };
        Self {
            short,
            long,
            attention_factor,
        }
    }

    /// Returns whether a sequence of `len` tokens in total uses the frequencies
    /// for long sequences.
    ///
    /// The length of the whole sequence decides for every position in it, as in transformers. When
    /// a sequence grows past the switch, its earlier keys become invalid and must be recomputed.
    pub fn is_long(&self, len: usize) -> bool {
        self.long.as_ref().is_some_and(|(limit, _)| len > *limit)
    }

    /// Returns the radians per position, `[dim / 2]`.
    pub fn frequencies(&self, long: bool) -> &[f64] {
        match &self.long {
            Some((_, frequencies)) if long => frequencies,
            _ => &self.short,
        }
    }

    /// Returns the factor of cos and sin.
    pub fn attention_factor(&self) -> f64 {
        self.attention_factor
    }

    /// Computes cos and sin for the positions `first..first + n`. Memory: 8 bytes per position
    /// and frequency.
    pub fn table(&self, first: usize, n: usize, long: bool) -> RopeTable {
        let mut table = RopeTable::default();
        self.extend(&mut table, first, n, long);
        table
    }

    /// Appends the content of [`Rope::table`] to a table of the same model.
    pub fn extend(&self, table: &mut RopeTable, first: usize, n: usize, long: bool) {
        let frequencies = self.frequencies(long);
        table.half = frequencies.len();
        for position in first..first + n {
            for frequency in frequencies {
                let (s, c) = (position as f64 * frequency).sin_cos();
                table.cos.push((c * self.attention_factor) as f32);
                table.sin.push((s * self.attention_factor) as f32);
            }
        }
    }
}

impl RopeTable {
    /// Removes all positions, but keeps the memory.
    pub fn clear(&mut self) {
        self.cos.clear();
        self.sin.clear();
    }

    /// Rotates the heads of `row`, `head_dim` elements each,
    /// to position number `index`, in place.
    ///
    /// Elements of a head from `dim` on keep their values. Panics beyond the table.
    pub fn apply(&self, index: usize, row: &mut [f32], head_dim: usize) {
        self.turn(index, row, head_dim, |x| x);
    }

    /// Applies the transpose of [`RopeTable::apply`], for gradients.
    pub(crate) fn apply_transposed(&self, index: usize, row: &mut [f32], head_dim: usize) {
        self.turn(index, row, head_dim, |x| -x);
    }

    fn turn(&self, index: usize, row: &mut [f32], head_dim: usize, sign: impl Fn(f32) -> f32) {
        let entries = index * self.half..(index + 1) * self.half;
        let (cos, sin) = (&self.cos[entries.clone()], &self.sin[entries]);
        for head in row.chunks_exact_mut(head_dim) {
            let (first, rest) = head.split_at_mut(self.half);
            for (((a, b), &cos), &sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
                let sin = sign(sin);
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

/// Returns `theta^(-2i / dim)` for `i` in `0..dim / 2`.
fn base_frequencies(config: &RopeConfig) -> impl Iterator<Item = f64> {
    let (theta, dim) = (config.theta, config.dim);
    (0..dim / 2).map(move |i| theta.powf(-((2 * i) as f64) / dim as f64))
}

/// Frequencies of Llama 3.1: `_compute_llama3_parameters` in transformers.
fn llama3(config: &RopeConfig) -> Vec<f64> {
    let RopeScaling::Llama3 {
        factor,
        low,
        high,
        original_context,
    } = config.scaling
    else {
        return Vec::new();
    };
    let context = original_context as f64;
    base_frequencies(config)
        .map(|frequency| {
            let rotations = context * frequency / (2.0 * PI);
            if rotations > high {
                frequency
            } else if rotations < low {
                frequency / factor
            } else {
                let smooth = (rotations - low) / (high - low);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        })
        .collect()
}

/// Frequencies of YaRN: `_compute_yarn_parameters` in transformers.
fn yarn(config: &RopeConfig) -> Vec<f64> {
    let RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        truncate,
        original_context,
        ..
    } = config.scaling
    else {
        return Vec::new();
    };
    let dim = config.dim as f64;
    // The (fractional) index of the frequency with this number
    // of rotations over the original context.
    let index_of = |rotations: f64| {
        dim * (original_context as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln())
    };
    let (mut low, mut high) = (index_of(beta_fast), index_of(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    base_frequencies(config)
        .enumerate()
        .map(|(i, frequency)| {
            let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        })
        .collect()
}

#[cfg(test)]
mod tests;

//! Logits between model and sampler: [`LogitsProcessor`]s change them,
//! [`LogProbs`] report them.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::fmt;

/// Modifier of logits before a token is chosen: a bias, a penalty, a grammar.
pub trait LogitsProcessor: fmt::Debug + Send {
    /// Changes the logits `[vocab]` of the token that follows `history`, prompt included.
    ///
    /// Minus infinity excludes a token. An error ends the request.
    fn process(&mut self, history: &[u32], logits: &mut [f32]) -> Result<()>;
}

/// Bias on the logits of some tokens.
#[derive(Debug, Clone)]
pub struct LogitBias(Vec<(u32, f32)>);

impl LogitBias {
    /// Creates a bias for each of these tokens; ids beyond the vocabulary have no effect.
    ///
    /// Errors (`Argument`): a bias is NaN or plus infinity.
    pub fn new(biases: Vec<(u32, f32)>) -> Result<Self> {
        let is_wild = |&&(_, bias): &&(u32, f32)| bias.is_nan() || bias == f32::INFINITY;
        match biases.iter().find(is_wild) {
            None => Ok(Self(biases)),
            Some((id, bias)) => {
                let message = format!("the bias of token {id} is {bias}, expected a number");
                Err(Error::new(ErrorKind::Argument, message))
            }
        }
    }
}

impl LogitsProcessor for LogitBias {
    fn process(&mut self, _: &[u32], logits: &mut [f32]) -> Result<()> {
        for &(id, bias) in &self.0 {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit += bias;
            }
        }
        Ok(())
    }
}

/// Penalties on the last tokens of a sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Repetition penalty: divides positive logits and multiplies others (CTRL, arXiv
    /// 1909.05858); 1: none.
    pub repetition: f32,
    /// Frequency penalty, subtracted for each occurrence of a token.
    pub frequency: f32,
    /// Presence penalty, subtracted once from tokens that occur.
    pub presence: f32,
    /// Number of last tokens that are penalized, prompt included.
    pub last_n: usize,
}

impl Penalties {
    /// Returns whether no logit changes.
    pub fn are_none(&self) -> bool {
        self.repetition == 1.0 && self.frequency == 0.0 && self.presence == 0.0
    }
}

impl LogitsProcessor for Penalties {
    fn process(&mut self, history: &[u32], logits: &mut [f32]) -> Result<()> {
        let recent = &history[history.len().saturating_sub(self.last_n)..];
        let mut counts: HashMap<u32, f32> = HashMap::new();
        for &id in recent {
            *counts.entry(id).or_default() += 1.0;
        }
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(id as usize) {
                match *logit > 0.0 {
                    true => *logit /= self.repetition,
                    false => *logit *= self.repetition,
                }
                *logit -= self.frequency * count + self.presence;
            }
        }
        Ok(())
    }
}

/// Log-probabilities of a chosen token and of the most probable ones.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LogProbs {
    /// Natural logarithm of the probability of the chosen token.
    pub chosen: f32,
    /// Most probable tokens with their log-probabilities, in descending order; at a tie the lower
    /// id first.
    pub top: Vec<(u32, f32)>,
}

impl LogProbs {
    /// Computes the log-probabilities of token `chosen` and of the `n` most probable ones from
    /// `logits [vocab]`.
    ///
    /// They are those of the model at temperature 1, before any change of the logits. Cost: a pass
    /// over the vocabulary. Errors (`Invalid`): `chosen` is beyond the vocabulary; no logit is
    /// above minus infinity, or one is NaN or plus infinity.
    pub fn new(logits: &[f32], chosen: u32, n: usize) -> Result<Self> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from(l - largest).exp()).sum();
        let log_sum = f64::from(largest) + sum.ln();
        let logit = logits.get(chosen as usize).filter(|_| log_sum.is_finite());
        let &logit = logit.ok_or_else(|| {
            let message = format!("no log-probability of token {chosen} of {}", logits.len());
            Error::new(ErrorKind::Invalid, message)
        })?;
        let log_prob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        let mut top: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        let by_logit = |a: &(u32, f32), b: &(u32, f32)| -> Ordering {
            b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
        };
        if n < top.len() {
            top.select_nth_unstable_by(n, by_logit);
            top.truncate(n);
        }
        top.sort_unstable_by(by_logit);
        top.iter_mut()
            .for_each(|(_, logit)| *logit = log_prob(*logit));
        Ok(Self {
            chosen: log_prob(logit),
            top,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_added_and_excludes() {
        let biases = vec![(1, 2.0), (2, f32::NEG_INFINITY), (99, 1.0)];
        let mut logits = [1.0, 1.0, 1.0];
        let mut bias = LogitBias::new(biases).unwrap();
        bias.process(&[], &mut logits).unwrap();
        assert_eq!(logits, [1.0, 3.0, f32::NEG_INFINITY]);
        for wild in [f32::NAN, f32::INFINITY] {
            let error = LogitBias::new(vec![(0, wild)]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument);
        }
    }

    #[test]
    fn penalties_by_hand() {
        let mut penalties = Penalties {
            repetition: 2.0,
            frequency: 0.25,
            presence: 0.5,
            last_n: 4,
        };
        // Token 3 lies before the last four; token 99 does not exist.
        let history = [3, 0, 0, 1, 99];
        let mut logits = [4.0, -1.0, 1.0, 1.0];
        penalties.process(&history, &mut logits).unwrap();
        assert_eq!(
            logits,
            [4.0 / 2.0 - 2.0 * 0.25 - 0.5, -2.0 - 0.25 - 0.5, 1.0, 1.0]
        );
        let none = Penalties {
            repetition: 1.0,
            frequency: 0.0,
            presence: 0.0,
            last_n: 4,
        };
        assert!(none.are_none() && !penalties.are_none());
    }

    #[test]
    fn log_probabilities_by_hand() {
        let p = [0.1f32, 0.4, 0.3, 0.2];
        // Adding a constant to all logits changes nothing.
        let logits: Vec<f32> = p.iter().map(|p| p.ln() + 7.0).collect();
        let found = LogProbs::new(&logits, 3, 2).unwrap();
        let close = |a: f32, b: f32| (a - b.ln()).abs() < 1e-6;
        assert!(close(found.chosen, 0.2));
        assert_eq!([found.top[0].0, found.top[1].0], [1, 2]);
        assert!(close(found.top[0].1, 0.4) && close(found.top[1].1, 0.3));
        let all = LogProbs::new(&[0.0, f32::NEG_INFINITY, 0.0], 0, 9).unwrap();
        assert_eq!(
            all.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
            [0, 2, 1]
        );
        assert_eq!(all.top[2].1, f32::NEG_INFINITY);
        for bad in [
            &[f32::NEG_INFINITY; 2][..],
            &[f32::NAN, 0.0],
            &[f32::INFINITY, 0.0],
            &[],
        ] {
            let error = LogProbs::new(bad, 0, 1).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        assert!(LogProbs::new(&[0.0], 1, 1).is_err());
    }
}

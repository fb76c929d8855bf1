//! Evaluation of a model on a text: perplexity, and the divergence from a reference.
#![forbid(unsafe_code)]

mod logit_file;
mod reference;
mod windows;

pub use logit_file::LogitFile;
pub use reference::{Computed, EvaluationOptions, Reference};
pub use windows::{Window, Windows};

use crate::error::{Error, ErrorKind, Result};
use rayon::prelude::*;

/// Results of [`evaluate`].
///
/// Averages are over the scored positions; standard errors treat these as independent.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// `exp` of the mean negative log-likelihood of the next token.
    pub perplexity: f64,
    /// Standard error of the perplexity, from the variance over positions.
    pub perplexity_error: f64,
    /// Number of scored positions.
    pub positions: usize,
    /// Comparison, if there is a reference.
    pub comparison: Option<Comparison>,
}

/// Comparison of a model with a reference, on the same positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
    /// Standard error of `reference_perplexity`.
    pub reference_perplexity_error: f64,
    /// Perplexity of the model divided by that of the reference.
    pub perplexity_ratio: f64,
    /// Standard error of `perplexity_ratio`, from the variance of the differences.
    ///
    /// It is far below the errors of the two perplexities.
    pub perplexity_ratio_error: f64,
    /// Mean Kullback-Leibler divergence, reference from model, in nats.
    pub kl_mean: f64,
    /// Standard error of `kl_mean`.
    pub kl_error: f64,
    /// Quantiles of the divergence over the positions: 0.5, 0.9, 0.99 and 1, the maximum.
    ///
    /// Between two positions they are interpolated, as numpy does by default.
    pub kl_quantiles: [f64; 4],
    /// Share of positions at which both rank the same token first, 0 to 1.
    pub top1_agreement: f64,
    /// Standard error of `top1_agreement`.
    pub top1_error: f64,
}

/// Callback after each window with the numbers of finished and of all windows. An error ends
/// the evaluation.
pub type EvaluationProgress<'a> = &'a dyn Fn(usize, usize) -> Result<()>;

/// One scored position.
struct Scored {
    loss: f64,
    reference_loss: f64,
    kl: f64,
    same_top: bool,
}

/// Evaluates `model` on `windows`, against `reference` if there is one.
///
/// `progress` is called after each window. Memory: `4 * scored * vocab` bytes for the logits of
/// each. Errors: `Argument` if the window exceeds the context of the model, a token is not in its
/// vocabulary, or the reference has another vocabulary size; those of the reference, of a session
/// and of `progress`.
pub fn evaluate(
    model: &mut Computed,
    windows: &Windows,
    mut reference: Option<&mut dyn Reference>,
    progress: EvaluationProgress<'_>,
) -> Result<Evaluation> {
    let config = model.model.config();
    windows.check(config)?;
    let vocab = config.vocab_size;
    let compared = reference.is_some();
    let mut scored = Vec::new();
    for window in windows.iter() {
        let logits = model.logits(&window)?;
        let theirs = match &mut reference {
            Some(reference) => Some(reference.logits(&window)?),
            None => None,
        };
        if theirs.as_ref().is_some_and(|t| t.len() != logits.len()) {
            return Err(other_vocabulary());
        }
        let score = |(i, &target): (usize, &u32)| {
            let row = i * vocab..(i + 1) * vocab;
            let theirs = theirs.as_ref().map(|theirs| &theirs[row.clone()]);
            score(&logits[row], theirs, target as usize)
        };
        scored.par_extend(window.targets.par_iter().enumerate().map(score));
        progress(window.index + 1, windows.count())?;
    }
    Ok(summary(&scored, compared))
}

fn other_vocabulary() -> Error {
    Error::new(
        ErrorKind::Argument,
        "the two models have different vocabularies",
    )
}

fn score(logits: &[f32], reference: Option<&[f32]>, target: usize) -> Scored {
    let normalizer = log_sum_exp(logits);
    let loss = normalizer - f64::from(logits[target]);
    let Some(reference) = reference else {
        return Scored {
            loss,
            reference_loss: 0.0,
            kl: 0.0,
            same_top: false,
        };
    };
    let reference_normalizer = log_sum_exp(reference);
    let kl = logits.iter().zip(reference).map(|(&q, &p)| {
        let log_p = f64::from(p) - reference_normalizer;
        log_p.exp() * (log_p - (f64::from(q) - normalizer))
    });
    Scored {
        loss,
        reference_loss: reference_normalizer - f64::from(reference[target]),
        kl: kl.sum(),
        same_top: top(logits) == top(reference),
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits
        .iter()
        .map(|&l| (f64::from(l) - max).exp())
        .sum::<f64>()
        .ln()
}

/// Returns the index of the largest logit, the first among equal ones.
fn top(logits: &[f32]) -> usize {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0)
}

fn summary(scored: &[Scored], compared: bool) -> Evaluation {
    let (loss, loss_error) = mean(scored, |s| s.loss);
    let comparison = || {
        let (reference, reference_error) = mean(scored, |s| s.reference_loss);
        let (difference, difference_error) = mean(scored, |s| s.loss - s.reference_loss);
        let (kl_mean, kl_error) = mean(scored, |s| s.kl);
        let (top1_agreement, top1_error) = mean(scored, |s| f64::from(u8::from(s.same_top)));
        Comparison {
            reference_perplexity: reference.exp(),
            reference_perplexity_error: reference.exp() * reference_error,
            perplexity_ratio: difference.exp(),
            perplexity_ratio_error: difference.exp() * difference_error,
            kl_mean,
            kl_error,
            kl_quantiles: quantiles(scored),
            top1_agreement,
            top1_error,
        }
    };
    Evaluation {
        perplexity: loss.exp(),
        perplexity_error: loss.exp() * loss_error,
        positions: scored.len(),
        comparison: compared.then(comparison),
    }
}

/// Returns [`Comparison::kl_quantiles`].
fn quantiles(scored: &[Scored]) -> [f64; 4] {
    let mut kl: Vec<f64> = scored.iter().map(|s| s.kl).collect();
    kl.sort_by(f64::total_cmp);
    [0.5, 0.9, 0.99, 1.0].map(|share| {
        let place = share * kl.len().saturating_sub(1) as f64;
        let at = |place: f64| kl.get(place as usize).copied().unwrap_or(f64::NAN);
        let (below, above) = (at(place.floor()), at(place.ceil()));
        below + (above - below) * place.fract()
    })
}

/// Returns the mean of a figure and its standard error.
fn mean(scored: &[Scored], figure: fn(&Scored) -> f64) -> (f64, f64) {
    let n = scored.len() as f64;
    let mean = scored.iter().map(figure).sum::<f64>() / n;
    let squares: f64 = scored.iter().map(|s| (figure(s) - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_by_hand() {
        // Probabilities 1/2, 1/4, 1/4 against 1/4, 1/2, 1/4.
        let (model, reference) = ([2f32.ln(), 0.0, 0.0], [0.0, 2f32.ln(), 0.0]);
        let s = score(&model, Some(&reference), 0);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
        assert!(near(s.loss, 2f64.ln()) && near(s.reference_loss, 4f64.ln()));
        assert!(near(s.kl, 0.25 * 0.5f64.ln() + 0.5 * 2f64.ln()) && !s.same_top);
        let same = score(&model, Some(&model), 2);
        assert!(near(same.kl, 0.0) && same.same_top);
        let e = summary(&[s, same], true);
        assert!(near(e.perplexity, (2.0f64 * 4.0).sqrt()), "{e:?}");
        assert_eq!(e.comparison.map(|c| c.top1_agreement), Some(0.5));
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        let of = |kl| Scored {
            loss: 0.0,
            reference_loss: 0.0,
            kl,
            same_top: true,
        };
        // numpy.quantile([3, 1, 4, 1.5, 9], [0.5, 0.9, 0.99, 1])
        let found = quantiles(&[3.0, 1.0, 4.0, 1.5, 9.0].map(of));
        for (found, expected) in found.into_iter().zip([3.0, 7.0, 8.8, 9.0]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
        assert_eq!(quantiles(&[of(2.0)]), [2.0; 4]);
    }
}

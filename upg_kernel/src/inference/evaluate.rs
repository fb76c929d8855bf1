//! How well a model predicts a text: perplexity, and the distance to a reference model.
#![forbid(unsafe_code)]

use super::{CacheType, SessionOptions, UPGModel};
use crate::error::{Error, ErrorKind, Result};
use rayon::prelude::*;

/// What [`evaluate`] measured. Averages are over the scored positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// `exp` of the mean negative log-likelihood of the next token.
    pub perplexity: f64,
    /// Standard error of the perplexity, from the spread over positions.
    pub perplexity_error: f64,
    /// Positions scored.
    pub positions: usize,
    /// Against a reference model only.
    pub comparison: Option<Comparison>,
}

/// A model against a reference, on the same positions.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Perplexity of the reference.
    pub reference_perplexity: f64,
    /// Mean Kullback-Leibler divergence, reference from model, in nats.
    pub kl_mean: f64,
    /// Standard error of `kl_mean`.
    pub kl_error: f64,
    /// Share of positions at which both rank the same token first, 0 to 1.
    pub top1_agreement: f64,
}

/// How to measure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvaluationOptions {
    /// Tokens of a window.
    pub window: usize,
    /// Most windows of the text that are used.
    pub limit: usize,
    /// Positions that are computed at once, as in [`SessionOptions::prefill_chunk`]: 1 measures what
    /// generation computes, token by token.
    pub chunk: usize,
    /// As [`SessionOptions::cache_type`].
    pub cache_type: CacheType,
}

impl Default for EvaluationOptions {
    fn default() -> Self {
        Self {
            window: 512,
            limit: usize::MAX,
            chunk: SessionOptions::default().prefill_chunk,
            cache_type: CacheType::default(),
        }
    }
}

/// Called after each window with how many are done and how many there are.
pub type EvaluationProgress<'a> = &'a dyn Fn(usize, usize);

/// One scored position.
struct Scored {
    loss: f64,
    reference_loss: f64,
    kl: f64,
    same_top: bool,
}

/// Measures `model` on `text`, against `reference` if there is one.
///
/// The text is cut into windows, at most `limit` of them (what is left is not used); each is computed by itself, and the positions of its second half are scored, as
/// llama.cpp's perplexity tool does it: figures at the same window are comparable. A model whose
/// tokenizer begins texts with a token has it put in place of the first token of each window.
/// `progress` is called after each window.
///
/// Memory: `2 * window * vocab` bytes for the logits of each model. Errors: `Argument` if the window
/// is below 4 or beyond the context of a model, the limit 0, the text shorter than a window, or if
/// the two models have vocabularies of different sizes or give different ids; `Missing` if a model
/// has no tokenizer.
pub fn evaluate(
    model: &UPGModel,
    text: &str,
    options: &EvaluationOptions,
    reference: Option<&UPGModel>,
    progress: EvaluationProgress<'_>,
) -> Result<Evaluation> {
    let &EvaluationOptions { window, limit, .. } = options;
    let (tokens, bos) = tokens_of(model, text)?;
    let argument = |message: String| Error::new(ErrorKind::Argument, message);
    if window < 4 || tokens.len() < window || limit == 0 {
        let message = format!(
            "a text of {} tokens has no window of {window}",
            tokens.len()
        );
        return Err(argument(message).hint("use a longer text, and a window from 4 on"));
    }
    for model in [Some(model), reference].into_iter().flatten() {
        let context = model.model().config().context;
        if window > context {
            let message = format!("a window of {window} tokens, the context has {context}");
            return Err(argument(message)
                .at(model.file().path())
                .hint("use a smaller window"));
        }
    }
    if let Some(reference) = reference {
        let vocab = |m: &UPGModel| m.model().config().vocab_size;
        if vocab(model) != vocab(reference) || tokens_of(reference, text)?.0 != tokens {
            return Err(argument(
                "the two models have different vocabularies".into(),
            ));
        }
    }
    let vocab = model.model().config().vocab_size;
    let first = window / 2;
    let windows = limit.min(tokens.len() / window);
    let mut scored = Vec::new();
    for (index, window) in tokens.chunks_exact(window).take(limit).enumerate() {
        let mut input = window.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        let logits = scored_logits(model, &input, first, options)?;
        let reference = reference
            .map(|m| scored_logits(m, &input, first, options))
            .transpose()?;
        let targets = &window[first + 1..];
        scored.par_extend(targets.par_iter().enumerate().map(|(i, &target)| {
            let row = i * vocab..(i + 1) * vocab;
            let reference = reference.as_ref().map(|r| &r[row.clone()]);
            score(&logits[row], reference, target as usize)
        }));
        progress(index + 1, windows);
    }
    Ok(summary(&scored, reference.is_some()))
}

fn tokens_of(model: &UPGModel, text: &str) -> Result<(Vec<u32>, Option<u32>)> {
    let tokenizer = model.tokenizer()?;
    let tokens = tokenizer.encode(text, true)?;
    let bos = tokenizer
        .special_ids()
        .bos
        .filter(|bos| tokens.first() == Some(bos));
    Ok((tokens, bos))
}

/// Logits from position `first` to the last but one.
fn scored_logits(
    model: &UPGModel,
    window: &[u32],
    first: usize,
    options: &EvaluationOptions,
) -> Result<Vec<f32>> {
    let options = SessionOptions {
        context: Some(window.len()),
        prefill_chunk: options.chunk,
        cache_type: options.cache_type,
        ..SessionOptions::default()
    };
    let mut session = model.session(&options)?;
    session.prefill(&window[..first])?;
    session.forward(&window[first..window.len() - 1])
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

/// Index of the largest logit, the first among equal ones.
fn top(logits: &[f32]) -> usize {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0)
}

fn summary(scored: &[Scored], compared: bool) -> Evaluation {
    let n = scored.len() as f64;
    let mean = |value: fn(&Scored) -> f64| scored.iter().map(value).sum::<f64>() / n;
    let error = |value: fn(&Scored) -> f64, mean: f64| {
        let squares: f64 = scored.iter().map(|s| (value(s) - mean).powi(2)).sum();
        (squares / (n - 1.0).max(1.0) / n).sqrt()
    };
    let loss = mean(|s| s.loss);
    let kl = mean(|s| s.kl);
    Evaluation {
        perplexity: loss.exp(),
        perplexity_error: loss.exp() * error(|s| s.loss, loss),
        positions: scored.len(),
        comparison: compared.then(|| Comparison {
            reference_perplexity: mean(|s| s.reference_loss).exp(),
            kl_mean: kl,
            kl_error: error(|s| s.kl, kl),
            top1_agreement: mean(|s| f64::from(u8::from(s.same_top))),
        }),
    }
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
}

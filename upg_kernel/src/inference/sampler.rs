//! Reproducible choice of the next token from logits.
#![forbid(unsafe_code)]

use super::logits::{LogitsProcessor, Penalties};
use crate::error::{Error, ErrorKind, Result};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Options for choosing the next token. The default is greedy.
///
/// The filters act in the order of Hugging Face transformers: penalties, temperature, top-k, top-p,
/// min-p. (llama.cpp applies the temperature last, so that top-p and min-p see the probabilities at
/// temperature 1.)
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divisor of the logits. 0 is greedy: the largest logit, at a tie the lowest id.
    pub temperature: f32,
    /// Number of the largest logits to keep (at a tie the lower ids); 0 keeps all.
    pub top_k: usize,
    /// Total probability of the fewest most probable tokens to keep; 1 keeps all.
    pub top_p: f32,
    /// Minimum probability to keep, relative to the most probable token; 0 keeps all.
    pub min_p: f32,
    /// Repetition penalty: divides positive logits of recent tokens and multiplies others.
    ///
    /// 1 changes nothing. Source: CTRL, arXiv 1909.05858. All penalties apply to greedy choice too.
    pub repetition_penalty: f32,
    /// Frequency penalty, subtracted from the logits of recent tokens
    /// for each occurrence; 0: none.
    pub frequency_penalty: f32,
    /// Presence penalty, subtracted once from the logits of recent tokens; 0: none.
    pub presence_penalty: f32,
    /// Number of last tokens that are penalized, prompt included; 0: none.
    pub repeat_last_n: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repeat_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Checks that every option is in its range. Errors: `Argument`.
    pub fn check(&self) -> Result<()> {
        let rules = [
            (
                "temperature",
                self.temperature,
                self.temperature.is_finite() && self.temperature >= 0.0,
                "a finite number from 0 on",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "from 0 to 1",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0,
                "a finite number above 0",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                self.frequency_penalty.is_finite(),
                "a finite number",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                self.presence_penalty.is_finite(),
                "a finite number",
            ),
        ];
        match rules.into_iter().find(|(_, _, good, _)| !good) {
            None => Ok(()),
            Some((name, found, _, expected)) => Err(Error::new(
                ErrorKind::Argument,
                format!("{name} is {found}, expected {expected}"),
            )),
        }
    }
}

/// Sampler of tokens.
///
/// The same options and logits give the same tokens on every machine whose `exp` rounds alike.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    random: ChaCha8Rng,
    processors: Vec<Box<dyn LogitsProcessor>>,
    /// Logits `[vocab]` after the processors.
    processed: Vec<f32>,
}

/// Token that may be chosen. `weight` is its logit, later its probability times a constant.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Candidate {
    id: u32,
    weight: f64,
}

impl Default for Sampler {
    /// Makes a sampler that chooses the most probable token.
    fn default() -> Self {
        Self::of(SamplingOptions::default())
    }
}

impl Sampler {
    /// Creates a sampler at the start of its random numbers. Errors (`Argument`): an option is
    /// out of range.
    pub fn new(options: SamplingOptions) -> Result<Self> {
        options.check()?;
        Ok(Self::of(options))
    }

    fn of(options: SamplingOptions) -> Self {
        let penalties = Penalties {
            repetition: options.repetition_penalty,
            frequency: options.frequency_penalty,
            presence: options.presence_penalty,
            last_n: options.repeat_last_n,
        };
        let mut processors: Vec<Box<dyn LogitsProcessor>> = Vec::new();
        if !penalties.are_none() {
            processors.push(Box::new(penalties));
        }
        Self {
            processors,
            processed: Vec::new(),
            random: ChaCha8Rng::seed_from_u64(options.seed),
            options,
        }
    }

    /// Adds a processor, which runs after the existing ones and before temperature and filters.
    pub fn with_processor(mut self, processor: Box<dyn LogitsProcessor>) -> Self {
        self.processors.push(processor);
        self
    }

    /// Returns the options.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// Chooses a token from `logits [vocab]`; `history` is the sequence so far, prompt included.
    ///
    /// A logit of minus infinity excludes its token. Cost: a pass over the vocabulary, and a sort
    /// of it if `top_p` is used without `top_k`. Errors (`Invalid`): NaN, plus infinity, or no
    /// token left; those of the processors.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32> {
        check_numbers(logits)?;
        if self.processors.is_empty() {
            return self.choose(logits);
        }
        let mut processed = std::mem::take(&mut self.processed);
        processed.clear();
        processed.extend_from_slice(logits);
        let mut processors = self.processors.iter_mut();
        let result = processors
            .try_for_each(|processor| processor.process(history, &mut processed))
            .and_then(|()| check_numbers(&processed))
            .and_then(|()| self.choose(&processed));
        self.processed = processed;
        result
    }

    /// Chooses a token from validated logits.
    fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if self.options.temperature == 0.0 {
            return largest(logits).ok_or_else(|| nothing_left(logits));
        }
        let candidate = |(id, &logit)| Candidate {
            id,
            weight: f64::from(logit),
        };
        let mut candidates: Vec<_> = (0u32..).zip(logits).map(candidate).collect();
        candidates.retain(|c| c.weight > f64::NEG_INFINITY);
        self.filter(&mut candidates);
        self.draw(&candidates).ok_or_else(|| nothing_left(logits))
    }

    /// Applies temperature, top-k, top-p and min-p.
    ///
    /// Turns logits into probabilities relative to the largest.
    fn filter(&self, candidates: &mut Vec<Candidate>) {
        let options = &self.options;
        if (1..candidates.len()).contains(&options.top_k) {
            candidates.select_nth_unstable_by(options.top_k - 1, more_likely);
            candidates.truncate(options.top_k);
        }
        // Any fixed order works for drawing, but not that of a partial selection.
        match options.top_k > 0 || options.top_p < 1.0 {
            true => candidates.sort_unstable_by(more_likely),
            false => candidates.sort_unstable_by_key(|c| c.id),
        }
        let largest = candidates
            .iter()
            .map(|c| c.weight)
            .fold(f64::NEG_INFINITY, f64::max);
        let temperature = f64::from(options.temperature);
        for candidate in candidates.iter_mut() {
            candidate.weight = ((candidate.weight - largest) / temperature).exp();
        }
        if options.top_p < 1.0 {
            let total: f64 = candidates.iter().map(|c| c.weight).sum();
            let enough = f64::from(options.top_p) * total;
            let mut sum = 0.0;
            let kept = candidates.iter().position(|c| {
                sum += c.weight;
                sum >= enough
            });
            candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
        }
        candidates.retain(|c| c.weight >= f64::from(options.min_p));
    }

    /// Draws a candidate with a probability proportional to its weight.
    fn draw(&mut self, candidates: &[Candidate]) -> Option<u32> {
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        // 53 random bits: a number in [0, 1) that f64 holds exactly.
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for candidate in candidates {
            left -= candidate.weight;
            if left < 0.0 {
                return Some(candidate.id);
            }
        }
        // Rounding left a remainder: take the last candidate with a weight.
        let last = candidates.iter().rev().find(|c| c.weight > 0.0);
        last.map(|c| c.id)
    }
}

/// Returns the index of the largest logit, at a tie the first;
/// `None` if none is above minus infinity.
fn largest(logits: &[f32]) -> Option<u32> {
    // Sixteen at a time, which a compiler vectorizes.
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(logit);
        }
    }
    let all = lanes.iter().chain(rest);
    let largest = all.copied().fold(f32::NEG_INFINITY, f32::max);
    let found = logits.iter().position(|&logit| logit == largest);
    found
        .filter(|_| largest > f32::NEG_INFINITY)
        .and_then(|index| u32::try_from(index).ok())
}

/// Checks the logits. Errors (`Invalid`): one is NaN or plus infinity.
fn check_numbers(logits: &[f32]) -> Result<()> {
    let is_wild = |l: &f32| l.is_nan() || *l == f32::INFINITY;
    // Without an early exit, so that a compiler can vectorize.
    if !logits.iter().fold(false, |wild, l| wild | is_wild(l)) {
        return Ok(());
    }
    match logits.iter().position(is_wild) {
        None => Ok(()),
        Some(id) => Err(Error::new(
            ErrorKind::Invalid,
            format!("the logit of token {id} is {}", logits[id]),
        )
        .hint("the weights of the model are damaged or overflow")),
    }
}

fn nothing_left(logits: &[f32]) -> Error {
    Error::new(
        ErrorKind::Invalid,
        format!("none of {} logits is above minus infinity", logits.len()),
    )
}

/// Orders by larger weight, at a tie by lower id.
fn more_likely(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    // 0.0 and -0.0 are equal logits, but total_cmp alone would distinguish them.
    let (x, y) = (a.weight + 0.0, b.weight + 0.0);
    y.total_cmp(&x).then(a.id.cmp(&b.id))
}

#[cfg(test)]
mod tests;

//! Prefill and decode speed on random token ids, optionally in comparison with llama.cpp.
#![forbid(unsafe_code)]

use super::figure::{Figure, seconds};
use super::llama::Llama;
use crate::cli::MeasureArgs;
use std::sync::Arc;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::{Context, Logits, Sequence, SessionOptions};
use upg_kernel::{Error, ErrorKind, OpenOptions, Result, UPGModel};

/// Maximum number of sequences; each has its own KV cache.
const MOST_SEQUENCES: usize = 1024;

/// Tokens per second of one program.
pub struct Speeds {
    pub prefill: Option<Figure>,
    pub decode: Option<Figure>,
}

/// Results of the measurement.
pub struct Generation<'a> {
    pub speeds: Speeds,
    /// Batched decoding: the number of sequences, and the tokens per second of all of them.
    pub batches: Vec<(usize, Figure)>,
    /// Bytes of weights read per token.
    pub token_bytes: u64,
    pub llamas: Vec<(&'a Llama, Speeds)>,
}

/// Checks the arguments.
///
/// Errors (`Argument`): more positions than the model has, or more than 1,024 sequences.
pub fn check(args: &MeasureArgs, context: usize) -> Result<()> {
    let decoded = match args.generate {
        0 => 0,
        generate => generate.saturating_add(args.depth),
    };
    let counts = [
        (args.prompt_tokens, "--prompt-tokens"),
        (decoded, "--generate and --depth"),
    ];
    if let Some(most) = args.sequences.iter().find(|n| n.get() > MOST_SEQUENCES) {
        let message = format!("{most} sequences at once, expected at most {MOST_SEQUENCES}");
        return Err(Error::new(ErrorKind::Argument, message).hint("make --sequences smaller"));
    }
    match counts.iter().find(|(n, _)| *n > context) {
        None => Ok(()),
        Some((n, options)) => {
            let message = format!("{n} positions are more than the context of {context}");
            Err(Error::new(ErrorKind::Argument, message).hint(format!("make {options} smaller")))
        }
    }
}

/// Measures one repetition of every figure in turn, so that a change of machine speed affects
/// all of them.
pub fn measure<'a>(
    args: &MeasureArgs,
    open: OpenOptions,
    llamas: &'a [Llama],
) -> Result<Generation<'a>> {
    let model = UPGModel::from_file_with(&args.file, open)?;
    let config = model.model().config();
    let vocab = config.vocab_size;
    let longest = args.prompt_tokens.max(args.depth).max(args.generate);
    let ids = random_ids(longest, vocab);
    let (prompt, history) = (&ids[..args.prompt_tokens], &ids[..args.depth]);
    let answer = &ids[..args.generate];
    let mut counts: Vec<_> = args.sequences.iter().map(|count| count.get()).collect();
    counts.sort_unstable();
    counts.dedup();
    let sequences = match answer.is_empty() {
        true => 1,
        false => counts.last().copied().unwrap_or(1),
    };
    let mut context = Context::new(Arc::clone(model.model()), &SessionOptions::default())?;
    let mut sequences: Vec<_> = (0..sequences).map(|_| context.sequence()).collect();

    let mut ours = Samples::default();
    let mut batches: Vec<_> = counts
        .into_iter()
        .map(|count| (count, Vec::new()))
        .collect();
    let mut theirs: Vec<Samples> = llamas.iter().map(|_| Samples::default()).collect();
    // The first round warms up; llama-bench warms up by itself each time.
    for round in 0..=args.repetitions.get() {
        let counts = round > 0;
        if !prompt.is_empty() {
            let rate = prefill(&mut context, &mut sequences[0], prompt)?;
            ours.prefill.extend(counts.then_some(rate));
            for (llama, samples) in llamas.iter().zip(&mut theirs).filter(|_| counts) {
                samples.prefill.push(llama.prefill(prompt.len())?);
            }
        }
        if !answer.is_empty() {
            let rate = decode(&mut context, &mut sequences[..1], history, answer)?;
            ours.decode.extend(counts.then_some(rate));
            for (count, rates) in &mut batches {
                let rate = decode(&mut context, &mut sequences[..*count], history, answer)?;
                rates.extend(counts.then_some(rate));
            }
            for (llama, samples) in llamas.iter().zip(&mut theirs).filter(|_| counts) {
                samples.decode.push(llama.decode(answer.len(), args.depth)?);
            }
        }
    }
    batches.retain(|(_, rates)| !rates.is_empty());
    Ok(Generation {
        speeds: ours.speeds(),
        batches: batches
            .into_iter()
            .map(|(count, rates)| (count, Figure::of(rates)))
            .collect(),
        token_bytes: token_bytes(model.file(), config.tie_word_embeddings, vocab),
        llamas: llamas
            .iter()
            .zip(theirs.into_iter().map(Samples::speeds))
            .collect(),
    })
}

/// Tokens per second, one value per repetition.
#[derive(Default)]
struct Samples {
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

impl Samples {
    fn speeds(self) -> Speeds {
        let figure = |values: Vec<f64>| (!values.is_empty()).then(|| Figure::of(values));
        Speeds {
            prefill: figure(self.prefill),
            decode: figure(self.decode),
        }
    }
}

/// Measures the tokens per second of a prompt, from an empty cache.
fn prefill(context: &mut Context, sequence: &mut Sequence, prompt: &[u32]) -> Result<f64> {
    sequence.truncate(0);
    let mut logits = Vec::new();
    let parts = &mut [(sequence, prompt)];
    let took = seconds(|| context.extend(parts, Logits::Last, &mut logits))?;
    Ok(prompt.len() as f64 / took)
}

/// Measures the tokens per second of all sequences together.
///
/// They decode `answer` token by token in the same passes. Each first gets its own `history`, which
/// is not timed.
fn decode(
    context: &mut Context,
    sequences: &mut [Sequence],
    history: &[u32],
    answer: &[u32],
) -> Result<f64> {
    let mut logits = Vec::new();
    for sequence in &mut *sequences {
        // The ids already in the cache are the same.
        sequence.truncate(history.len());
        let missing = &history[sequence.tokens().len()..];
        if !missing.is_empty() {
            context.extend(&mut [(sequence, missing)], Logits::Last, &mut logits)?;
        }
    }
    let mut steps = answer.chunks(1);
    let count = answer.len() * sequences.len();
    let took = seconds(|| {
        steps.try_for_each(|id| {
            let mut parts: Vec<_> = sequences
                .iter_mut()
                .map(|sequence| (sequence, id))
                .collect();
            context.extend(&mut parts, Logits::Last, &mut logits)
        })
    })?;
    Ok(count as f64 / took)
}

/// Returns pseudorandom token ids that are the same in every run (splitmix64).
fn random_ids(count: usize, vocab: usize) -> Vec<u32> {
    let id = |i: usize| {
        let mut z = (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % vocab as u64) as u32
    };
    (0..count).map(id).collect()
}

/// Returns the bytes of weights that a token reads.
///
/// Counts every tensor once, except that an embedding that is not also the output head counts as
/// one row, and an unused head as nothing.
fn token_bytes(file: &UpgFile, tied: bool, vocab: usize) -> u64 {
    let layers = file.layers().iter().enumerate();
    let layers = layers.map(|(id, layer)| (layer.name.as_str(), file.layer_bytes(id)));
    let kept = file.kept().map(|(name, ..)| {
        let bytes = file.bytes(name).map_or(0, |b| b.len() as u64);
        (name, bytes)
    });
    let of_tensor = |(name, bytes): (&str, u64)| match name {
        "model.embed_tokens.weight" if !tied => bytes / vocab as u64,
        "lm_head.weight" if tied => 0,
        _ => bytes,
    };
    layers.chain(kept).map(of_tensor).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_are_in_the_vocabulary_and_spread() {
        let ids = random_ids(10_000, 100);
        assert!(ids.iter().all(|&id| id < 100));
        for id in 0..100 {
            // Expected count: 100, with a standard deviation of 10.
            let count = ids.iter().filter(|&&found| found == id).count();
            assert!((1..200).contains(&count), "{id}: {count}");
        }
    }
}

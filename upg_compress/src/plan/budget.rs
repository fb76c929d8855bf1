//! Encodings under a budget: more bits for the most sensitive matrices.
//!
//! The divergence that the errors of all matrices cause is approximated by a sum over the matrices,
//! each by its [`Curvature`](crate::sensitivity::Curvature) to second order. The sensitivity of a
//! matrix is the divergence if every row had independent errors as large as itself, compensated by
//! later rows and columns. An encoding costs the sensitivity times the square of its relative
//! error, which is about the same for all matrices. Starting from the fewest bits, the matrix with
//! the largest gain per byte gets more, until nothing fits any more.
#![forbid(unsafe_code)]

use crate::encode::rotation::rotation;
use crate::encode::trellis::SQUARED_ERRORS;
use crate::plan::options::Budget;
use crate::plan::options::{Choice, CompressOptions, is_calibrated};
use crate::plan::sizes::{array_bytes, file_bytes};
use crate::plan::tensors::{Plan, describe_layer};
use crate::progress::Progress;
use crate::sensitivity::calibrator::Calibrator;
use crate::source::{Source, TensorInfo};
use std::collections::BTreeMap;
use upg_kernel::format::{Encoding, LayerInfo, TENSOR_ALIGNMENT};
use upg_kernel::inference::LayerInput;
use upg_kernel::{Error, ErrorKind, Result};

/// Mixed encodings, from few bits to many, with the square of their relative error.
///
/// The errors are those of matrices of SmolLM2 without a calibration (`upg inspect`); no matrix
/// deviated by more than a tenth.
const LADDER: [(Encoding, f64); 4] = [
    (Encoding::T2, SQUARED_ERRORS[0]),
    (Encoding::T3, SQUARED_ERRORS[1]),
    (Encoding::T4, SQUARED_ERRORS[2]),
    (Encoding::Q8, 0.000_026),
];

/// Number of sequences for the measurement of sensitivities.
///
/// Sensitivities are sums over whole matrices and need no more.
const SEQUENCES: usize = 8;

/// Maximum growth in bytes of the list of layers if one of them gets another encoding.
const HEADER_ROOM: u64 = 64;

/// Matrix whose encoding is chosen.
struct Candidate {
    name: String,
    /// Divergence of all positions together, in nats, for a relative error of 1.
    sensitivity: f64,
    /// Bytes with each encoding of the ladder.
    bytes: [u64; LADDER.len()],
    /// Index of its encoding on the ladder.
    rung: usize,
}

impl Candidate {
    fn new(tensor: &TensorInfo, group: Option<usize>, sensitivity: f64) -> Result<Self> {
        let mut bytes = [0; LADDER.len()];
        for (bytes, (encoding, _)) in bytes.iter_mut().zip(LADDER) {
            *bytes = aligned(describe_layer(tensor, encoding, group).array_bytes()?);
        }
        Ok(Self {
            name: tensor.name.clone(),
            sensitivity,
            bytes,
            rung: 0,
        })
    }

    /// Returns the gain per byte of the next rung, and its additional bytes; `None` at the top.
    fn step(&self) -> Option<(f64, u64)> {
        let (_, error) = LADDER[self.rung];
        let (_, smaller) = LADDER.get(self.rung + 1)?;
        let bytes = self.bytes[self.rung + 1].saturating_sub(self.bytes[self.rung]);
        let gain = self.sensitivity * (error - smaller);
        Some((gain / bytes.max(1) as f64, bytes))
    }
}

/// Returns the total bytes of arrays, each with the padding before the next one.
fn aligned(arrays: Vec<u64>) -> u64 {
    let arrays = arrays.into_iter();
    arrays.map(|n| n.next_multiple_of(TENSOR_ALIGNMENT)).sum()
}

/// Smallest file that the options allow.
struct Least {
    /// Options of that file.
    options: CompressOptions,
    plan: Plan,
    file_bytes: u64,
    /// Bytes of the file with the most bits for every matrix.
    largest: u64,
    /// Bytes of the matrices of the blocks.
    blocks: u64,
    weights: u64,
}

impl Least {
    fn new(source: &dyn Source, options: &CompressOptions, budget: Budget) -> Result<Self> {
        let of = |encoding, embedding| -> Result<(CompressOptions, Plan, u64)> {
            let mut options = options.clone();
            options.encoding = Choice::Encode(encoding);
            options.embedding = embedding;
            let plan = Plan::new(source, &options)?;
            let bytes = file_bytes(source, &options, &plan)?;
            Ok((options, plan, bytes))
        };
        let embedding = match (options.embedding, budget) {
            (Some(embedding), _) => Some(embedding),
            // With 8 bits, if this leaves 3 bits for the blocks.
            (None, Budget::File(most)) => {
                let large = Some(Choice::Encode(Encoding::Q8));
                let fits = of(Encoding::T3, large)?.2 <= most;
                if fits { large } else { None }
            }
            (None, Budget::Blocks(_)) => None,
        };
        let embedding = of(budget.encoding(), embedding)?.1.embedding;
        let (_, _, largest) = of(LADDER[LADDER.len() - 1].0, Some(embedding))?;
        let (options, plan, file_bytes) = of(LADDER[0].0, Some(embedding))?;
        let (mut blocks, mut weights) = (0, 0);
        for planned in &plan.tensors {
            let tensor = &source.tensors()[planned.index];
            if LayerInput::of(&tensor.name).is_some() {
                blocks += aligned(array_bytes(source, planned)?);
                weights += tensor.weights() as u64;
            }
        }
        Ok(Self {
            options,
            plan,
            file_bytes,
            largest,
            blocks,
            weights,
        })
    }

    /// Returns the bytes of a budget beyond these. Errors (`Argument`): the budget is smaller.
    fn left(&self, budget: Budget) -> Result<u64> {
        let left = match budget {
            Budget::Blocks(bits) => {
                ((bits * self.weights as f64 / 8.0) as u64).checked_sub(self.blocks)
            }
            Budget::File(most) => most.checked_sub(self.file_bytes + self.header_room()),
        };
        left.ok_or_else(|| {
            let message = format!(
                "the budget is too small: with {} for all matrices of the blocks they have {:.3} bits per weight, the file {:.1} MB",
                LADDER[0].0,
                8.0 * self.blocks as f64 / self.weights as f64,
                self.file_bytes as f64 / 1e6
            );
            Error::new(ErrorKind::Argument, message)
                .hint("allow more, or name an encoding of fewer bits for the embedding")
        })
    }

    fn header_room(&self) -> u64 {
        HEADER_ROOM * self.plan.tensors.len() as u64
    }
}

/// Returns an upper bound for the bytes of the file under a budget.
///
/// Errors: those of the plan; `Argument` if the budget is too small for the fewest bits.
pub(crate) fn most_bytes(
    source: &dyn Source,
    options: &CompressOptions,
    budget: Budget,
) -> Result<u64> {
    let least = Least::new(source, options, budget)?;
    let all = least.file_bytes + least.left(budget)?;
    Ok(all.min(least.largest) + least.header_room())
}

/// Returns `options` with an encoding for each matrix of the blocks that no pattern names.
///
/// Cost: a forward and a backward pass over 8 sequences of the calibration, and
/// [`Feedback::new`](crate::sensitivity::Feedback::new) for each matrix. Errors: `Argument` without
/// a calibration, or if the budget is too small for the fewest bits; those of the source and of
/// [`Calibrator`]; `Interrupted`.
pub(crate) fn choose_encodings(
    source: &dyn Source,
    options: &CompressOptions,
    budget: Budget,
    progress: &dyn Progress,
) -> Result<CompressOptions> {
    let least = Least::new(source, options, budget)?;
    let left = least.left(budget)?;
    let Least {
        mut options, plan, ..
    } = least;
    let mut candidates = candidates(source, &options, &plan, progress)?;
    spend(&mut candidates, left);
    let chosen = candidates.into_iter();
    options.choices = chosen.map(|c| (c.name, LADDER[c.rung].0)).collect();
    Ok(options)
}

/// Returns the matrices that the budget decides on, with their sensitivities.
fn candidates(
    source: &dyn Source,
    options: &CompressOptions,
    plan: &Plan,
    progress: &dyn Progress,
) -> Result<Vec<Candidate>> {
    let Some(calibration) = &options.calibration else {
        let message = "a budget without a calibration text, which shows where bits are needed";
        return Err(Error::new(ErrorKind::Argument, message).hint("add --calibrate"));
    };
    let mut calibrator = Calibrator::new(source, &calibration.first(SEQUENCES), progress)?;
    let mut candidates = Vec::new();
    for planned in &plan.tensors {
        let tensor = &source.tensors()[planned.index];
        if !planned.layer.as_ref().is_some_and(is_calibrated) || options.is_named(&tensor.name) {
            continue;
        }
        progress.tensor(&tensor.name);
        if let Some(curvature) = calibrator.curvature(&tensor.name, progress)? {
            let weights = source.read_f32(planned.index)?;
            let sensitivity = rotation(tensor.cols(), options.seed)
                .and_then(|rotation| curvature.sensitivity(&weights, &rotation))
                .map_err(|e| e.tensor(&tensor.name))?;
            candidates.push(Candidate::new(tensor, options.group, sensitivity)?);
        }
    }
    Ok(candidates)
}

/// Raises candidates as long as `left` bytes allow it.
fn spend(candidates: &mut [Candidate], mut left: u64) {
    loop {
        let steps = candidates.iter().enumerate().filter_map(|(i, candidate)| {
            let (gain, bytes) = candidate.step()?;
            (bytes <= left).then_some((i, gain, bytes))
        });
        // The first at a tie, so that the choice is the same everywhere.
        let best = steps.max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)));
        let Some((i, _, bytes)) = best else { break };
        candidates[i].rung += 1;
        left -= bytes;
    }
}

/// Counts the matrices of the blocks by the name of their encoding.
pub fn count_encodings(layers: &[LayerInfo]) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for layer in layers.iter().filter(|l| LayerInput::of(&l.name).is_some()) {
        *counts.entry(layer.encoding_name()).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, sensitivity: f64, bytes: [u64; 4]) -> Candidate {
        Candidate {
            name: name.into(),
            sensitivity,
            bytes,
            rung: 0,
        }
    }

    /// Compared with all ways to spend, where steps have equal sizes and gains decrease, so that
    /// the greedy way is optimal.
    #[test]
    fn what_gains_most_for_its_bytes_comes_first() {
        let bytes = [2, 3, 4, 5].map(|n| n * 100);
        let sensitivities = [1.0, 5.0, 0.2, 30.0];
        let cost = |rungs: &[usize]| -> f64 {
            let pairs = rungs.iter().zip(sensitivities);
            pairs.map(|(&rung, s)| LADDER[rung].1 * s).sum()
        };
        for steps in 0..=12 {
            let mut candidates = sensitivities.map(|s| candidate("a", s, bytes));
            spend(&mut candidates, steps * 100 + 50);
            let rungs: Vec<usize> = candidates.iter().map(|c| c.rung).collect();
            assert_eq!(rungs.iter().sum::<usize>(), steps as usize);
            let all = (0..256).map(|i| [i % 4, i / 4 % 4, i / 16 % 4, i / 64]);
            let allowed = all.filter(|r| r.iter().sum::<usize>() <= steps as usize);
            let best = allowed.map(|r| cost(&r)).fold(f64::INFINITY, f64::min);
            assert!((cost(&rungs) - best).abs() < 1e-12, "{rungs:?}");
        }
    }

    #[test]
    fn a_step_that_does_not_fit_leaves_room_for_smaller_ones() {
        let mut candidates = [
            candidate("large", 9.0, [1000, 2000, 3000, 4000]),
            candidate("small", 0.1, [10, 20, 30, 40]),
        ];
        spend(&mut candidates, 25);
        assert_eq!(candidates.each_ref().map(|c| c.rung), [0, 2]);
        spend(&mut candidates, 0);
        assert_eq!(candidates.each_ref().map(|c| c.rung), [0, 2]);
    }
}

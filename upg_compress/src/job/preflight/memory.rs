//! The most memory that compressing takes.
#![forbid(unsafe_code)]

use crate::job::parallel::TensorBatch;
use crate::plan::options::CompressOptions;
use crate::plan::tensors::Plan;
use crate::sensitivity::calibration::Calibration;
use crate::sensitivity::curvature::PANEL_ROWS;
use crate::source::Source;
use std::collections::BTreeMap;
use upg_kernel::Result;
use upg_kernel::inference::{Input, ModelConfig, POSITIONS_TOGETHER};

/// Bytes of the program, its tables, its threads and freed memory that the allocator keeps.
const BASE: u64 = 60_000_000;

/// Most bytes that the allocator keeps of the arrays that come and go in a calibration; it gives
/// larger ones back.
///
/// Measured: of a small model as much as its own memory again, with sensitivities 2.5 times as
/// much.
const MOST_KEPT: u64 = 1 << 30;

/// Bytes of a tokenizer in memory for each byte of its `tokenizer.json`.
const TOKENIZER_FACTOR: u64 = 40;

const F32: u64 = 4;

/// Peak memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryEstimate {
    /// Memory that the process allocates.
    pub own: u64,
    /// Mapped pages of the source that it has read.
    ///
    /// The system counts them too, but takes them away when it needs them. A source that was read
    /// into memory stays there; what the system has left is then counted without it.
    pub mapped: u64,
}

impl MemoryEstimate {
    pub(super) fn of(source: &dyn Source, options: &CompressOptions, plan: &Plan) -> Result<Self> {
        let files = source.own_files();
        let mapped = files.iter().filter_map(|path| std::fs::metadata(path).ok());
        let texts = source.files().tokenizer_json.as_ref();
        let texts = texts.map_or(0, |json| json.len() as u64);
        let mut all = 0;
        let held = match &options.calibration {
            Some(calibration) => held(source, &source.files().config()?, calibration),
            None => Held::default(),
        };
        for batch in TensorBatch::all(source, options, &plan.tensors)? {
            let names = batch
                .tensors
                .iter()
                .map(|t| &source.tensors()[t.index].name);
            let of_held = names.map(|name| held.while_encoding(name)).max();
            all = all.max(batch.bytes + of_held.unwrap_or(0));
        }
        all = all.max(held.start).max(held.pass);
        // Sensitivities are a run before the run.
        let kept = match (&options.calibration, options.budget) {
            (None, _) => 0,
            (Some(_), None) => all,
            (Some(_), Some(_)) => all * 5 / 2,
        };
        let all = all + kept.min(MOST_KEPT);
        let tokenizer = match options.calibration {
            Some(_) => texts * TOKENIZER_FACTOR,
            None => texts,
        };
        Ok(Self {
            own: BASE + tokenizer + all,
            mapped: mapped.map(|m| m.len()).sum(),
        })
    }
}

/// Memory that a calibration holds.
#[derive(Default)]
struct Held {
    /// Bytes before the first layer.
    start: u64,
    /// Bytes while a layer is passed.
    pass: u64,
    /// Bytes while a matrix is encoded, from the first calibrated one on.
    later: u64,
}

impl Held {
    fn while_encoding(&self, name: &str) -> u64 {
        match name.starts_with("model.embed_tokens.") {
            true => 0,
            false => self.later,
        }
    }
}

fn held(source: &dyn Source, config: &ModelConfig, calibration: &Calibration) -> Held {
    let hidden = config.hidden_size as u64;
    let (query, kv) = (config.query_size() as u64, config.kv_size() as u64);
    let inner = config.intermediate_size as u64;
    let window = calibration.window() as u64;
    let positions = (POSITIONS_TOGETHER as u64 / window).max(1) * window;
    let positions = positions.min(calibration.tokens().len() as u64);
    let states = F32 * hidden * calibration.tokens().len() as u64;
    // Backwards: hidden states and what norms make of them, with gradients; queries, keys and
    // values three times, gate and up once, what becomes of them; inputs and gradients of one
    // matrix, and those once more as they are weighed.
    let wide = query + 2 * kv;
    let workspace =
        F32 * positions * (6 * hidden + 3 * wide + 2 * query + 3 * inner + 4 * wide.max(2 * inner));
    // Probabilities of attention, and their gradients.
    let threads = rayon::current_num_threads() as u64;
    let workspace = workspace + threads * 2 * F32 * window * window;
    let mut weights: BTreeMap<usize, u64> = BTreeMap::new();
    for tensor in source.tensors() {
        if let Some((layer, _)) = Input::of(&tensor.name) {
            *weights.entry(layer).or_default() += tensor.weights() as u64;
        }
    }
    let layer = F32 * weights.values().copied().max().unwrap_or(0);
    // Of every matrix of a layer by itself, where the family does not fuse them.
    let panels = |rows: u64| rows * rows.min(PANEL_ROWS as u64);
    let squares = 5 * hidden * hidden + query * query + inner * inner;
    let squares = squares + panels(wide) + 2 * panels(hidden) + 2 * panels(inner);
    // Gradients, and the hidden states before a layer.
    let later = 2 * states + workspace + F32 * squares;
    Held {
        // Also the head, as it is and as f32, and logits of 256 positions.
        start: 2 * states + F32 * config.vocab_size as u64 * (2 * hidden + 256),
        // Fused matrices are put together of their parts: both are there for a moment.
        // On the way back one matrix is there once more.
        pass: later + 2 * layer,
        later,
    }
}

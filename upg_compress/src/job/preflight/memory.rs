//! Peak memory of a compression.
#![forbid(unsafe_code)]

use crate::job::parallel::TensorBatch;
use crate::plan::options::CompressOptions;
use crate::plan::tensors::Plan;
use crate::sensitivity::calibration::Calibration;
use crate::sensitivity::curvature::PANEL_ROWS;
use crate::source::Source;
use std::collections::BTreeMap;
use upg_kernel::Result;
use upg_kernel::inference::{LayerInput, ModelConfig, POSITIONS_TOGETHER};

/// Bytes of the program, its tables, its threads and freed memory that the allocator keeps.
const BASE: u64 = 60_000_000;

/// Maximum bytes of a calibration's temporary arrays that the allocator keeps.
///
/// It returns larger arrays to the system. Measured with a small model: as much again as its own
/// memory, and 2.5 times as much with sensitivities.
const MOST_KEPT: u64 = 1 << 30;

/// Memory of a tokenizer per byte of its `tokenizer.json`.
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
    /// The system counts them too, but reclaims them when needed. A source that was read into
    /// memory stays there; the available memory is then counted without it.
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
        // Sensitivities are measured in an additional run before.
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

/// Memory held by a calibration.
#[derive(Default)]
struct Held {
    /// Bytes before the first layer.
    start: u64,
    /// Bytes during the pass of a layer.
    pass: u64,
    /// Bytes during the encoding of a matrix, from the first calibrated one on.
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
    // Backward pass: hidden states and norm outputs, with gradients; queries, keys and values three
    // times, gate and up once, and their results; inputs and gradients of one matrix, and a
    // weighted copy of these.
    let wide = query + 2 * kv;
    let workspace =
        F32 * positions * (6 * hidden + 3 * wide + 2 * query + 3 * inner + 4 * wide.max(2 * inner));
    // Attention probabilities and their gradients.
    let threads = rayon::current_num_threads() as u64;
    let workspace = workspace + threads * 2 * F32 * window * window;
    let mut weights: BTreeMap<usize, u64> = BTreeMap::new();
    for tensor in source.tensors() {
        if let Some((layer, _)) = LayerInput::of(&tensor.name) {
            *weights.entry(layer).or_default() += tensor.weights() as u64;
        }
    }
    let layer = F32 * weights.values().copied().max().unwrap_or(0);
    // For every matrix of a layer separately, if the family does not fuse them.
    let panels = |rows: u64| rows * rows.min(PANEL_ROWS as u64);
    let squares = 5 * hidden * hidden + query * query + inner * inner;
    let squares = squares + panels(wide) + 2 * panels(hidden) + 2 * panels(inner);
    // Gradients, and the hidden states before a layer.
    let later = 2 * states + workspace + F32 * squares;
    Held {
        // Also the head, as stored and as f32, and logits of 256 positions.
        start: 2 * states + F32 * config.vocab_size as u64 * (2 * hidden + 256),
        // Fused matrices are concatenated from their parts, which briefly exist too. The backward
        // pass has one more copy of a matrix.
        pass: later + 2 * layer,
        later,
    }
}

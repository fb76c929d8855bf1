//! Tiny random models of every family, with the results of transformers.

use super::data::data;
use safetensors::SafeTensors;
use std::path::PathBuf;
use upg_kernel::inference::{CacheType, SessionOptions};

/// Returns the values of a tensor, which may be unaligned.
pub(crate) fn collect<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    let values = bytes.chunks_exact(size_of::<T>());
    values.map(bytemuck::pod_read_unaligned).collect()
}

/// Folders of `tests/data/tiny-models`, each with the folder of its weights.
pub(crate) const MODELS: [(&str, &str); 11] = [
    ("llama-bias", "llama-bias"),
    ("llama3-rope", "llama3-rope"),
    ("mistral", "mistral"),
    ("mistral-linear", "mistral"),
    ("phi3", "phi3"),
    ("phi3-window", "phi3"),
    ("phi4-mini-longrope", "phi4-mini-longrope"),
    ("qwen2", "qwen2"),
    ("qwen2-yarn-window", "qwen2"),
    ("qwen3", "qwen3"),
    ("qwen3-layer-types", "qwen3"),
];

/// Returns a file of a tiny model.
pub(crate) fn model_file(folder: &str, file: &str) -> PathBuf {
    data("tiny-models").join(folder).join(file)
}

/// Prompt, the logits of its last positions, and its greedy continuation.
pub(crate) struct Case {
    pub(crate) prompt: Vec<u32>,
    pub(crate) logits: Vec<f32>,
    pub(crate) greedy: Vec<u32>,
}

/// Reads the four cases of a tiny model: prompts of 1, 7, 24 and 80 tokens.
pub(crate) fn cases(name: &str) -> Vec<Case> {
    let bytes = std::fs::read(model_file(name, "expected.safetensors")).expect("a readable file");
    let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = |name: &str| file.tensor(name).expect("a tensor").data();
    let ids = |name: &str| -> Vec<u32> {
        let values: Vec<i64> = collect(tensor(name));
        values.into_iter().map(|v| v as u32).collect()
    };
    (0..4)
        .map(|i| Case {
            prompt: ids(&format!("case{i}.input_ids")),
            logits: collect(tensor(&format!("case{i}.logits"))),
            greedy: ids(&format!("case{i}.greedy")),
        })
        .collect()
}

/// Returns the largest absolute difference; NaN if any value is NaN.
pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    // NaN must not get lost in `max`.
    differences.fold(0.0, |m, d| if d.is_nan() { d } else { m.max(d) })
}

/// Returns options with unrounded keys and values, as the reference has them.
pub(crate) fn exact() -> SessionOptions {
    SessionOptions {
        cache_type: CacheType::F32,
        ..SessionOptions::default()
    }
}

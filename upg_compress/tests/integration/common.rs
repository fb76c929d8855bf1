//! Helpers of these tests.

#[path = "../../../upg_kernel/tests/common/answer.rs"]
mod answer;
#[path = "../../../upg_kernel/tests/common/data.rs"]
mod data;
#[path = "../../../upg_kernel/tests/common/models.rs"]
mod models;
#[path = "../../../upg_kernel/tests/common/tiny.rs"]
mod tiny;

pub(crate) use answer::answer;
pub(crate) use data::data;
pub(crate) use models::{copy_model, smollm2_gguf};
pub(crate) use tiny::{Case, MODELS, cases, exact, largest_difference, model_file};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::Value;
use upg_compress::{Calibration, Progress};
use upg_kernel::format::{Encoding, LayerInfo, UpgFile};

/// Reads a JSON file of the test data.
pub(crate) fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(data(name)).unwrap()).unwrap()
}

/// Reads the recipe in a file.
pub(crate) fn recipe(file: &UpgFile) -> Value {
    serde_json::from_str(file.metadata("recipe").unwrap()).unwrap()
}

/// Cuts the longest prompt of a tiny model into sequences of 24 tokens: three of them.
pub(crate) fn calibration(name: &str) -> Calibration {
    let prompt = cases(name).pop().unwrap().prompt;
    Calibration::new(prompt, 24).unwrap()
}

/// Returns the description of a matrix, with the default group of its encoding.
pub(crate) fn layer(name: &str, rows: usize, cols: usize, encoding: Encoding) -> LayerInfo {
    let mut layer = LayerInfo::new(name, rows, cols, encoding);
    layer.group = match encoding {
        Encoding::Q4 => Some(32),
        Encoding::Q8 | Encoding::S8 | Encoding::S4 => Some(64),
        _ => None,
    };
    layer
}

/// Returns `n` Gaussian values (Box-Muller) of a fixed stream.
pub(crate) fn gaussian(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / 4_294_967_296.0;
    let values = (0..n).map(|_| {
        let (u, v) = (uniform(), uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    });
    values.collect()
}

/// Returns `|found - expected| / |expected|` in the Frobenius norm.
pub(crate) fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    let error: f64 = pairs
        .map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|&b| f64::from(b).powi(2)).sum();
    (error / norm).sqrt()
}

/// Progress of work that is cancelled from its start.
pub(crate) struct Stopped;

impl Progress for Stopped {
    fn is_cancelled(&self) -> bool {
        true
    }
}

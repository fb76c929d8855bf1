//! Helpers of these tests.

#[path = "../common/answer.rs"]
mod answer;
#[path = "../common/data.rs"]
mod data;
#[path = "../common/dense.rs"]
mod dense;
#[path = "../common/tiny.rs"]
mod tiny;

pub(crate) use answer::answer;
#[cfg(all(feature = "candle", feature = "text", feature = "v1"))]
pub(crate) use data::data;
pub(crate) use dense::{DenseSource, LOGIT_TOLERANCE, config, source};
#[cfg(all(feature = "candle", feature = "text", feature = "v1"))]
pub(crate) use tiny::collect;
pub(crate) use tiny::{MODELS, cases, exact, largest_difference};

use std::sync::Arc;
use upg_kernel::inference::{Model, Session};

/// Tolerance for the same arithmetic in other pieces.
///
/// Products with one and with many vectors add up in another order. Measured: 3e-6.
pub(crate) const CUT_TOLERANCE: f32 = 2e-5;

/// Loads a tiny model.
pub(crate) fn model(name: &str) -> Arc<Model> {
    let (_, weights) = MODELS.iter().find(|m| m.0 == name).expect("a known model");
    Arc::new(Model::load(config(name), &source(weights)).expect("a good model"))
}

/// Creates a session that rounds no keys and values.
pub(crate) fn session(model: &Arc<Model>) -> Session {
    Session::new(Arc::clone(model), &exact()).expect("a session")
}

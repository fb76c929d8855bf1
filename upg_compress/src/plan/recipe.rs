//! Metadata of a file, including the recipe by which it was made.
#![forbid(unsafe_code)]

use super::options::{Budget, CompressOptions};
use super::tensors::Plan;
use crate::sensitivity::calibration::Calibration;
use crate::source::Source;
use serde_json::json;
use std::collections::BTreeMap;
use upg_kernel::format::reserve_figures;

/// Metadata key of the chosen options.
pub(crate) const RECIPE: &str = "recipe";

/// Returns the metadata of the file, including the recipe.
///
/// Room is reserved for figures that are known only at the end.
pub(crate) fn metadata(
    source: &dyn Source,
    options: &CompressOptions,
    plan: &Plan,
) -> BTreeMap<String, String> {
    let recipe = json!({
        "tool": concat!("upg ", env!("CARGO_PKG_VERSION")),
        "encoding": match options.budget {
            Some(_) => "mixed".to_owned(),
            None => options.encoding.to_string(),
        },
        "budget": options.budget.map(Budget::to_json),
        "embedding": plan.embedding.to_string(),
        "overrides": options.overrides.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "seed": options.seed,
        "sparse": options.sparse.to_string(),
        "prune": options.prune,
        "calibration": options.calibration.as_ref().map(Calibration::to_json),
    });
    let mut metadata = source.files().metadata();
    metadata.insert("model".to_owned(), source.model_name().to_owned());
    metadata.insert(RECIPE.to_owned(), recipe.to_string());
    reserve_figures(&mut metadata);
    metadata
}

//! Writer of the tuned model as a new file.
#![forbid(unsafe_code)]

use super::student::Student;
use crate::encode::matrix::relative_error;
use crate::plan::recipe::RECIPE;
use crate::progress::Progress;
use crate::source::Source;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use upg_kernel::Result;
use upg_kernel::format::json;
use upg_kernel::format::{
    FileWriter, LayerInfo, TOKENIZER, UpgFile, header_capacity, insert_figures, reserve_figures,
};
use upg_kernel::inference::WeightSource;
use upg_kernel::support::AtomicFile;

/// Writes the tuned file with newly measured errors.
/// Returns its bytes and the weights of the model.
pub(super) fn write(
    student: &Student<'_>,
    source: &dyn Source,
    out: AtomicFile,
    tuned: Value,
    progress: &dyn Progress,
) -> Result<(u64, u64)> {
    let file = student.file;
    // Their errors are measured again.
    let mut layers: Vec<LayerInfo> = file.layers().to_vec();
    layers.iter_mut().for_each(|layer| layer.error = None);
    let mut metadata = file.all_metadata().clone();
    // The writer computes these itself.
    for key in ["layers", "checksums"] {
        metadata.remove(key);
    }
    metadata.insert(RECIPE.to_owned(), recipe(file, tuned));
    reserve_figures(&mut metadata);
    let names = file.kept().map(|(name, ..)| name).chain([TOKENIZER]);
    let capacity = header_capacity(&layers, names, &metadata)?;
    let mut writer = FileWriter::new(out, capacity)?;
    let indices: BTreeMap<&str, usize> = source
        .tensors()
        .iter()
        .enumerate()
        .map(|(i, t)| (t.name.as_str(), i))
        .collect();
    for (id, layer) in layers.iter_mut().enumerate() {
        progress.check_interrupt()?;
        let matrix = student.matrix(&layer.name, layer.rows, layer.cols)?;
        layer.error = match (student.tuned(&layer.name), indices.get(layer.name.as_str())) {
            (Some(_), Some(&index)) => {
                let error = relative_error(&source.read_f32(index)?, &matrix);
                Some(error.map_err(|e| e.tensor(&layer.name))?)
            }
            _ => file.layers()[id].error,
        };
        writer.layer(id, layer, &matrix)?;
    }
    for (name, dtype, shape) in file.kept() {
        match student.tuned(name) {
            Some(gains) => {
                let values = gains.values();
                writer.tensor(name, Dtype::F32, shape, bytemuck::cast_slice(&values))?
            }
            None => writer.tensor(name, dtype, shape, file.bytes(name).unwrap_or_default())?,
        };
    }
    if let Some(json) = file.tokenizer_json() {
        writer.tensor(TOKENIZER, Dtype::U8, &[json.len()], json)?;
    }
    let (bytes, weights) = (writer.file_len(), file.weights());
    insert_figures(&mut metadata, bytes, weights);
    writer.finish(metadata, &layers)?;
    Ok((bytes, weights))
}

/// Returns the recipe of the file with this tuning added.
fn recipe(file: &UpgFile, tuned: Value) -> String {
    let before = file.metadata(RECIPE).unwrap_or_default();
    let mut recipe = match json::value(RECIPE, before) {
        Ok(Value::Object(recipe)) => recipe,
        _ => serde_json::Map::new(),
    };
    let earlier = recipe.remove("tuned");
    let mut all = match earlier {
        Some(Value::Array(all)) => all,
        _ => Vec::new(),
    };
    all.push(tuned);
    recipe.insert("tuned".into(), Value::Array(all));
    Value::Object(recipe).to_string()
}

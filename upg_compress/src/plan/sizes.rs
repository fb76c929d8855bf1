//! Byte counts: of the file, of its arrays, and of the memory for encoding a tensor.
#![forbid(unsafe_code)]

use super::options::CompressOptions;
use super::recipe::metadata;
use super::tensors::{Plan, PlannedTensor};
use crate::encode::matrix::encoder_of;
use crate::encode::panel::sequential_rows;
use crate::sensitivity::curvature::PANEL_ROWS;
use crate::source::{Source, SourceDtype};
use upg_kernel::Result;
use upg_kernel::format::{LayerInfo, TENSOR_ALIGNMENT, header_bytes, header_capacity};

/// Bytes per column of a part: a strip of 64 rows in several forms.
const STRIP_BYTES: u64 = 64 * 4 * 10;

const F32: u64 = 4;

/// Returns the bytes of the file of `plan`; an upper bound with `mdcsr`, `s8` and `s4`.
///
/// Errors: those of the header.
pub(crate) fn file_bytes(
    source: &dyn Source,
    options: &CompressOptions,
    plan: &Plan,
) -> Result<u64> {
    let layers = plan.layers();
    let metadata = metadata(source, options, plan);
    let capacity = header_capacity(&layers, plan.uncompressed_names(source), &metadata)?;
    let mut bytes = header_bytes(capacity);
    // Padding comes before the next tensor.
    let mut add = |array: u64| bytes = bytes.next_multiple_of(TENSOR_ALIGNMENT) + array;
    for planned in &plan.tensors {
        array_bytes(source, planned)?.into_iter().for_each(&mut add);
    }
    if let Some(json) = &source.files().tokenizer_json {
        add(json.len() as u64);
    }
    Ok(bytes)
}

/// Returns the bytes of each array of a tensor.
pub(crate) fn array_bytes(source: &dyn Source, planned: &PlannedTensor) -> Result<Vec<u64>> {
    if let Some(layer) = &planned.layer {
        return layer.array_bytes();
    }
    let tensor = &source.tensors()[planned.index];
    let size = tensor.raw_dtype().size() as u64;
    Ok(vec![tensor.weights() as u64 * size])
}

/// Returns the memory in bytes for encoding and writing a tensor.
///
/// Errors: those of the description of a layer.
pub(crate) fn tensor_bytes(
    source: &dyn Source,
    options: &CompressOptions,
    planned: &PlannedTensor,
) -> Result<u64> {
    let arrays = array_bytes(source, planned)?.iter().sum();
    let tensor = &source.tensors()[planned.index];
    Ok(match (&planned.layer, tensor.dtype) {
        (Some(layer), _) => encoding(layer, options, arrays)?,
        (None, SourceDtype::Float(_)) => arrays,
        // The values, and their bytes.
        (None, SourceDtype::Quantized(_)) => 2 * arrays,
    })
}

/// Returns the memory that a matrix takes while it is encoded into `arrays` bytes.
fn encoding(layer: &LayerInfo, options: &CompressOptions, arrays: u64) -> Result<u64> {
    let (rows, cols) = (layer.rows as u64, layer.cols as u64);
    let weights = rows * cols;
    let is_calibrated = options.calibrates(layer);
    // Parts that are encoded at the same time.
    let parts = layer.rows.div_ceil(sequential_rows(is_calibrated));
    let parts = parts.min(rayon::current_num_threads()) as u64;
    let codes = (encoder_of(layer)?.scratch_bytes)(weights, parts);
    let feedback = match is_calibrated {
        // Peak during the decomposition: the rotated or reordered matrix in f32, three in f64; then
        // the rows of each panel.
        true => {
            let panel = rows.min(PANEL_ROWS as u64);
            cols * cols * (F32 + 3 * 8) + parts * panel * (panel * (F32 + 3 * 8) + cols * F32)
        }
        false => 0,
    };
    // After encoding: all errors, the factor of the inputs, and products of the errors of a panel.
    let measuring = match options.output_errors && is_calibrated {
        true => F32 * (weights + cols * cols + 2 * rows.min(PANEL_ROWS as u64) * cols),
        false => 0,
    };
    let feedback = feedback.max(measuring);
    Ok(F32 * weights + codes + arrays + parts * cols * STRIP_BYTES + feedback)
}

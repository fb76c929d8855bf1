//! From a source model to one UPG file, a tensor at a time.
#![forbid(unsafe_code)]

use crate::calibration::Calibrator;
use crate::hessian::Hessian;
use crate::plan::{CompressOptions, Plan, is_calibrated, is_prunable};
use crate::progress::Progress;
use crate::pruning::prune;
use crate::rounding::{round_q4, round_q8, round_s4, round_s8};
use crate::source::{RawTensor, Source};
use crate::trellis;
use crate::zeros::Zeros;
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::Path;
use upg_kernel::format::{Encoding, FileWriter, LayerInfo, TOKENIZER, header_capacity};
use upg_kernel::sparse::MdCSRMatrix;
use upg_kernel::{Error, ErrorKind, Matrix, Result, WholeFile};

/// Room in the header for `compression_ratio` and `bits_per_weight`.
const FIGURE_DIGITS: usize = 24;

/// What was written.
#[derive(Debug, Clone)]
pub struct CompressReport {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Weights of the model, uncompressed ones included.
    pub weights: u64,
    /// The compressed matrices with their errors.
    pub layers: Vec<LayerInfo>,
    /// Of the matrices among them that are stored by their zeros, if there are any.
    pub zeros: Option<Zeros>,
}

impl CompressReport {
    /// Bits of the whole file for each weight.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.file_bytes as f64 / self.weights as f64
    }
}

/// Compresses `source` into a UPG file at `out`, which appears whole or not at all.
///
/// The bytes depend on the source and the options only, not on the number of threads; if there is a
/// calibration, also on the machine (instruction set, caches). Memory: about three copies of the largest
/// tensor, in f32, with a calibration also what [`Calibrator`] and
/// [`Feedback::new`](crate::hessian::Feedback::new) take. Time: see the encoders.
///
/// Errors: those of the source; `Invalid` for weights that are not finite; `Argument` if `out` is a
/// file of the source; `Io`; `Interrupted`.
pub fn compress(
    source: &dyn Source,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let mut calibrator = None;
    compress_with(source, out, options, progress, |index, layer| {
        let hessian = match &options.calibration {
            Some(calibration) if is_calibrated(layer) => {
                let calibrator = match &mut calibrator {
                    Some(calibrator) => calibrator,
                    none => none.insert(Calibrator::new(source, calibration)?),
                };
                calibrator.hessian(&layer.name, progress)?
            }
            _ => None,
        };
        let weights = source.read_f32(index)?;
        let pruned = match (options.prune, hessian) {
            (Some(sparsity), Some(hessian)) if is_prunable(layer) => {
                Some(prune(&weights, layer.rows, layer.cols, sparsity, hessian)?)
            }
            _ => None,
        };
        let left = pruned.as_deref().unwrap_or(&weights);
        let matrix = encode_matrix(left, layer, options.seed, hessian, progress)?;
        layer.error = Some(relative_error(&weights, &matrix)?);
        Ok(matrix)
    })
}

/// [`compress`] with an encoder of the caller: it gets the index of a tensor and the description of its
/// layer, to which it may add.
pub(crate) fn compress_with(
    source: &dyn Source,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
    mut encode: impl FnMut(usize, &mut LayerInfo) -> Result<Matrix>,
) -> Result<CompressReport> {
    let plan = Plan::new(source, options)?;
    let tokenizer = source.files().tokenizer_json.as_deref();
    let mut metadata = metadata(source, options, &plan)?;
    let mut layers: Vec<LayerInfo> = plan
        .tensors
        .iter()
        .filter_map(|t| t.layer.clone())
        .collect();
    let kept = plan.tensors.iter().filter(|t| t.layer.is_none());
    let names = kept.map(|t| source.tensors()[t.index].name.as_str());
    let capacity = header_capacity(&layers, names.chain([TOKENIZER]), &metadata)?;
    let out = WholeFile::create_from(out, source.own_files())?;
    let mut writer = FileWriter::new(out, capacity)?;

    progress.start(plan.weights);
    let (mut next_layer, mut zeros) = (0, None);
    for planned in &plan.tensors {
        let tensor = &source.tensors()[planned.index];
        progress.proceed()?;
        progress.tensor(&tensor.name);
        if planned.layer.is_some() {
            let layer = &mut layers[next_layer];
            let matrix = encode(planned.index, layer).map_err(|e| e.tensor(&tensor.name))?;
            writer.layer(next_layer, layer, &matrix)?;
            Zeros::count(&mut zeros, &matrix);
            next_layer += 1;
        } else {
            let raw = source.read_raw(planned.index)?;
            check_finite(&raw, tensor.cols()).map_err(|e| e.tensor(&tensor.name))?;
            writer.tensor(&tensor.name, raw.dtype.into(), &tensor.shape, &raw.bytes)?;
            progress.advance(tensor.weights() as u64);
        }
    }
    if let Some(json) = tokenizer {
        writer.tensor(TOKENIZER, Dtype::U8, &[json.len()], json)?;
    }
    let report = CompressReport {
        file_bytes: writer.file_len(),
        weights: plan.weights,
        layers,
        zeros,
    };
    let ratio = 4.0 * report.weights as f64 / report.file_bytes as f64;
    metadata.insert("compression_ratio".into(), format!("{ratio:.4}"));
    metadata.insert(
        "bits_per_weight".into(),
        format!("{:.4}", report.bits_per_weight()),
    );
    writer.finish(metadata, &report.layers)?;
    Ok(report)
}

fn metadata(
    source: &dyn Source,
    options: &CompressOptions,
    plan: &Plan,
) -> Result<BTreeMap<String, String>> {
    let files = source.files();
    let recipe = serde_json::json!({
        "tool": concat!("upg ", env!("CARGO_PKG_VERSION")),
        "encoding": options.encoding.to_string(),
        "embedding": plan.embedding.to_string(),
        "overrides": options.overrides.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "seed": options.seed,
        "sparse": options.sparse.to_string(),
        "prune": options.prune,
        "calibration": options.calibration.as_ref().map(|calibration| {
            serde_json::json!({
                "tokens": calibration.tokens().len(),
                "window": calibration.window(),
            })
        }),
    });
    let mut metadata = BTreeMap::from([
        ("model".to_owned(), source.model_name().to_owned()),
        ("recipe".to_owned(), recipe.to_string()),
        ("config.json".to_owned(), files.config_json.clone()),
        ("compression_ratio".to_owned(), "0".repeat(FIGURE_DIGITS)),
        ("bits_per_weight".to_owned(), "0".repeat(FIGURE_DIGITS)),
    ]);
    for (key, text) in [
        ("generation_config.json", &files.generation_config_json),
        ("tokenizer_config.json", &files.tokenizer_config_json),
        ("special_tokens_map.json", &files.special_tokens_map_json),
        ("chat_template", &files.chat_template),
    ] {
        if let Some(text) = text {
            metadata.insert(key.to_owned(), text.clone());
        }
    }
    Ok(metadata)
}

/// Errors (`Invalid`): a value that is not finite, which would spoil every answer.
fn check_finite(raw: &RawTensor<'_>, cols: usize) -> Result<()> {
    let size = raw.dtype.size();
    let bad = raw
        .bytes
        .par_chunks(size << 16)
        .enumerate()
        .map(|(chunk, bytes)| {
            let mut values = vec![0.0; bytes.len() / size];
            raw.dtype.to_f32(bytes, &mut values)?;
            let bad = values.iter().position(|w| !w.is_finite());
            Ok(bad.map(|i| ((chunk << 16) + i, values[i])))
        })
        .find_map_first(|found: Result<_>| found.transpose());
    match bad.transpose()? {
        None => Ok(()),
        Some((i, w)) => Err(Error::new(
            ErrorKind::Invalid,
            format!("the weight in row {}, column {} is {w}", i / cols, i % cols),
        )),
    }
}

/// Encodes `weights` (`[rows, cols]`, row by row) as `layer` says; `progress` advances by all of them.
///
/// Errors: those of the encoders; `Interrupted`.
pub fn encode_matrix(
    weights: &[f32],
    layer: &LayerInfo,
    seed: u64,
    hessian: Option<&Hessian>,
    progress: &dyn Progress,
) -> Result<Matrix> {
    let (rows, cols) = (layer.rows, layer.cols);
    let group = layer.group.unwrap_or(64);
    let encoding = layer.encoding()?;
    if let Some(k) = encoding.trellis_bits() {
        let matrix = trellis::encode_with(weights, rows, cols, k, seed, hessian, progress)?;
        return Ok(Matrix::Trellis(matrix));
    }
    let matrix = match encoding {
        Encoding::MdCsr => Matrix::MdCsr(MdCSRMatrix::from_dense(weights, rows, cols)?),
        Encoding::Q8 => Matrix::Grouped(round_q8(weights, rows, cols, group, hessian)?),
        Encoding::Q4 => Matrix::Grouped(round_q4(weights, rows, cols, group, hessian)?),
        Encoding::S8 => Matrix::Bitmap(round_s8(weights, rows, cols, hessian)?),
        Encoding::S4 => Matrix::Bitmap(round_s4(weights, rows, cols, hessian)?),
        other => {
            let message = format!("no encoder for '{other}'");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
    };
    progress.advance(weights.len() as u64);
    Ok(matrix)
}

/// `|decoded - original| / |original|` in the Frobenius norm, to six digits; 0 for a zero matrix.
pub fn relative_error(original: &[f32], matrix: &Matrix) -> Result<f64> {
    let cols = matrix.cols();
    // One pair of sums a row, added in order: the same for any number of threads.
    let rows: Vec<(f64, f64)> = original
        .par_chunks_exact(cols.max(1))
        .enumerate()
        .map_init(
            || vec![0.0; cols],
            |decoded, (row, original)| {
                matrix.rows_into(row, decoded)?;
                let pairs = original.iter().zip(decoded.iter());
                Ok(pairs.fold((0.0, 0.0), |(error, norm), (&a, &b)| {
                    let (a, b) = (f64::from(a), f64::from(b));
                    (error + (a - b) * (a - b), norm + a * a)
                }))
            },
        )
        .collect::<Result<_>>()?;
    let (error, norm) = rows.iter().fold((0.0, 0.0), |s, r| (s.0 + r.0, s.1 + r.1));
    if norm == 0.0 {
        return Ok(0.0);
    }
    Ok(((error / norm).sqrt() * 1e6).round() / 1e6)
}

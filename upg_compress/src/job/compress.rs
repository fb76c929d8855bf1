//! Compression of a source into one UPG file. Small tensors are encoded in parallel.
#![forbid(unsafe_code)]

use crate::encode::matrix::{
    Encoded, encode_matrix, errors_of, relative_error, significant, to_six_digits,
};
use crate::encode::panel::sequential_rows;
use crate::encode::prune::prune;
use crate::job::journal::Record;
use crate::job::parallel::{TensorBatch, in_parallel};
use crate::job::report::{CalibrationReport, CompressReport, Zeros};
use crate::job::resume::{Resumable, fingerprint};
use crate::plan::budget;
use crate::plan::options::CompressOptions;
use crate::plan::recipe::{RECIPE, metadata};
use crate::plan::tensors::{Plan, PlannedTensor, is_prunable};
use crate::progress::Progress;
use crate::sensitivity::calibrator::Calibrator;
use crate::sensitivity::curvature::Curvature;
use crate::source::{RawTensor, Source, check_runnable};
use rayon::prelude::*;
use safetensors::Dtype;
use std::path::Path;
use std::time::Instant;
use upg_kernel::format::{FileWriter, LayerInfo, TOKENIZER, header_capacity, insert_figures};
use upg_kernel::inference::LayerInput;
use upg_kernel::support::AtomicFile;
use upg_kernel::{Error, ErrorKind, Result};

/// Compresses `source` into a UPG file at `out`, which is replaced atomically.
///
/// The bytes depend only on the source and the options, not on the number of threads. With a
/// calibration they also depend on the machine (instruction set, caches). Memory: about three
/// copies of the largest tensor in f32, or half a gigabyte for smaller ones in parallel; with a
/// calibration also that of [`Calibrator`] and
/// [`Feedback::new`](crate::sensitivity::hessian::Feedback::new). Time: see the encoders.
/// [`Preflight`](crate::job::preflight::Preflight) estimates both beforehand.
///
/// With [`CompressOptions::resume`] a run that ends early, however it ends, leaves the two files of
/// [`partial_files`](crate::job::resume::partial_files). The same call again continues after the
/// last tensor that was written, and gives the same bytes. It reads the existing part once. With a
/// calibration the model runs over the text again, forwards and then backwards to the layer where
/// it stopped.
///
/// Errors: those of the source, and of [`check_runnable`], before any work; `Invalid` for weights
/// that are not finite; `Argument` if `out` is a file of the source, or if a partial file belongs
/// to another run or is in use by one; `Io`; `Interrupted`.
pub fn compress(
    source: &dyn Source,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    check_runnable(source)?;
    compress_checked(source, out, options, progress)
}

/// Compresses a source whose files [`Preflight::new`](crate::Preflight::new) has checked.
///
/// Otherwise like [`compress`]; building a large tokenizer a second time would take seconds.
/// Errors: as [`compress`], without those of [`check_runnable`].
pub fn compress_checked(
    source: &dyn Source,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
) -> Result<CompressReport> {
    let mut calibrator = None;
    let with_choices;
    let options = match options.budget {
        Some(budget) => {
            with_choices = budget::choose_encodings(source, options, budget, progress)?;
            &with_choices
        }
        None => options,
    };
    let all_layers = match &options.calibration {
        Some(_) => source.files().config()?.num_layers,
        None => 0,
    };
    let (mut calibration_seconds, mut calibrated_layers) = (0.0, 0);
    let mut report = compress_with(source, out, options, progress, |jobs| {
        let mut calibrated = Vec::new();
        for job in jobs {
            let curvature = match &options.calibration {
                Some(calibration) if options.calibrates(job.layer) => {
                    let started = Instant::now();
                    let calibrator = match &mut calibrator {
                        Some(calibrator) => calibrator,
                        none => none.insert(Calibrator::new(source, calibration, progress)?),
                    };
                    let name = &job.layer.name;
                    let curvature = calibrator.curvature(name, progress);
                    let curvature = curvature.map_err(|e| e.tensor(name))?;
                    calibration_seconds += started.elapsed().as_secs_f64();
                    calibrated_layers =
                        LayerInput::of(name).map_or(0, |(layer, _)| all_layers - layer);
                    curvature
                }
                _ => None,
            };
            calibrated.push((job, curvature));
        }
        // The rows encoded in sequence set the minimum time of a matrix.
        let longest = |(job, curvature): &(MatrixJob<'_>, Option<_>)| {
            let rows = sequential_rows(curvature.is_some());
            job.layer.rows.min(rows) * job.layer.cols
        };
        let encoded = in_parallel(calibrated, longest, |(job, curvature)| {
            let MatrixJob { index, layer } = job;
            let encoded = encode_tensor(
                source,
                index,
                layer,
                options,
                curvature.as_deref(),
                progress,
            );
            encoded.map_err(|e| e.tensor(&layer.name))
        });
        Ok(encoded)
    })?;
    report.encoding_seconds -= calibration_seconds;
    report.calibration = options
        .calibration
        .as_ref()
        .filter(|_| calibrated_layers > 0)
        .map(|calibration| CalibrationReport {
            tokens: calibration.tokens().len(),
            layers: (calibrated_layers, all_layers),
            seconds: calibration_seconds,
        });
    Ok(report)
}

/// Reads and encodes tensor `index` as described by `layer`, and sets its error.
fn encode_tensor(
    source: &dyn Source,
    index: usize,
    layer: &mut LayerInfo,
    options: &CompressOptions,
    curvature: Option<&Curvature>,
    progress: &dyn Progress,
) -> Result<Encoded> {
    progress.check_interrupt()?;
    progress.tensor(&layer.name);
    let started = Instant::now();
    let weights = source.read_f32(index)?;
    let pruned = match (options.prune, curvature) {
        (Some(sparsity), Some(curvature)) if is_prunable(layer) => Some(prune(
            &weights,
            layer.rows,
            layer.cols,
            sparsity,
            curvature.inputs(),
        )?),
        _ => None,
    };
    let left = pruned.as_deref().unwrap_or(&weights);
    let matrix = encode_matrix(left, layer, options.seed, curvature, progress)?;
    layer.error = Some(relative_error(&weights, &matrix)?);
    let seconds = started.elapsed().as_secs_f64();
    let (mut output_error, mut divergence) = (None, None);
    if let Some(curvature) = curvature.filter(|_| options.output_errors) {
        let errors = errors_of(&weights, &matrix)?;
        let cost = |of: &[f32]| curvature.inputs().cost(of);
        output_error = Some(to_six_digits(cost(&errors), cost(&weights)));
        divergence = curvature.divergence(&errors)?.map(significant);
    }
    Ok(Encoded {
        matrix,
        output_error,
        divergence,
        seconds,
    })
}

/// Matrix to be encoded.
pub(crate) struct MatrixJob<'a> {
    /// Index of its tensor in the source.
    pub index: usize,
    /// Description of the matrix, to which the encoder may add.
    pub layer: &'a mut LayerInfo,
}

/// Compresses like [`compress`], with a custom encoder.
///
/// `encode` receives the next matrices and returns their encodings in order. On failure it returns
/// the encodings before the failed one, together with the error.
pub(crate) fn compress_with(
    source: &dyn Source,
    out: impl AsRef<Path>,
    options: &CompressOptions,
    progress: &dyn Progress,
    mut encode: impl FnMut(Vec<MatrixJob<'_>>) -> Result<(Vec<Encoded>, Result<()>)>,
) -> Result<CompressReport> {
    let started = Instant::now();
    let out = out.as_ref();
    let plan = Plan::new(source, options)?;
    let mut metadata = metadata(source, options, &plan);
    let mut layers = plan.layers();
    let capacity = header_capacity(&layers, plan.uncompressed_names(source), &metadata)?;
    let (out, mut resumable) = match options.resume {
        true => {
            let fingerprint = fingerprint(source, options, &plan, &metadata[RECIPE])?;
            let resumable = Resumable::open(out, source, &fingerprint)?;
            (AtomicFile::resume(out)?, Some(resumable))
        }
        false => (AtomicFile::create_from(out, source.own_files())?, None),
    };
    let mut writer = FileWriter::new(out, capacity)?;

    progress.start(plan.weights);
    let mut tensors = match &mut resumable {
        Some(earlier) => earlier.restore(&mut writer, source, &plan, &mut layers, progress)?,
        None => Vec::new(),
    };
    let restored = tensors.len();
    let is_layer = |planned: &&PlannedTensor| planned.layer.is_some();
    let mut encoding_seconds = 0.0;
    let mut next_layer = plan.tensors[..restored].iter().filter(is_layer).count();
    for batch in TensorBatch::all(source, options, &plan.tensors[restored..])? {
        progress.check_interrupt()?;
        let matrices = batch.tensors.iter().filter(is_layer);
        let described = layers[next_layer..].iter_mut();
        let jobs = matrices.zip(described).map(|(planned, layer)| MatrixJob {
            index: planned.index,
            layer,
        });
        let started = Instant::now();
        let (encoded, outcome) = encode(jobs.collect())?;
        encoding_seconds += started.elapsed().as_secs_f64();
        let mut encoded = encoded.into_iter();
        for planned in batch.tensors {
            let tensor = &source.tensors()[planned.index];
            let record = if planned.layer.is_some() {
                // Finished tensors are stored, even if others were stopped.
                let Some(encoded) = encoded.next() else { break };
                let layer = &layers[next_layer];
                let arrays = writer.layer(next_layer, layer, &encoded.matrix)?;
                next_layer += 1;
                Record::encoded(tensor, layer, &encoded, arrays)
            } else {
                if outcome.is_ok() {
                    progress.check_interrupt()?;
                }
                write_uncompressed(source, planned.index, &mut writer, progress)?
            };
            if let Some(resumable) = &mut resumable {
                resumable.add(&mut writer, &record)?;
            }
            tensors.push(record.tensor);
        }
        outcome?;
    }
    if let Some(json) = source.files().tokenizer_json.as_deref() {
        writer.tensor(TOKENIZER, Dtype::U8, &[json.len()], json)?;
    }
    let mut report = CompressReport {
        file_bytes: writer.file_len(),
        weights: plan.weights,
        layers,
        zeros: Zeros::of(&tensors),
        tensors,
        restored,
        calibration: None,
        encoding_seconds,
        seconds: 0.0,
    };
    insert_figures(&mut metadata, report.file_bytes, report.weights);
    writer.finish(metadata, &report.layers)?;
    resumable.map_or(Ok(()), Resumable::finish)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Checks tensor `index` and writes it unchanged.
fn write_uncompressed(
    source: &dyn Source,
    index: usize,
    writer: &mut FileWriter,
    progress: &dyn Progress,
) -> Result<Record> {
    let tensor = &source.tensors()[index];
    progress.tensor(&tensor.name);
    let started = Instant::now();
    let raw = source.read_raw(index)?;
    check_finite(&raw, tensor.cols()).map_err(|e| e.tensor(&tensor.name))?;
    let array = writer.tensor(&tensor.name, raw.dtype.into(), &tensor.shape, &raw.bytes)?;
    progress.advance(tensor.weights() as u64);
    let seconds = started.elapsed().as_secs_f64();
    Ok(Record::uncompressed(tensor, seconds, array))
}

/// Checks that every value is finite; another one would spoil every answer.
///
/// Errors (`Invalid`): a value is not finite.
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

//! Estimate of the time of a compression, from samples.
#![forbid(unsafe_code)]

use crate::encode::matrix::{encode_matrix, encoder_of};
use crate::encode::panel::sequential_rows;
use crate::job::parallel::TensorBatch;
use crate::plan::options::CompressOptions;
use crate::plan::tensors::{Plan, PlannedTensor};
use crate::sensitivity::curvature::{Curvature, PANEL_ROWS};
use crate::source::Source;
use faer::{Mat, Par};
use rayon::ThreadPoolBuilder;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;
use upg_kernel::format::LayerInfo;
use upg_kernel::inference::LayerInput;
use upg_kernel::inference::weights::{EMBEDDING, HEAD};
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::{Error, ErrorKind, Result};

/// Columns of a sample. The cost of feedback beside the search is counted, not measured.
const SAMPLE_COLS: usize = 512;

/// Rows of the larger sample in strips; the smaller sample is one strip.
///
/// Two sizes separate the constant cost of a matrix from the cost of its rows.
const LARGER: usize = 4;

/// Rows and columns of the product that is timed.
const PRODUCT: usize = 1024;

/// Time of a product in f64 relative to one in f32.
const F64_FACTOR: f64 = 2.0;

/// Seconds per matrix of one kind: a constant, and a time per weight.
#[derive(Clone, Copy)]
struct Rate {
    matrix: f64,
    weight: f64,
}

/// Estimates the seconds for everything in `plan`.
///
/// Errors: those of the source, and of encoding the samples.
pub(super) fn seconds(source: &dyn Source, options: &CompressOptions, plan: &Plan) -> Result<f64> {
    let mut rates: BTreeMap<(String, bool), Rate> = BTreeMap::new();
    let threads = rayon::current_num_threads() as f64;
    let mut total = 0.0;
    let mut products = 0.0;
    for batch in TensorBatch::all(source, options, &plan.tensors)? {
        let matrices = batch.tensors.iter().filter(|t| t.layer.is_some()).count();
        let (mut all, mut longest) = (0.0, 0.0f64);
        for planned in batch.tensors {
            let Some(layer) = &planned.layer else {
                continue;
            };
            let calibrated = options.calibrates(layer);
            let key = (layer.encoding_name().to_owned(), calibrated);
            let rate = match rates.get(&key) {
                Some(rate) => *rate,
                None => {
                    let largest = largest(plan, options, &key);
                    let rate = measured(source, options, largest.unwrap_or(planned), calibrated)?;
                    rates.insert(key, rate);
                    rate
                }
            };
            let (rows, cols) = (layer.rows as f64, layer.cols as f64);
            all += rate.matrix + rate.weight * rows * cols;
            let in_turn = in_turn(layer, calibrated, matrices == 1)? as f64;
            longest = longest.max(rate.matrix + rate.weight * in_turn * cols);
            if calibrated {
                products += feedback_products(rows, cols, options.output_errors);
            }
        }
        total += longest.max(all / threads);
    }
    if let Some(calibration) = &options.calibration {
        let tokens = calibration.tokens().len() as f64;
        products += tokens * products_of_token(source, calibration.window());
    }
    if options.budget.is_some() {
        // Sensitivities before that, on fewer tokens.
        products *= 1.5;
    }
    if products > 0.0 {
        total += products * seconds_of_product();
    }
    Ok(total)
}

/// Returns the minimum rows of a matrix that one thread encodes. Parts of a matrix that is `alone`
/// are shared out evenly.
fn in_turn(layer: &LayerInfo, calibrated: bool, alone: bool) -> Result<usize> {
    // Without a trellis most of the time goes into the search for primes, row by row.
    let together = match encoder_of(layer)?.by_row {
        true => 1,
        false => sequential_rows(calibrated),
    };
    let turns = match alone {
        true => layer
            .rows
            .div_ceil(together)
            .div_ceil(rayon::current_num_threads()),
        false => 1,
    };
    Ok(layer.rows.min(turns * together))
}

/// Returns the largest matrix of a kind.
fn largest<'a>(
    plan: &'a Plan,
    options: &CompressOptions,
    (encoding, calibrated): &(String, bool),
) -> Option<&'a PlannedTensor> {
    let of_kind = |layer: &LayerInfo| {
        layer.encoding_name() == encoding && options.calibrates(layer) == *calibrated
    };
    let tensors = plan.tensors.iter();
    let matching = tensors.filter(|t| t.layer.as_ref().is_some_and(of_kind));
    matching.max_by_key(|t| t.layer.as_ref().map(|l| l.rows * l.cols))
}

/// Encodes the first columns of the first rows of a matrix, twice, on one thread.
fn measured(
    source: &dyn Source,
    options: &CompressOptions,
    planned: &PlannedTensor,
    calibrated: bool,
) -> Result<Rate> {
    let Some(layer) = &planned.layer else {
        return Ok(Rate {
            matrix: 0.0,
            weight: 0.0,
        });
    };
    let cols = layer.cols.min(SAMPLE_COLS);
    let alone = ThreadPoolBuilder::new().num_threads(1).build();
    let alone = alone.map_err(|e| Error::new(ErrorKind::Io, format!("starting a thread: {e}")))?;
    let time = |rows: usize| -> Result<(f64, f64)> {
        let rows = rows.min(layer.rows);
        let curvature = calibrated.then(|| unit_curvature(rows, cols)).transpose()?;
        let started = Instant::now();
        let whole = source.read_rows_f32(planned.index, 0..rows)?;
        let weights: Vec<f32> = whole
            .chunks_exact(layer.cols)
            .flat_map(|row| &row[..cols])
            .copied()
            .collect();
        let mut sample = layer.clone();
        (sample.rows, sample.cols) = (rows, cols);
        (encoder_of(layer)?.describe)(&mut sample, layer.group);
        let curvature = curvature.as_ref();
        let matrix =
            alone.install(|| encode_matrix(&weights, &sample, options.seed, curvature, &()))?;
        black_box(crate::encode::matrix::relative_error(&weights, &matrix)?);
        Ok((started.elapsed().as_secs_f64(), (rows * cols) as f64))
    };
    let in_tensor = |e: Error| e.tensor(&layer.name);
    let (first, few) = time(STRIP_ROWS).map_err(in_tensor)?;
    let (second, many) = time(STRIP_ROWS * LARGER).map_err(in_tensor)?;
    let weight = match many > few {
        true => ((second - first) / (many - few)).max(0.0),
        false => second / many,
    };
    Ok(Rate {
        matrix: (first - weight * few).max(0.0),
        weight,
    })
}

/// Returns the curvature of inputs and gradients with a single one in each.
fn unit_curvature(rows: usize, cols: usize) -> Result<Curvature> {
    let n = rows.max(cols);
    let units = |len: usize| {
        let mut values = vec![0.0; n * len];
        let vectors = values.chunks_exact_mut(len).enumerate();
        vectors.for_each(|(i, vector)| vector[i % len] = 1.0);
        values
    };
    let mut curvature = Curvature::new(rows, cols);
    curvature.add(&units(cols), &units(rows))?;
    Ok(curvature)
}

/// Returns the f32 multiplications of a calibrated matrix besides its search.
///
/// Other work is converted to multiplications that take the same time.
fn feedback_products(rows: f64, cols: f64, output_errors: bool) -> f64 {
    // Errors spread to later columns, and fitted scales; then errors of rows;
    // then the cost of the errors.
    let panel = rows.min(PANEL_ROWS as f64);
    let of_columns = rows * cols * cols * 1.5;
    let of_rows = rows * panel * cols / 2.0;
    let measuring = match output_errors {
        true => rows * cols * (2.0 * cols + panel),
        false => 0.0,
    };
    let decompositions = (cols.powi(3) + rows * panel.powi(2)) / 6.0 * F64_FACTOR;
    of_columns + of_rows + measuring + decompositions
}

/// Returns the multiplications of a token, forward and backward through all layers.
///
/// Includes those for curvatures.
fn products_of_token(source: &dyn Source, window: usize) -> f64 {
    let mut products = 0.0;
    for tensor in source.tensors() {
        let weights = tensor.weights() as f64;
        let Some((_, input)) = LayerInput::of(&tensor.name) else {
            if tensor.name == HEAD || tensor.name == EMBEDDING {
                // The head forward and backward; in a model that has both, the embedding is only
                // looked up.
                products += weights;
            }
            continue;
        };
        let (rows, cols) = (tensor.rows() as f64, tensor.cols() as f64);
        // Forward, forward again during the backward pass, and backward.
        products += 3.0 * weights;
        products += (cols * cols + rows * rows.min(PANEL_ROWS as f64)) / 2.0;
        if input == LayerInput::Output {
            // Queries times keys, and values: over half of the window on average in the forward
            // pass, over all of it later; twice each, and their gradients.
            products += cols * window as f64 * 8.0;
        }
    }
    products
}

/// Measures the time of one multiplication in a large product, on all threads.
fn seconds_of_product() -> f64 {
    let matrix = Mat::from_fn(PRODUCT, PRODUCT, |i, j| (i * 7 + j) as f32 % 3.0);
    let mut out = Mat::<f32>::zeros(PRODUCT, PRODUCT);
    let mut multiply = || {
        let started = Instant::now();
        faer::linalg::matmul::matmul(
            out.as_mut(),
            faer::Accum::Replace,
            black_box(matrix.as_ref()),
            matrix.as_ref(),
            1.0f32,
            Par::rayon(0),
        );
        started.elapsed().as_secs_f64()
    };
    // The first one also starts the threads.
    multiply();
    multiply() / (PRODUCT as f64).powi(3)
}

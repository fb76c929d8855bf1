//! Fine-tuning of a compressed file: its row scales and norm gains learn the predictions of
//! the original.
//!
//! Codes stay the same, and so does the size of the file, except that gains become F32. The loss is
//! the Kullback-Leibler divergence of the predictions of the original from those of the file, over
//! all positions of a text. Its gradients come from a backward pass through the compressed model.
//! Rounding loses little in the scales, but a few of them can turn the errors of thousands of codes
//! into errors that later layers can compensate. AQLM (arXiv 2401.06118) and QuIP# (arXiv
//! 2402.04396) end with such a step.
#![forbid(unsafe_code)]

mod parameter;
mod student;
mod teacher;
mod write;

use crate::job::preflight::free;
use crate::progress::Progress;
use crate::sensitivity::calibration::Calibration;
use crate::source::Source;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::f64::consts::PI;
use std::path::Path;
use std::time::Instant;
use student::Student;
use teacher::Teacher;
use upg_kernel::format::UpgFile;
use upg_kernel::support::{AtomicFile, folder_of};
use upg_kernel::{Error, ErrorKind, Result};
use write::write;

/// Steps of linear warm-up of the learning rate.
const WARM_UP: f64 = 10.0;

/// Number of sequences of which one is held out to measure the gain.
const HELD_OUT: usize = 16;

/// Maximum number of sequences that the gain is measured on.
const MOST_CHECKED: usize = 4;

/// Seed of the order of the sequences.
const ORDER_SEED: u64 = 0;

/// Options of [`tune`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TuneOptions {
    /// Passes over the text.
    pub passes: usize,
    /// Learning rate: approximate maximum relative change of a scale or gain per step.
    ///
    /// It decays to zero towards the end.
    pub rate: f64,
}

impl TuneOptions {
    /// Creates options with this number of passes and this rate, everything else at its default.
    pub const fn new(passes: usize, rate: f64) -> Self {
        Self { passes, rate }
    }
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self::new(2, 0.002)
    }
}

/// Report of [`tune`].
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TuneReport {
    /// Divergence from the original before and after, in nats per position.
    ///
    /// Measured on held-out sequences; if the text has too few, on some training sequences.
    pub divergence: (f64, f64),
    /// Divergence in each pass, of each sequence before its step.
    pub passes: Vec<f64>,
    /// Number of trained scales and gains.
    pub parameters: usize,
    /// Bytes of the new file.
    pub file_bytes: u64,
    /// Number of weights of the model.
    pub weights: u64,
    /// Total seconds.
    pub seconds: f64,
}

/// Tunes `file` on the text of `calibration` towards the model in `source`, and writes the
/// result to `out`.
///
/// `file` was made from that model; `out` may be the same file. Each sequence of the text is a
/// step, a forward and a backward pass through the compressed model. One sequence in 16 is held
/// out, and nothing is written unless the divergence on these has fallen. Cost: a pass is about as
/// much as running the original over the text for a calibration. Memory: `4 * hidden` bytes per
/// token of the text and `4 * hidden * layers` per token of a sequence; the heads of both as f32;
/// one layer of weights as f32. The result does not depend on the number of threads.
///
/// Errors: `Argument` if `file` does not belong to this model, has nothing to tune, or for options
/// that are not above 0; those of reading both, of
/// [`Layerwise::new`](upg_kernel::inference::Layerwise::new) and of
/// [`Backward::toward`](upg_kernel::inference::Backward::toward); `Invalid` if there was no gain;
/// `Io`; `Interrupted`. Nothing is written after an error.
pub fn tune(
    source: &dyn Source,
    file: &UpgFile,
    calibration: &Calibration,
    options: TuneOptions,
    out: &Path,
    progress: &dyn Progress,
) -> Result<TuneReport> {
    let started = Instant::now();
    let TuneOptions { passes, rate } = options;
    if passes == 0 || !(rate > 0.0 && rate < 1.0) {
        let message = format!("{passes} passes with the rate {rate}");
        return Err(Error::new(ErrorKind::Argument, message)
            .hint("use at least one pass, and a rate above 0 and below 1"));
    }
    let whole = AtomicFile::create_from(out, source.own_files())?;
    check_room(file, out)?;
    check_origin(source, file)?;
    let of_file = |e: Error| e.at(file.path());
    let mut student = Student::new(file).map_err(of_file)?;
    let window = calibration.window();
    let sequences: Vec<&[u32]> = calibration.tokens().chunks_exact(window).collect();
    let held_out = sequences.len() / HELD_OUT;
    let learned = sequences.len() - held_out;
    let in_layers: u64 = student.matrices.iter().map(|(_, weights)| weights).sum();
    progress.start((passes * learned) as u64 * in_layers);
    let teacher = Teacher::new(source, calibration, progress)?;
    // Without held-out sequences, training sequences must do.
    let checked = match held_out {
        0 => 0..learned.min(MOST_CHECKED),
        n => learned..learned + n.min(MOST_CHECKED),
    };
    let divergence_of = |student: &Student<'_>| -> Result<f64> {
        let of_sequence =
            |i: usize| student.divergence(sequences[i], teacher.of(i), &teacher.head, progress);
        let sum: f64 = checked.clone().map(of_sequence).sum::<Result<_>>()?;
        Ok(sum / (checked.len() * window) as f64)
    };
    let before = divergence_of(&student).map_err(of_file)?;

    let of_passes = learn_all(
        &mut student,
        &sequences[..learned],
        &teacher,
        options,
        progress,
    );
    let of_passes = of_passes.map_err(too_fast).map_err(of_file)?;
    let after = divergence_of(&student);
    let after = after.map_err(too_fast).map_err(of_file)?;
    // NaN is no gain either.
    if !matches!(after.partial_cmp(&before), Some(Ordering::Less)) {
        let message =
            format!("no gain: the divergence from the original was {before:.6}, and is {after:.6}");
        return Err(Error::new(ErrorKind::Invalid, message)
            .at(file.path())
            .hint("use a lower rate or a longer text; the file stays as it is"));
    }
    let recipe = json!({
        "tool": concat!("upg ", env!("CARGO_PKG_VERSION")),
        "calibration": calibration.to_json(),
        "passes": passes,
        "rate": rate,
    });
    let (file_bytes, weights) = write(&student, source, whole, recipe, progress)?;
    Ok(TuneReport {
        divergence: (before, after),
        passes: of_passes,
        parameters: student.parameters.iter().map(|p| p.factors.len()).sum(),
        file_bytes,
        weights,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Runs all passes over these sequences, the first ones of the teacher.
///
/// Returns the divergence of each pass.
fn learn_all(
    student: &mut Student<'_>,
    sequences: &[&[u32]],
    teacher: &Teacher,
    options: TuneOptions,
    progress: &dyn Progress,
) -> Result<Vec<f64>> {
    let steps = options.passes * sequences.len();
    let mut random = ChaCha8Rng::seed_from_u64(ORDER_SEED);
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    let mut of_passes = Vec::new();
    let mut step = 0;
    for _ in 0..options.passes {
        shuffle(&mut order, &mut random);
        let (mut sum, mut positions) = (0.0, 0);
        for &i in &order {
            step += 1;
            sum += student.learn(sequences[i], teacher.of(i), &teacher.head, progress)?;
            positions += sequences[i].len();
            student.step(step, options.rate * share_of_rate(step, steps))?;
        }
        of_passes.push(sum / positions as f64);
    }
    Ok(of_passes)
}

/// Adds a hint to the error for non-finite numbers: the steps were too large.
fn too_fast(e: Error) -> Error {
    match e.kind() {
        ErrorKind::Invalid => e.hint("use a lower rate"),
        _ => e,
    }
}

/// Checks the disk space before hours of work.
///
/// Errors (`Io`): the new file will not fit.
fn check_room(file: &UpgFile, out: &Path) -> Result<()> {
    let free = free(folder_of(out))?;
    match file.file_len() <= free {
        true => Ok(()),
        false => {
            let message = format!("{} bytes will be written, {free} are free", file.file_len());
            Err(Error::new(ErrorKind::Io, message)
                .at(out)
                .hint("make room for it"))
        }
    }
}

/// Returns the factor of the learning rate in step `step` (from 1) of `steps`.
///
/// It rises, then falls along a cosine.
fn share_of_rate(step: usize, steps: usize) -> f64 {
    let (step, steps) = (step as f64, steps as f64);
    (step / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * (step - 1.0) / steps).cos())
}

/// Shuffles in place (Fisher and Yates).
fn shuffle(order: &mut [usize], random: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
}

/// Checks that every matrix of `file` has its shape in `source`.
///
/// Errors (`Argument`): it has another one, or there is none.
fn check_origin(source: &dyn Source, file: &UpgFile) -> Result<()> {
    let shapes: HashMap<&str, &[usize]> = source
        .tensors()
        .iter()
        .map(|t| (t.name.as_str(), t.shape.as_slice()))
        .collect();
    for layer in file.layers() {
        let found = shapes.get(layer.name.as_str());
        if found.is_none_or(|shape| **shape != [layer.rows, layer.cols]) {
            let message = format!(
                "is [{}, {}] in the file, in the original {}",
                layer.rows,
                layer.cols,
                found.map_or("there is none".to_owned(), |shape| format!("{shape:?}"))
            );
            return Err(Error::new(ErrorKind::Argument, message)
                .tensor(&layer.name)
                .at(file.path())
                .hint("pass the model that the file was made from"));
        }
    }
    Ok(())
}

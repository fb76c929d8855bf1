//! Tuning a compressed file: the scales of its rows and the gains of its norms learn to predict what the original predicts.
//!
//! Codes stay as they are, and so does the size of the file but for gains, which are F32 then. The loss is the Kullback-Leibler divergence of the predictions of
//! the original from those of the file, over all positions of a text; its gradients come from a pass back through the
//! compressed model. What rounding loses is mostly not in the scales; but a few of them turn the errors of thousands of codes a
//! little towards what the layers behind can make up for. Learning them after rounding is what AQLM (arXiv 2401.06118) and
//! QuIP# (arXiv 2402.04396) end with.
#![forbid(unsafe_code)]

use crate::encode::matrix::relative_error;
use crate::job::preflight::free;
use crate::plan::recipe::RECIPE;
use crate::progress::Progress;
use crate::sensitivity::calibration::Calibration;
use crate::source::Source;
use crate::source::model::SourceWeights;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::cmp::Ordering;
use std::collections::{BTreeMap, HashMap};
use std::f64::consts::PI;
use std::path::Path;
use std::time::Instant;
use upg_kernel::format::json;
use upg_kernel::format::{
    FileWriter, LayerInfo, TOKENIZER, UpgFile, header_capacity, insert_figures, reserve_figures,
};
use upg_kernel::inference::weights::EMBEDDING;
use upg_kernel::inference::{Backward, Head, Input, Layerwise, ModelConfig, WeightSource};
use upg_kernel::v1::folder_of;
use upg_kernel::{Error, ErrorKind, Matrix, Result, WholeFile};

/// Of Adam (arXiv 1412.6980): how long gradients and their squares are remembered.
const MEMORY: (f64, f64) = (0.9, 0.95);

/// Steps over which the rate rises at the start.
const WARM_UP: f64 = 10.0;

/// One sequence in so many is not learned from, but shows what was won.
const HELD_OUT: usize = 16;

/// At most so many are looked at for that.
const MOST_CHECKED: usize = 4;

/// Of the order in which sequences are taken.
const ORDER_SEED: u64 = 0;

/// How a file is tuned.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct TuneOptions {
    /// How often the text is gone through.
    pub passes: usize,
    /// By which part of itself a scale or gain moves in a step at most, about; it falls to nothing towards the end.
    pub rate: f64,
}

impl TuneOptions {
    /// Options with this number of passes and this rate, everything else at its default.
    pub const fn new(passes: usize, rate: f64) -> Self {
        Self { passes, rate }
    }
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self::new(2, 0.002)
    }
}

/// What tuning gave.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct TuneReport {
    /// The divergence from the original, in nats of a position, before and after, of sequences that were held out; if the
    /// text has too few, of some that it learned from.
    pub divergence: (f64, f64),
    /// As it was met in each pass: of each sequence before what it taught.
    pub passes: Vec<f64>,
    /// Scales and gains that were learned.
    pub parameters: usize,
    /// Bytes of the new file.
    pub file_bytes: u64,
    /// Weights of the model.
    pub weights: u64,
    /// Of the whole work.
    pub seconds: f64,
}

/// Tunes `file`, which was made of the model in `source`, on the text of `calibration`, and writes it to `out`, which may be
/// the same file.
///
/// Each sequence of the text is a step: forwards and backwards through the compressed model; but one in 16 is held out, and
/// nothing is written if the divergence of those has not fallen. Cost: a pass is about as
/// much as running the original over the text for a calibration. Memory: `4 * hidden` bytes a token of the text and
/// `4 * hidden * layers` a token of a sequence; the heads of both as f32; one layer of weights as f32. The result does not
/// depend on the number of threads.
///
/// Errors: `Argument` if `file` is not of this model, has nothing to tune, or for options that are not above 0; those
/// of reading both, of [`Layerwise::new`] and of [`Backward::toward`]; `Invalid` if nothing was won; `Io`; `Interrupted`. Nothing is written after an error.
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
    let whole = WholeFile::create_from(out, source.own_files())?;
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
    // Where none are held out, what was learned from has to do.
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
    // Not a number is no gain either.
    if !matches!(after.partial_cmp(&before), Some(Ordering::Less)) {
        let message = format!(
            "nothing was won: the divergence from the original was {before:.6}, and is {after:.6}"
        );
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
    let (file_bytes, weights) = student.write(source, whole, recipe, progress)?;
    Ok(TuneReport {
        divergence: (before, after),
        passes: of_passes,
        parameters: student.parameters.iter().map(|p| p.factors.len()).sum(),
        file_bytes,
        weights,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// All passes over these sequences, the first ones of `wanted`. Returns the divergence of each pass.
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

/// What numbers that are not finite say of steps.
fn too_fast(e: Error) -> Error {
    match e.kind() {
        ErrorKind::Invalid => e.hint("use a lower rate"),
        _ => e,
    }
}

/// Errors (`Io`): the new file will not fit, which is better known hours before.
fn check_room(file: &UpgFile, out: &Path) -> Result<()> {
    let free = free(folder_of(out))?;
    match file.file_len() <= free {
        true => Ok(()),
        false => {
            let message = format!(
                "{} bytes are to be written, {free} are free",
                file.file_len()
            );
            Err(Error::new(ErrorKind::Io, message)
                .at(out)
                .hint("make room for it"))
        }
    }
}

/// Of the rate, in step `step` (from 1) of `steps`: it rises, then falls along a cosine.
fn share_of_rate(step: usize, steps: usize) -> f64 {
    let (step, steps) = (step as f64, steps as f64);
    (step / WARM_UP).min(1.0) * 0.5 * (1.0 + (PI * (step - 1.0) / steps).cos())
}

/// Fisher and Yates's.
fn shuffle(order: &mut [usize], random: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        order.swap(i, (random.next_u64() % (i as u64 + 1)) as usize);
    }
}

/// Errors (`Argument`): a matrix of `file` is not one of `source`, of the same shape.
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
                .hint("pass the model that the file was made of"));
        }
    }
    Ok(())
}

/// What the original makes of the text: the last hidden states, and what predicts by them.
struct Teacher {
    head: Head,
    /// `[tokens, hidden]`.
    hidden: Vec<f32>,
    /// Values of a sequence.
    of_sequence: usize,
}

impl Teacher {
    fn new(
        source: &dyn Source,
        calibration: &Calibration,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let config = source.files().config()?;
        let source = SourceWeights(source);
        let embedding = source.matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
        let (tokens, window) = (calibration.tokens(), calibration.window());
        let mut run = Layerwise::new(config.clone(), &embedding, tokens, window)?;
        drop(embedding);
        for index in 0..config.num_layers {
            run.layer(index, &source, &mut |_, _, _| progress.check_interrupt())?;
        }
        Ok(Self {
            head: Head::new(&config, &source)?,
            hidden: run.into_hidden(),
            of_sequence: window * config.hidden_size,
        })
    }

    fn of(&self, sequence: usize) -> &[f32] {
        &self.hidden[sequence * self.of_sequence..][..self.of_sequence]
    }
}

/// Scales of a matrix, or gains of a norm, and what is learned of them.
struct Parameter {
    /// As they are in the file.
    original: Vec<f32>,
    /// What these are multiplied by.
    factors: Vec<f32>,
    /// Of the factors, for the sequence that is looked at.
    gradients: Vec<f32>,
    /// Adam's means of gradients and of their squares.
    means: Vec<(f64, f64)>,
}

impl Parameter {
    fn new(original: Vec<f32>) -> Self {
        let n = original.len();
        Self {
            original,
            factors: vec![1.0; n],
            gradients: vec![0.0; n],
            means: vec![(0.0, 0.0); n],
        }
    }

    fn values(&self) -> Vec<f32> {
        let pairs = self.original.iter().zip(&self.factors);
        pairs.map(|(original, factor)| original * factor).collect()
    }

    /// One step of Adam, the one of number `step`. The gradients begin anew.
    ///
    /// Errors (`Invalid`): one of them is not finite.
    fn step(&mut self, step: usize, rate: f64) -> Result<()> {
        if let Some(bad) = self.gradients.iter().find(|g| !g.is_finite()) {
            let message = format!("the gradient of a scale is {bad}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let unbiased = |memory: f64| 1.0 - memory.powi(step as i32);
        let of_means = (unbiased(MEMORY.0), unbiased(MEMORY.1));
        let all = self.factors.iter_mut().zip(&mut self.gradients);
        for ((factor, gradient), (mean, square)) in all.zip(&mut self.means) {
            let g = f64::from(std::mem::take(gradient));
            *mean += (1.0 - MEMORY.0) * (g - *mean);
            *square += (1.0 - MEMORY.1) * (g * g - *square);
            let size = (*square / of_means.1).sqrt();
            if size > 0.0 {
                *factor -= (rate * *mean / of_means.0 / size) as f32;
            }
        }
        Ok(())
    }
}

/// The compressed model, as far as it has learned.
struct Student<'a> {
    file: &'a UpgFile,
    config: ModelConfig,
    parameters: Vec<Parameter>,
    /// Which of them are of a tensor.
    by_name: HashMap<String, usize>,
    /// Of the layers, by their names, and how many weights each has.
    matrices: Vec<(String, u64)>,
}

impl<'a> Student<'a> {
    fn new(file: &'a UpgFile) -> Result<Self> {
        let config_json = file.metadata("config.json").ok_or_else(|| {
            Error::new(ErrorKind::Missing, "no config.json in the file").at(file.path())
        })?;
        let config = ModelConfig::from_json(config_json, file.metadata("generation_config.json"))?;
        let mut student = Self {
            file,
            parameters: Vec::new(),
            by_name: HashMap::new(),
            matrices: Vec::new(),
            config,
        };
        for (id, layer) in file.layers().iter().enumerate() {
            let matrix = file.matrix(id)?;
            if let (Some(_), Some(scales)) = (Input::of(&layer.name), matrix.scales()) {
                student.add(&layer.name, scales.to_vec());
                let weights = layer.rows as u64 * layer.cols as u64;
                student.matrices.push((layer.name.clone(), weights));
            }
        }
        if student.parameters.is_empty() {
            let message = "no matrix of its layers is compressed, so there is nothing to tune";
            return Err(Error::new(ErrorKind::Argument, message).at(file.path()));
        }
        for layer in 0..student.config.num_layers {
            for norm in [INPUT_NORM, FEED_FORWARD_NORM] {
                student.add_norm(&norm_name(layer, norm))?;
            }
        }
        student.add_norm(LAST_NORM)?;
        Ok(student)
    }

    fn add(&mut self, name: &str, original: Vec<f32>) {
        self.by_name.insert(name.to_owned(), self.parameters.len());
        self.parameters.push(Parameter::new(original));
    }

    fn add_norm(&mut self, name: &str) -> Result<()> {
        let gains = self.file.kept_vector(name)?;
        self.add(name, gains);
        Ok(())
    }

    fn tuned(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name).map(|&i| &self.parameters[i])
    }

    /// Adds to the gradients of what `name` has, those of its values times these.
    fn add_gradients(&mut self, name: &str, of_gains: &[f32]) {
        if let Some(&i) = self.by_name.get(name) {
            let parameter = &mut self.parameters[i];
            let pairs = of_gains.iter().zip(&parameter.original);
            let gradients = parameter.gradients.iter_mut();
            gradients
                .zip(pairs)
                .for_each(|(sum, (g, original))| *sum += g * original);
        }
    }

    /// The predictions for a sequence, to go back from, and their divergence from what is wanted, the sum over positions.
    /// `observe` gets the hidden states before each layer.
    fn predict(
        &self,
        tokens: &[u32],
        wanted_hidden: &[f32],
        wanted: &Head,
        progress: &dyn Progress,
        mut observe: impl FnMut(&[f32]),
    ) -> Result<(Backward, f64)> {
        let (config, len) = (&self.config, tokens.len());
        let embedding = self.matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
        let mut run = Layerwise::new(config.clone(), &embedding, tokens, len)?;
        for index in 0..config.num_layers {
            observe(run.hidden());
            run.layer(index, self, &mut |_, _, _| progress.check_interrupt())?;
        }
        let hidden = run.hidden();
        Backward::toward(config.clone(), self, hidden, len, wanted, wanted_hidden)
    }

    fn divergence(
        &self,
        tokens: &[u32],
        wanted_hidden: &[f32],
        wanted: &Head,
        progress: &dyn Progress,
    ) -> Result<f64> {
        let predicted = self.predict(tokens, wanted_hidden, wanted, progress, |_| ())?;
        Ok(predicted.1)
    }

    /// Takes the gradients of a sequence. Returns its divergence from what is wanted, the sum over its positions.
    fn learn(
        &mut self,
        tokens: &[u32],
        wanted_hidden: &[f32],
        wanted: &Head,
        progress: &dyn Progress,
    ) -> Result<f64> {
        let mut states = Vec::new();
        let keep = |hidden: &[f32]| states.push(hidden.to_vec());
        let (mut back, divergence) = self.predict(tokens, wanted_hidden, wanted, progress, keep)?;
        self.add_gradients(LAST_NORM, back.of_last_gain());
        for (index, hidden) in states.into_iter().enumerate().rev() {
            let prefix = format!("model.layers.{index}.");
            progress.tensor(&prefix[..prefix.len() - 1]);
            let mut of_rows = Vec::new();
            let gains = back.layer(index, self, &hidden, &mut |input, x, gradients| {
                progress.check_interrupt()?;
                of_rows.extend(self.row_gradients(index, input, x, gradients)?);
                Ok(())
            })?;
            for (name, gradients) in of_rows {
                let i = self.by_name[&name];
                self.parameters[i].gradients = gradients;
            }
            self.add_gradients(&norm_name(index, INPUT_NORM), &gains.input);
            self.add_gradients(&norm_name(index, FEED_FORWARD_NORM), &gains.feed_forward);
            let of_layer = self
                .matrices
                .iter()
                .filter(|(name, _)| name.starts_with(&prefix));
            progress.advance(of_layer.map(|(_, weights)| weights).sum());
        }
        Ok(divergence)
    }

    /// Gradients of the factors of the rows of the matrices with this input: of each row the sum of its outputs times their
    /// gradients, by its factor.
    fn row_gradients(
        &self,
        layer: usize,
        input: Input,
        x: &[f32],
        gradients: &[f32],
    ) -> Result<Vec<(String, Vec<f32>)>> {
        let parts = input.matrices(&self.config);
        let width: usize = parts.iter().map(|(_, rows)| rows).sum();
        let n = gradients.len() / width;
        let (mut found, mut first) = (Vec::new(), 0);
        for (part, rows) in parts {
            let name = format!("model.layers.{layer}.{part}.weight");
            if let Some(parameter) = self.tuned(&name) {
                let outputs = self.matrix(&name, rows, x.len() / n)?.spmm(x, n)?;
                let mut sums = vec![0.0f64; rows];
                for (outputs, gradients) in outputs
                    .chunks_exact(rows)
                    .zip(gradients.chunks_exact(width))
                {
                    let pairs = outputs.iter().zip(&gradients[first..first + rows]);
                    sums.iter_mut()
                        .zip(pairs)
                        .for_each(|(sum, (y, g))| *sum += f64::from(*y) * f64::from(*g));
                }
                let pairs = sums.iter().zip(&parameter.factors);
                // A factor of 0 has made outputs of 0, which say nothing.
                let of_factors = pairs.map(|(sum, factor)| match *factor {
                    0.0 => 0.0,
                    factor => (sum / f64::from(factor)) as f32,
                });
                found.push((name, of_factors.collect()));
            }
            first += rows;
        }
        Ok(found)
    }

    fn step(&mut self, step: usize, rate: f64) -> Result<()> {
        let parameters = self.parameters.par_iter_mut();
        parameters.map(|p| p.step(step, rate)).collect()
    }

    /// Bytes of the file, and weights.
    fn write(
        &self,
        source: &dyn Source,
        out: WholeFile,
        tuned: Value,
        progress: &dyn Progress,
    ) -> Result<(u64, u64)> {
        let file = self.file;
        // Their errors are measured again.
        let mut layers: Vec<LayerInfo> = file.layers().to_vec();
        layers.iter_mut().for_each(|layer| layer.error = None);
        let mut metadata = file.all_metadata().clone();
        // What the writer counts by itself.
        for key in ["layers", "checksums"] {
            metadata.remove(key);
        }
        metadata.insert(RECIPE.to_owned(), self.recipe(tuned));
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
            let matrix = self.matrix(&layer.name, layer.rows, layer.cols)?;
            layer.error = match (self.tuned(&layer.name), indices.get(layer.name.as_str())) {
                (Some(_), Some(&index)) => {
                    let error = relative_error(&source.read_f32(index)?, &matrix);
                    Some(error.map_err(|e| e.tensor(&layer.name))?)
                }
                _ => file.layers()[id].error,
            };
            writer.layer(id, layer, &matrix)?;
        }
        for (name, dtype, shape) in file.kept() {
            match self.tuned(name) {
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

    /// How the file was made before, and how it was tuned.
    fn recipe(&self, tuned: Value) -> String {
        let before = self.file.metadata(RECIPE).unwrap_or_default();
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
}

impl WeightSource for Student<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = WeightSource::matrix(self.file, name, rows, cols)?;
        match self.tuned(name) {
            Some(scales) => matrix
                .with_scales(scales.values())
                .map_err(|e| e.tensor(name)),
            None => Ok(matrix),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        match self.tuned(name) {
            Some(gains) => Ok(gains.values()),
            None => self.file.vector(name, len),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.file.contains(name)
    }
}

const INPUT_NORM: &str = "input_layernorm";
const FEED_FORWARD_NORM: &str = "post_attention_layernorm";
const LAST_NORM: &str = "model.norm.weight";

fn norm_name(layer: usize, norm: &str) -> String {
    format!("model.layers.{layer}.{norm}.weight")
}

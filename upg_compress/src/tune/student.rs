//! Compressed model during training.
#![forbid(unsafe_code)]

use super::parameter::Parameter;
use crate::progress::Progress;
use rayon::prelude::*;
use std::collections::HashMap;
use upg_kernel::format::UpgFile;
use upg_kernel::inference::weights::EMBEDDING;
use upg_kernel::inference::{Backward, Head, LayerInput, Layerwise, ModelConfig, WeightSource};
use upg_kernel::{Error, ErrorKind, Matrix, Result};

/// Compressed model with the current state of its training.
pub(super) struct Student<'a> {
    pub(super) file: &'a UpgFile,
    config: ModelConfig,
    pub(super) parameters: Vec<Parameter>,
    /// Index of the parameter of each tensor.
    by_name: HashMap<String, usize>,
    /// Names of the matrices in the layers, with their numbers of weights.
    pub(super) matrices: Vec<(String, u64)>,
}

impl<'a> Student<'a> {
    pub(super) fn new(file: &'a UpgFile) -> Result<Self> {
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
            if let (Some(_), Some(scales)) = (LayerInput::of(&layer.name), matrix.scales()) {
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

    pub(super) fn tuned(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name).map(|&i| &self.parameters[i])
    }

    /// Adds the gradients of the values of `name`, times these values, to those of its factors.
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

    /// Predicts a sequence; returns the start of the backward pass and the divergence
    /// from the teacher.
    ///
    /// The divergence is summed over positions. `observe` gets the hidden states before each layer.
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

    pub(super) fn divergence(
        &self,
        tokens: &[u32],
        wanted_hidden: &[f32],
        wanted: &Head,
        progress: &dyn Progress,
    ) -> Result<f64> {
        let predicted = self.predict(tokens, wanted_hidden, wanted, progress, |_| ())?;
        Ok(predicted.1)
    }

    /// Computes the gradients of a sequence.
    ///
    /// Returns its divergence from the teacher, summed over its positions.
    pub(super) fn learn(
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

    /// Returns the gradients of the row factors of the matrices with this input.
    ///
    /// The gradient of a row is the sum of its outputs times their gradients,
    /// divided by its factor.
    fn row_gradients(
        &self,
        layer: usize,
        input: LayerInput,
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
                // A factor of 0 has made outputs of 0, which carry no information.
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

    pub(super) fn step(&mut self, step: usize, rate: f64) -> Result<()> {
        let parameters = self.parameters.par_iter_mut();
        parameters.map(|p| p.step(step, rate)).collect()
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

//! Measurement of sensitivities: forward and backward passes of the model over a text.
#![forbid(unsafe_code)]

use super::calibration::Calibration;
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use crate::source::Source;
use crate::source::model::SourceWeights;
use rayon::prelude::*;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use upg_kernel::inference::weights::EMBEDDING;
use upg_kernel::inference::{Backward, LayerInput, Layerwise, ModelConfig, WeightSource};
use upg_kernel::{Error, ErrorKind, Result};

/// Seed of the random factors of the logits in the backward pass.
const DRAWING_SEED: u64 = 0;

/// Curvatures of the matrices of a model, from the last layer to the first.
pub struct Calibrator<'a> {
    source: SourceWeights<'a, dyn Source + 'a>,
    config: ModelConfig,
    states: States,
    run: Backward,
    /// Number of layers that the backward pass has not passed yet.
    left: usize,
    /// Curvatures of the matrices of the last layer that was passed.
    found: HashMap<String, Arc<Curvature>>,
}

impl<'a> Calibrator<'a> {
    /// Runs the forward pass of the model in `source`;
    /// the backward pass then starts at its last layer.
    ///
    /// Memory: `8 * hidden` bytes per token, one layer of weights as f32, that of
    /// [`Curvature::new`] for each of its matrices, and that of a pass over 2,048 positions; during
    /// this call also the embedding as f32, twice. Temporary files: `4 * hidden * layers` bytes per
    /// token. Errors: those of the source, of [`Layerwise::new`] and of [`Backward::new`]; `Io`;
    /// `Interrupted`.
    pub fn new(
        source: &'a dyn Source,
        calibration: &Calibration,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let config = source.files().config()?;
        let source = SourceWeights(source);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = source.matrix(EMBEDDING, vocab, hidden)?;
        let (tokens, window) = (calibration.tokens(), calibration.window());
        let mut run = Layerwise::new(config.clone(), &embedding, tokens, window)?;
        drop(embedding);
        let mut states = States::new(run.hidden().len())?;
        for index in 0..config.num_layers {
            states.push(run.hidden())?;
            run.layer(index, &source, &mut |_, _, _| progress.check_interrupt())?;
        }
        let seed = DRAWING_SEED;
        Ok(Self {
            run: Backward::new(config.clone(), &source, run.hidden(), window, seed)?,
            left: config.num_layers,
            source,
            config,
            states,
            found: HashMap::new(),
        })
    }

    /// Returns the curvature of the matrix `name`; `None` if it is not in a layer of the model.
    ///
    /// Layers must be requested from the last to the first.
    ///
    /// Errors: those of the source; `Invalid` if the model gives non-finite numbers; `Argument` for
    /// a layer after the last requested one; `Io`; `Interrupted`.
    pub fn curvature(
        &mut self,
        name: &str,
        progress: &dyn Progress,
    ) -> Result<Option<Arc<Curvature>>> {
        let Some((layer, _)) = LayerInput::of(name) else {
            return Ok(None);
        };
        if layer >= self.config.num_layers {
            return Ok(None);
        }
        if layer > self.left {
            let message = format!("layer {layer} after layer {}", self.left);
            return Err(Error::new(ErrorKind::Argument, message));
        }
        while self.left > layer {
            self.found.clear();
            self.pass(self.left - 1, layer, progress)?;
            self.left -= 1;
        }
        Ok(self.found.get(name).cloned())
    }

    /// Passes layer `index`; collects its curvatures if it is the `asked` layer.
    fn pass(&mut self, index: usize, asked: usize, progress: &dyn Progress) -> Result<()> {
        let Self {
            source,
            config,
            states,
            run,
            ..
        } = self;
        let hidden = states.pop()?;
        let mut found: HashMap<String, Curvature> = HashMap::new();
        run.layer(index, source, &hidden, &mut |input, x, gradients| {
            progress.check_interrupt()?;
            if index != asked {
                return Ok(());
            }
            let parts = input.matrices(config);
            let width: usize = parts.iter().map(|(_, rows)| rows).sum();
            let cols = x.len() / (gradients.len() / width);
            // Taken out of the map, so that all matrices of an input can be updated at once.
            let mut first = 0;
            let mut curvatures = Vec::new();
            for (part, rows) in parts {
                let name = format!("model.layers.{index}.{part}.weight");
                let curvature = found.remove(&name);
                let curvature = curvature.unwrap_or_else(|| Curvature::new(rows, cols));
                curvatures.push((name, curvature, first..first + rows));
                first += rows;
            }
            curvatures
                .par_iter_mut()
                .try_for_each(|(_, curvature, columns)| {
                    let of_part = gradients.chunks_exact(width);
                    let of_part = of_part.flat_map(|row| &row[columns.clone()]);
                    curvature.add(x, &of_part.copied().collect::<Vec<f32>>())
                })?;
            found.extend(
                curvatures
                    .into_iter()
                    .map(|(name, curvature, _)| (name, curvature)),
            );
            Ok(())
        })?;
        let found = found.into_iter();
        self.found = found.map(|(name, c)| (name, Arc::new(c))).collect();
        Ok(())
    }
}

/// Hidden states before each layer, the last ones first, in a temporary file.
struct States {
    file: File,
    /// Number of values per layer.
    values: usize,
    layers: u64,
}

impl States {
    fn new(values: usize) -> Result<Self> {
        Ok(Self {
            file: tempfile::tempfile().map_err(States::error)?,
            values,
            layers: 0,
        })
    }

    fn push(&mut self, hidden: &[f32]) -> Result<()> {
        self.layers += 1;
        let bytes = bytemuck::cast_slice(hidden);
        self.file.write_all(bytes).map_err(States::error)
    }

    fn pop(&mut self) -> Result<Vec<f32>> {
        let mut hidden = vec![0.0f32; self.values];
        self.layers -= 1;
        let at = self.layers * (self.values * size_of::<f32>()) as u64;
        let read = self.file.seek(SeekFrom::Start(at));
        read.and_then(|_| self.file.read_exact(bytemuck::cast_slice_mut(&mut hidden)))
            .and_then(|()| self.file.set_len(at))
            .map_err(States::error)?;
        Ok(hidden)
    }

    fn error(e: io::Error) -> Error {
        Error::new(ErrorKind::Io, format!("a temporary file of hidden states: {e}"))
            .hint("TMPDIR names the folder of such files; it needs 4 bytes per token, layer and hidden value")
    }
}

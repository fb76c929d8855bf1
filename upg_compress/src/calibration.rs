//! What the matrices of a model are multiplied with: the model is run over a text, a layer at a time.
#![forbid(unsafe_code)]

use crate::hessian::Hessian;
use crate::progress::Progress;
use crate::source::Source;
use std::collections::HashMap;
use upg_kernel::inference::tokenizer::{SpecialIds, Tokenizer};
use upg_kernel::inference::weights::shape_mismatch;
use upg_kernel::inference::{Input, Layerwise, WeightSource};
use upg_kernel::matrix::{DenseMatrix, DenseValues, Matrix};
use upg_kernel::{Error, ErrorKind, Result};

/// Tokens of a sequence, unless the model takes fewer.
const WINDOW: usize = 512;

/// Most tokens of a calibration: their hidden states stay in memory.
const MAX_TOKENS: usize = 1 << 18;

/// What a model is run over: sequences of tokens, each by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calibration {
    tokens: Vec<u32>,
    window: usize,
}

impl Calibration {
    /// Sequences of `window` tokens each. What is left at the end is not used.
    ///
    /// Errors: `Argument` if there is not one whole sequence; `TooLarge` above 262,144 tokens, whose hidden states would
    /// be too many to hold.
    pub fn new(mut tokens: Vec<u32>, window: usize) -> Result<Self> {
        if window == 0 || tokens.len() < window {
            let message = format!(
                "the calibration text has {} tokens, a sequence {window}",
                tokens.len()
            );
            return Err(Error::new(ErrorKind::Argument, message).hint("use a longer text"));
        }
        if tokens.len() > MAX_TOKENS {
            let message = format!(
                "the calibration text has {} tokens, the cap is {MAX_TOKENS}",
                tokens.len()
            );
            return Err(Error::new(ErrorKind::TooLarge, message).hint("use a shorter text"));
        }
        tokens.truncate(tokens.len() / window * window);
        Ok(Self { tokens, window })
    }

    /// A text as the tokenizer of the model in `source` cuts it, in sequences of 512 tokens, or of as many as the model
    /// takes at most.
    ///
    /// Errors: those of the tokenizer and of [`Calibration::new`]; `Missing` if the source has no tokenizer.
    pub fn of_text(source: &dyn Source, text: &str) -> Result<Self> {
        let files = source.files();
        let json = files.tokenizer_json.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Missing, "the model has no tokenizer")
                .hint("calibration needs one: put tokenizer.json beside the weights")
        })?;
        let config = files.config()?;
        let special = SpecialIds::from(&config);
        let tokenizer =
            Tokenizer::from_json(json, files.tokenizer_config_json.as_deref(), special)?;
        let tokens = tokenizer.encode(text, true)?;
        Self::new(tokens, WINDOW.min(config.context))
    }

    /// All tokens, one sequence after the other.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of a sequence.
    pub fn window(&self) -> usize {
        self.window
    }
}

/// The inputs of the layers of a model, one layer after the other.
pub struct Calibrator<'a> {
    source: Weights<'a>,
    run: Layerwise,
    /// Layers of the model.
    layers: usize,
    /// The layer that the Hessians are of.
    layer: Option<usize>,
    hessians: HashMap<Input, Hessian>,
}

impl<'a> Calibrator<'a> {
    /// Before the first layer of the model in `source`.
    ///
    /// Memory: `4 * hidden` bytes a token, one layer of weights as f32, of its Hessians `4 * cols * cols` bytes
    /// each, and what a pass over 2,048 positions takes; here also the embedding as f32.
    /// Errors: those of the source and of [`Layerwise::new`].
    pub fn new(source: &'a dyn Source, calibration: &Calibration) -> Result<Self> {
        let config = source.files().config()?;
        let source = Weights(source);
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = source.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let Calibration { tokens, window } = calibration;
        Ok(Self {
            source,
            layers: config.num_layers,
            run: Layerwise::new(config, &embedding, tokens, *window)?,
            layer: None,
            hessians: HashMap::new(),
        })
    }

    /// The Hessian of the inputs of the matrix `name`; `None` if it is not in a layer of the model. Layers
    /// have to be asked for in their order.
    ///
    /// Errors: those of the source; `Invalid` if the model gives numbers that are not finite; `Argument` for a layer
    /// before the last one; `Interrupted`.
    pub fn hessian(&mut self, name: &str, progress: &dyn Progress) -> Result<Option<&Hessian>> {
        let Some((layer, input)) = Input::of(name) else {
            return Ok(None);
        };
        if layer >= self.layers {
            return Ok(None);
        }
        if let Some(last) = self.layer.filter(|&last| layer < last) {
            let message = format!("layer {layer} after layer {last}");
            return Err(Error::new(ErrorKind::Argument, message));
        }
        for index in self.layer.map_or(0, |last| last + 1)..=layer {
            self.hessians.clear();
            let hessians = &mut self.hessians;
            self.run.layer(index, &self.source, &mut |input, n, x| {
                progress.proceed()?;
                // Of layers that are passed over only the hidden states are wanted.
                if index < layer {
                    return Ok(());
                }
                let cols = x.len() / n;
                hessians
                    .entry(input)
                    .or_insert_with(|| Hessian::new(cols))
                    .add(x)
            })?;
            self.layer = Some(index);
        }
        Ok(self.hessians.get(&input))
    }
}

/// The weights of a source as f32.
struct Weights<'a>(&'a dyn Source);

impl Weights<'_> {
    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensors = self.0.tensors();
        let index = tensors
            .iter()
            .position(|t| t.name == name)
            .ok_or_else(|| Error::new(ErrorKind::Missing, "is not in the model").tensor(name))?;
        match tensors[index].shape == shape {
            true => self.0.read_f32(index),
            false => Err(shape_mismatch(name, &tensors[index].shape, shape)),
        }
    }
}

impl WeightSource for Weights<'_> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let values = DenseValues::F32(self.read(name, &[rows, cols])?.into());
        Ok(Matrix::Dense(DenseMatrix::new(rows, cols, values)?))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.read(name, &[len])
    }

    fn contains(&self, name: &str) -> bool {
        self.0.tensors().iter().any(|t| t.name == name)
    }
}

//! Weights of a decoder, fetched by their Hugging Face names with the required shapes.
#![forbid(unsafe_code)]

use super::config::ModelConfig;
use crate::device::{Device, Linear, Norm};
use crate::error::{Error, ErrorKind, Result};
use crate::format::UpgFile;
use crate::matrix::Matrix;

/// Name of the embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of an output head that is not the embedding.
pub const HEAD: &str = "lm_head.weight";

/// Source of weights: a UPG file, a directory of safetensors, a test.
///
/// Names are those of Hugging Face checkpoints, such as `model.layers.0.self_attn.q_proj.weight`.
pub trait WeightSource {
    /// Returns the matrix `name` of `[rows, cols]`, in whatever encoding it is stored.
    ///
    /// Errors: `Missing`, or `Shape` with both shapes ([`shape_mismatch`]).
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix>;

    /// Returns the vector `name` of `len` values, widened to f32.
    ///
    /// Errors: `Missing`, or `Shape` with both lengths.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// Returns whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;
}

impl WeightSource for UpgFile {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = match self.layer_id(name) {
            Some(id) => UpgFile::matrix(self, id)?.clone(),
            None => Matrix::Dense(self.kept_matrix(name)?),
        };
        let found = [matrix.rows(), matrix.cols()];
        if found != [rows, cols] {
            return Err(shape_mismatch(name, &found, &[rows, cols]));
        }
        Ok(matrix)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let vector = self.kept_vector(name)?;
        if vector.len() != len {
            return Err(shape_mismatch(name, &[vector.len()], &[len]));
        }
        Ok(vector)
    }

    fn contains(&self, name: &str) -> bool {
        self.layer_id(name).is_some() || self.bytes(name).is_some()
    }
}

/// Returns the error for a tensor of an unexpected shape.
pub fn shape_mismatch(name: &str, found: &[usize], expected: &[usize]) -> Error {
    Error::new(
        ErrorKind::Shape,
        format!("has the shape {found:?}, config.json asks for {expected:?}"),
    )
    .tensor(name)
}

/// Weights of a model: as the source has them, or as a device holds them.
#[derive(Debug)]
pub(crate) struct Weights<W = Matrix, V = Vec<f32>> {
    /// Embedding `[vocab, hidden]`.
    pub(crate) embedding: W,
    pub(crate) layers: Vec<Layer<W, V>>,
    pub(crate) norm: Norm<V>,
    /// Output head `[vocab, hidden]`; shares its storage with the embedding if the two are tied.
    pub(crate) head: Linear<W, V>,
}

/// Weights of one decoder layer.
///
/// Matrices with the same input are in one list: either one for each output, or a fused one whose
/// rows are the outputs one after the other.
#[derive(Debug)]
pub(crate) struct Layer<W = Matrix, V = Vec<f32>> {
    pub(crate) input_norm: Norm<V>,
    /// Projections of queries, keys, values.
    pub(crate) qkv: Vec<Linear<W, V>>,
    /// Norms of each head of the queries and of the keys.
    pub(crate) head_norms: Option<[Norm<V>; 2]>,
    pub(crate) output: Linear<W, V>,
    pub(crate) mlp_norm: Norm<V>,
    /// Projections gate, up.
    pub(crate) gate_up: Vec<Linear<W, V>>,
    pub(crate) down: Linear<W, V>,
}

/// Last norm and output projection.
#[derive(Debug)]
pub(crate) struct HeadWeights {
    pub(crate) norm: Norm,
    /// Output projection `[vocab, hidden]`.
    pub(crate) matrix: Matrix,
}

impl Linear {
    fn on<D: Device>(self, device: &D) -> Result<Linear<D::Weight, D::Vector>> {
        Ok(Linear {
            weight: device.matrix(self.weight)?,
            bias: self.bias.map(|bias| device.vector(bias)).transpose()?,
        })
    }
}

impl Norm {
    fn on<D: Device>(self, device: &D) -> Result<Norm<D::Vector>> {
        Ok(Norm {
            gain: device.vector(self.gain)?,
            eps: self.eps,
        })
    }
}

impl Layer {
    fn on<D: Device>(self, device: &D) -> Result<Layer<D::Weight, D::Vector>> {
        let all = |parts: Vec<Linear>| -> Result<Vec<_>> {
            parts.into_iter().map(|part| part.on(device)).collect()
        };
        let head_norms = match self.head_norms {
            Some([q, k]) => Some([q.on(device)?, k.on(device)?]),
            None => None,
        };
        Ok(Layer {
            input_norm: self.input_norm.on(device)?,
            qkv: all(self.qkv)?,
            head_norms,
            output: self.output.on(device)?,
            mlp_norm: self.mlp_norm.on(device)?,
            gate_up: all(self.gate_up)?,
            down: self.down.on(device)?,
        })
    }
}

/// Source of weights with the config that determines the required ones; checks what the
/// source returns.
struct Loader<'a> {
    source: &'a dyn WeightSource,
    config: &'a ModelConfig,
}

impl Weights {
    /// Fetches every weight that `config` requires.
    ///
    /// Errors: those of the source; `Unsupported` if it has a bias or a norm that the family does
    /// not apply, because leaving it out would give wrong output.
    pub(crate) fn load(config: &ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        let loader = Loader { source, config };
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = loader.matrix(EMBEDDING, vocab, hidden)?;
        let head = loader.head(Some(&embedding))?;
        Ok(Self {
            embedding,
            layers: (0..config.num_layers)
                .map(|index| Layer::load(config, source, index))
                .collect::<Result<_>>()?,
            norm: head.norm,
            head: Linear {
                weight: head.matrix,
                bias: None,
            },
        })
    }

    /// Uploads all weights to a device. Errors: those of the device.
    pub(crate) fn on<D: Device>(self, device: &D) -> Result<Weights<D::Weight, D::Vector>> {
        let layers = self.layers.into_iter().map(|layer| layer.on(device));
        Ok(Weights {
            embedding: device.matrix(self.embedding)?,
            layers: layers.collect::<Result<_>>()?,
            norm: self.norm.on(device)?,
            head: self.head.on(device)?,
        })
    }
}

/// Checks that `source` has every weight that `config` requires, and none that would be ignored.
///
/// Cost: that of fetching all of them. Errors: those of [`Model::load`](super::Model::load).
pub fn check_weights(config: &ModelConfig, source: &dyn WeightSource) -> Result<()> {
    config.check()?;
    Weights::load(config, source).map(drop)
}

impl HeadWeights {
    /// Fetches norm and output projection. Errors: as [`Weights::load`].
    pub(crate) fn load(config: &ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        Loader { source, config }.head(None)
    }
}

impl Layer {
    /// Fetches the weights of layer `index`. Errors: as [`Weights::load`].
    pub(crate) fn load(
        config: &ModelConfig,
        source: &dyn WeightSource,
        index: usize,
    ) -> Result<Self> {
        Loader { source, config }.layer(&format!("model.layers.{index}"))
    }
}

impl Loader<'_> {
    /// Fetches the head; a tied head reuses `embedding` if it is given.
    fn head(&self, embedding: Option<&Matrix>) -> Result<HeadWeights> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        self.refuse("lm_head.bias")?;
        Ok(HeadWeights {
            norm: self.norm("model.norm.weight", hidden)?,
            matrix: match (self.config.tie_word_embeddings, embedding) {
                (true, Some(embedding)) => embedding.clone(),
                (true, None) => self.matrix(EMBEDDING, vocab, hidden)?,
                (false, _) => self.matrix(HEAD, vocab, hidden)?,
            },
        })
    }

    fn layer(&self, prefix: &str) -> Result<Layer> {
        let config = self.config;
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        let (query, kv) = (config.query_size(), config.kv_size());
        let name = |part: &str| format!("{prefix}.{part}");
        let head_norms = ["q_norm", "k_norm"].map(|norm| name(&format!("self_attn.{norm}.weight")));
        let head_norms = if config.family.qk_norm {
            let [q, k] = head_norms.map(|norm| self.norm(&norm, config.head_dim));
            Some([q?, k?])
        } else {
            head_norms.iter().try_for_each(|norm| self.refuse(norm))?;
            None
        };
        Ok(Layer {
            input_norm: self.norm(&name("input_layernorm.weight"), hidden)?,
            qkv: self.joint(
                &name("self_attn"),
                "qkv_proj",
                ["q_proj", "k_proj", "v_proj"],
                [query, kv, kv],
                config.qkv_bias,
            )?,
            head_norms,
            output: self.linear(&name("self_attn.o_proj"), hidden, query, config.output_bias)?,
            mlp_norm: self.norm(&name("post_attention_layernorm.weight"), hidden)?,
            gate_up: self.joint(
                &name("mlp"),
                "gate_up_proj",
                ["gate_proj", "up_proj"],
                [mlp, mlp],
                config.mlp_bias,
            )?,
            down: self.linear(&name("mlp.down_proj"), hidden, mlp, config.mlp_bias)?,
        })
    }

    /// Fetches projections of one input, which are one fused matrix in some families.
    fn joint<const N: usize>(
        &self,
        prefix: &str,
        fused: &str,
        parts: [&str; N],
        outputs: [usize; N],
        bias: bool,
    ) -> Result<Vec<Linear>> {
        let hidden = self.config.hidden_size;
        let linear = |part, rows| self.linear(&format!("{prefix}.{part}"), rows, hidden, bias);
        match self.config.family.fused {
            true => Ok(vec![linear(fused, outputs.iter().sum())?]),
            false => parts
                .into_iter()
                .zip(outputs)
                .map(|(part, rows)| linear(part, rows))
                .collect(),
        }
    }

    fn linear(&self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
        let bias_name = format!("{name}.bias");
        Ok(Linear {
            weight: self.matrix(&format!("{name}.weight"), rows, cols)?,
            bias: match bias {
                true => Some(self.vector(&bias_name, rows)?),
                false => {
                    self.refuse(&bias_name)?;
                    None
                }
            },
        })
    }

    fn norm(&self, name: &str, len: usize) -> Result<Norm> {
        Ok(Norm {
            gain: self.vector(name, len)?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let matrix = self.source.matrix(name, rows, cols)?;
        match (matrix.rows(), matrix.cols()) == (rows, cols) {
            true => Ok(matrix),
            false => Err(shape_mismatch(
                name,
                &[matrix.rows(), matrix.cols()],
                &[rows, cols],
            )),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let vector = self.source.vector(name, len)?;
        match vector.len() == len {
            true => Ok(vector),
            false => Err(shape_mismatch(name, &[vector.len()], &[len])),
        }
    }

    fn refuse(&self, name: &str) -> Result<()> {
        if !self.source.contains(name) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "family '{}' with this config.json does not use it, and without it the output \
                 would be wrong",
                self.config.family.name
            ),
        )
        .tensor(name))
    }
}

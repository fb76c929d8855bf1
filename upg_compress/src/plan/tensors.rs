//! Plan of a file: the encoding of every tensor, in file order.
#![forbid(unsafe_code)]

use crate::encode::encoder::DefaultEmbedding;
use crate::encode::matrix::{encoder, encoder_of};
use crate::encode::prune::check_sparsity;
use crate::plan::options::{Choice, CompressOptions, is_calibrated};
use crate::plan::sparsity::{Sparse, pays};
use crate::source::{Source, TensorInfo};
use std::cmp::Reverse;
use upg_kernel::format::{Encoding, LayerInfo, TOKENIZER, check_kept_name};
use upg_kernel::inference::LayerInput;
use upg_kernel::inference::weights::{EMBEDDING, HEAD};
use upg_kernel::{Error, ErrorKind, Result};

/// Encodings of all tensors, in the order of writing.
pub(crate) struct Plan {
    pub tensors: Vec<PlannedTensor>,
    /// Encoding of embeddings and output head.
    pub embedding: Choice,
    /// Weights of all planned tensors.
    pub weights: u64,
}

/// One tensor of the source; uncompressed if `layer` is `None`.
pub(crate) struct PlannedTensor {
    pub index: usize,
    pub layer: Option<LayerInfo>,
}

impl Plan {
    /// Returns the descriptions of the compressed matrices, without errors yet.
    pub(crate) fn layers(&self) -> Vec<LayerInfo> {
        self.tensors
            .iter()
            .filter_map(|t| t.layer.clone())
            .collect()
    }

    /// Returns the names of the other tensors of the file.
    pub(crate) fn uncompressed_names<'a>(
        &self,
        source: &'a dyn Source,
    ) -> impl Iterator<Item = &'a str> {
        let kept = self.tensors.iter().filter(|t| t.layer.is_none());
        let names = kept.map(|t| source.tensors()[t.index].name.as_str());
        names.chain([TOKENIZER])
    }

    pub(crate) fn new(source: &dyn Source, options: &CompressOptions) -> Result<Self> {
        // A file that no engine could run is not worth hours of work;
        // but a source may have only weights.
        let files = source.files();
        let tied = files.config_json.is_some() && files.config()?.tie_word_embeddings;
        if let Some(group) = options.group.filter(|group| !matches!(group, 32 | 64)) {
            let message = format!("a group of {group} columns");
            return Err(Error::new(ErrorKind::Argument, message).hint("use 32 or 64"));
        }
        let tensors: Vec<(usize, &TensorInfo)> = source
            .tensors()
            .iter()
            .enumerate()
            // The head of a tied model is its embedding; a stored copy is not used.
            .filter(|(_, t)| !(tied && t.name == HEAD))
            .collect();
        let embedding = options
            .embedding
            .unwrap_or_else(|| default_embedding(options.encoding, &tensors));
        let choose = |t: &TensorInfo| {
            let by_place = match options.choices.get(&t.name) {
                _ if is_embedding(t) => embedding,
                Some(encoding) => Choice::Encode(*encoding),
                None => options.encoding,
            };
            let matching = options.overrides.iter().rev().find(|o| o.matches(&t.name));
            matching.map_or(by_place, |o| o.choice)
        };
        for o in &options.overrides {
            let names = || tensors.iter().filter(|(_, t)| is_matrix(t));
            if !names().any(|(_, t)| o.matches(&t.name)) {
                let example = names().next().map_or("none", |(_, t)| t.name.as_str());
                return Err(Error::new(
                    ErrorKind::Argument,
                    format!(
                        "the pattern '{}' matches no matrix of this model",
                        o.pattern
                    ),
                )
                .hint(format!("names look like '{example}'")));
            }
        }
        if tensors.is_empty() {
            return Err(Error::new(ErrorKind::Missing, "the model has no weights"));
        }
        if let Some(sparsity) = options.prune {
            check_sparsity(sparsity)?;
            if options.sparse == Sparse::Never {
                let message = "pruning, but no matrix may be stored sparsely";
                return Err(Error::new(ErrorKind::Argument, message)
                    .hint("leave out --sparse never or --prune"));
            }
            if options.calibration.is_none() {
                let message = "pruning without a calibration text";
                return Err(Error::new(ErrorKind::Argument, message)
                    .hint("pass one: it shows which weights can go, and compensates for them"));
            }
        }
        let planned = |&(index, t): &(usize, &TensorInfo)| {
            let layer = match (is_matrix(t), choose(t)) {
                (true, Choice::Encode(encoding)) => {
                    let encoding = with_zeros(source, index, encoding, options)?;
                    Some(describe_layer(t, encoding, options.group))
                }
                _ => None,
            };
            match &layer {
                Some(layer) => layer.check().map_err(|e| e.tensor(&t.name)),
                None => check_kept_name(&t.name),
            }?;
            Ok(PlannedTensor { index, layer })
        };
        // A file that no reader would open is not worth the work either.
        let mut plan: Vec<PlannedTensor> = tensors.iter().map(planned).collect::<Result<_>>()?;
        if options.calibration.is_some() {
            // Gradients are computed from the last layer to the first.
            let name = |t: &PlannedTensor| source.tensors()[t.index].name.as_str();
            plan.sort_by_key(|t| LayerInput::of(name(t)).map(|(layer, _)| Reverse(layer)));
        }
        let mut choices = tensors
            .iter()
            .filter(|(_, t)| is_matrix(t))
            .map(|(_, t)| choose(t));
        let none_grouped = !choices.any(|choice| match choice {
            Choice::Keep => false,
            Choice::Encode(encoding) => encoder(encoding).takes_group,
        });
        if options.group.is_some() && options.budget.is_none() && none_grouped {
            let message = "a group of columns, but no matrix that becomes q8 or q4";
            return Err(Error::new(ErrorKind::Argument, message).hint("leave it out"));
        }
        let mut layers = plan.iter().filter_map(|t| t.layer.as_ref());
        if options.calibration.is_some() && !layers.any(is_calibrated) {
            let message = "a calibration text, but no matrix that uses it";
            return Err(Error::new(ErrorKind::Argument, message).hint(
                "leave it out, or choose an encoding other than keep and mdcsr for the layers",
            ));
        }
        let mut layers = plan.iter().filter_map(|t| t.layer.as_ref());
        if options.prune.is_some() && !layers.any(is_prunable) {
            let message = "a share to prune, but no matrix that is stored sparsely";
            return Err(Error::new(ErrorKind::Argument, message)
                .hint("leave it out, or choose s8 or s4 for the layers"));
        }
        Ok(Self {
            weights: tensors.iter().map(|(_, t)| t.weights() as u64).sum(),
            embedding,
            tensors: plan,
        })
    }
}

/// Returns whether the weights of a matrix are pruned on request.
pub(crate) fn is_prunable(layer: &LayerInfo) -> bool {
    encoder_of(layer).is_ok_and(|encoder| encoder.stores_zeros) && is_calibrated(layer)
}

/// Returns the encoding of matrix `index` given its present or future zeros.
fn with_zeros(
    source: &dyn Source,
    index: usize,
    encoding: Encoding,
    options: &CompressOptions,
) -> Result<Encoding> {
    let tensor = &source.tensors()[index];
    let Some((sparse, level_bits)) = encoder(encoding).sparse else {
        return Ok(encoding);
    };
    let is_pruned = options.prune.is_some() && LayerInput::of(&tensor.name).is_some();
    let pays = match options.sparse {
        _ if is_pruned => true,
        Sparse::Auto => {
            let layer = |encoding| describe_layer(tensor, encoding, options.group);
            pays(
                source,
                index,
                (&layer(encoding), &layer(sparse)),
                level_bits,
            )?
        }
        Sparse::Never => false,
    };
    Ok(if pays { sparse } else { encoding })
}

pub(crate) fn describe_layer(
    tensor: &TensorInfo,
    encoding: Encoding,
    group: Option<usize>,
) -> LayerInfo {
    let mut layer = LayerInfo::new(&tensor.name, tensor.rows(), tensor.cols(), encoding);
    (encoder(encoding).describe)(&mut layer, group);
    layer
}

/// Returns whether a tensor is a matrix.
///
/// Norms and biases are vectors; every two-dimensional tensor is multiplied or looked up.
fn is_matrix(tensor: &TensorInfo) -> bool {
    tensor.shape.len() == 2 && tensor.weights() > 0
}

fn is_embedding(tensor: &TensorInfo) -> bool {
    matches!(tensor.name.as_str(), EMBEDDING | HEAD)
}

fn default_embedding(body: Choice, tensors: &[(usize, &TensorInfo)]) -> Choice {
    let Choice::Encode(encoding) = body else {
        return body;
    };
    let block_bits = match encoder(encoding).embedding {
        DefaultEmbedding::AsBlocks => return body,
        DefaultEmbedding::Q8 => return Choice::Encode(Encoding::Q8),
        DefaultEmbedding::Q8OrQ4 { block_bits } => block_bits,
    };
    let weights = |embedding: bool| -> f64 {
        let of_kind = tensors
            .iter()
            .filter(|(_, t)| is_matrix(t) && is_embedding(t) == embedding);
        of_kind.map(|(_, t)| t.weights() as f64).sum()
    };
    let (embedding, rest) = (8.13 * weights(true), block_bits * weights(false));
    if embedding > (embedding + rest) / 5.0 {
        Choice::Encode(Encoding::Q4)
    } else {
        Choice::Encode(Encoding::Q8)
    }
}

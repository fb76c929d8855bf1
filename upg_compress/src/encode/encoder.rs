//! The methods of an encoder, and the properties that plans and estimates go by.
#![forbid(unsafe_code)]

use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use upg_kernel::format::{Encoding, LayerInfo};
use upg_kernel::{Matrix, Result};

/// The encoder of one encoding.
pub(crate) trait Encoder: Sync {
    /// Returns the properties of the encoding.
    fn profile(&self) -> Profile;

    /// Sets the parameters of `layer`; `group` is the number of columns that the options ask for.
    fn describe(&self, layer: &mut LayerInfo, group: Option<usize>);

    /// Encodes `weights [rows, cols]`, row by row, as `layer` says.
    ///
    /// `progress` advances by all of the weights.
    fn encode(
        &self,
        weights: &[f32],
        layer: &LayerInfo,
        seed: u64,
        curvature: Option<&Curvature>,
        progress: &dyn Progress,
    ) -> Result<Matrix>;

    /// Repeats a matrix of one strip down to `rows` rows; `None` if the encoding has no strips to
    /// repeat.
    fn repeat(&self, strip: &Matrix, rows: usize) -> Result<Option<Matrix>>;

    /// Returns the bytes that codes take before they are in their arrays.
    ///
    /// `parts` parts of a matrix of `weights` weights are encoded at a time.
    fn scratch_bytes(&self, weights: u64, parts: u64) -> u64;
}

/// Properties of an encoding.
pub(crate) struct Profile {
    /// Whether the encoder uses a curvature.
    pub is_calibrated: bool,
    /// Whether the option for the columns of a group applies.
    pub takes_group: bool,
    /// Whether zeros stay zeros and take less room, so that pruning pays.
    pub stores_zeros: bool,
    /// The encoding that stores zeros, with as many bits for the other weights.
    pub sparse: Option<SparseForm>,
    /// Whether single rows take most of the time, not strips.
    pub by_row: bool,
    /// The default for embeddings beside blocks in this encoding.
    pub embedding: DefaultEmbedding,
}

/// The sparse form of an encoding with groups of columns.
pub(crate) struct SparseForm {
    pub encoding: Encoding,
    /// Bits of a level, in both forms.
    pub level_bits: f64,
}

/// Default encoding of embeddings and output head.
pub(crate) enum DefaultEmbedding {
    /// That of the blocks.
    AsBlocks,
    Q8,
    /// `q8`, or `q4` if `q8` embeddings would exceed a fifth of the file.
    Q8OrQ4 {
        /// Bits of a weight in the blocks.
        block_bits: f64,
    },
}

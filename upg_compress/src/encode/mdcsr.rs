//! The encoder of `mdcsr`, which is [`MdCSRMatrix::from_dense`].
#![forbid(unsafe_code)]

use super::encoder::{DefaultEmbedding, Encoder, Profile};
use crate::progress::Progress;
use crate::sensitivity::curvature::Curvature;
use upg_kernel::format::LayerInfo;
use upg_kernel::sparse::MdCSRMatrix;
use upg_kernel::{Matrix, Result};

/// `mdcsr`.
pub(super) struct MdCsr;

impl Encoder for MdCsr {
    fn profile(&self) -> Profile {
        Profile {
            is_calibrated: false,
            takes_group: false,
            stores_zeros: false,
            sparse: None,
            by_row: true,
            embedding: DefaultEmbedding::AsBlocks,
        }
    }

    fn describe(&self, _: &mut LayerInfo, _: Option<usize>) {}

    fn encode(
        &self,
        weights: &[f32],
        layer: &LayerInfo,
        _: u64,
        _: Option<&Curvature>,
        progress: &dyn Progress,
    ) -> Result<Matrix> {
        let matrix = MdCSRMatrix::from_dense(weights, layer.rows, layer.cols)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::MdCsr(matrix))
    }

    fn repeat(&self, _: &Matrix, _: usize) -> Result<Option<Matrix>> {
        Ok(None)
    }

    fn scratch_bytes(&self, weights: u64, _: u64) -> u64 {
        8 * weights
    }
}

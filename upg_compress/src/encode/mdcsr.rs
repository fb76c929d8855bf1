//! The encoder of `mdcsr`, which is [`MdCSRMatrix::from_dense`].
#![forbid(unsafe_code)]

use super::encoder::{DefaultEmbedding, Encoder};
use upg_kernel::Matrix;
use upg_kernel::format::Encoding;
use upg_kernel::sparse::MdCSRMatrix;

pub(super) const MDCSR: Encoder = Encoder {
    encoding: Encoding::MdCsr,
    describe: |_, _| {},
    encode: |weights, layer, _, _, progress| {
        let matrix = MdCSRMatrix::from_dense(weights, layer.rows, layer.cols)?;
        progress.advance(weights.len() as u64);
        Ok(Matrix::MdCsr(matrix))
    },
    repeat: |_, _| Ok(None),
    scratch_bytes: |weights, _| 8 * weights,
    is_calibrated: false,
    takes_group: false,
    stores_zeros: false,
    sparse: None,
    by_row: true,
    embedding: DefaultEmbedding::AsBlocks,
};

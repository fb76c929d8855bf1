//! A source, run as it is: what its compressed files are compared with.
#![forbid(unsafe_code)]

use crate::sensitivity::calibration::Weights;
use crate::source::Source;
use upg_kernel::Result;
use upg_kernel::inference::Model;

/// The model of a source, all weights as f32, which is also what is computed with.
///
/// Memory: 4 bytes a weight. Errors: those of the source and of [`Model::load`].
pub fn load(source: &dyn Source) -> Result<Model> {
    Model::load(source.files().config()?, &Weights(source))
}

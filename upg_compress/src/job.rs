//! Compression of a model: the estimate before, the work, the report afterwards.
#![forbid(unsafe_code)]

pub(crate) mod compress;
mod journal;
mod parallel;
pub(crate) mod preflight;
mod random;
pub(crate) mod report;
mod resume;

pub use compress::{compress, compress_checked};
pub use preflight::{MemoryEstimate, Preflight, TensorGroup};
pub use random::compress_random;
pub use report::{CalibrationReport, CompressReport, TensorReport, Zeros};
pub use resume::partial_files;

//! Sensitivity of the predictions of a model to errors in each of its matrices.
#![forbid(unsafe_code)]

pub(crate) mod calibration;
pub(crate) mod calibrator;
pub(crate) mod curvature;
pub(crate) mod hessian;

pub use calibration::{BUILT_IN_TOKENS, Calibration, json_lines};
pub use calibrator::Calibrator;
pub use curvature::Curvature;
pub use hessian::{Feedback, Hessian};

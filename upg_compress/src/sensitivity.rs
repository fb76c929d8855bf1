//! Measures how much the predictions of a model change by errors in each of its matrices.
#![forbid(unsafe_code)]

pub(crate) mod calibration;
pub(crate) mod curvature;
pub(crate) mod hessian;

pub use calibration::text::{BUILT_IN_TOKENS, json_lines};
pub use calibration::{Calibration, Calibrator};
pub use curvature::Curvature;
pub use hessian::{Feedback, Hessian};

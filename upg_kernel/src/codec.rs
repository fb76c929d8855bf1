//! The encodings: arrays, checks, sizes and reference decoder of each.
#![forbid(unsafe_code)]

pub(crate) mod bitmap;
pub(crate) mod dense;
pub(crate) mod grouped;
pub(crate) mod stored;
pub mod strips;
pub mod trellis;

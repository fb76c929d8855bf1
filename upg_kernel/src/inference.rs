//! The decoder: configuration, weights, KV cache, forward pass, sampling and generation.
//!
//! `config.json` -> [`ModelConfig`]; with a [`WeightSource`] -> [`Model`] (shared, read-only);
//! with a KV cache -> [`Session`]; with a [`Sampler`] -> [`TokenStream`] -> [`TextStream`].
//! A [`Batch`] computes several sessions at once.
//! [`UPGModel`] has all of it from one file.
#![forbid(unsafe_code)]

mod backward;
mod batch;
pub(crate) mod block;
pub mod chat_template;
pub mod config;
pub mod evaluate;
pub mod generate;
pub(crate) mod kv_cache;
mod layers;
mod layerwise;
pub mod model;
pub mod rope;
pub mod sampler;
pub mod session;
mod text_batch;
pub mod tokenizer;
mod upg_model;
pub mod weights;

pub use backward::{Backward, GainGradients, GradientObserver, Head};
pub use batch::Batch;
pub use block::{Input, Observer};
pub use config::ModelConfig;
pub use evaluate::{Evaluation, evaluate};
pub use generate::{FinishReason, GenerateOptions, StopStrings, TextStream, Timings, TokenStream};
pub use layerwise::{Layerwise, POSITIONS_TOGETHER};
pub use model::Model;
pub use sampler::{Sampler, SamplingOptions};
pub use session::{CacheType, Session, SessionOptions};
pub use text_batch::{Request, TextBatch};
pub use upg_model::UPGModel;
pub use weights::WeightSource;

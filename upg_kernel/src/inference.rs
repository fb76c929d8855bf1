//! The decoder: configuration, weights, KV cache, forward pass, sampling and generation.
//!
//! `config.json` -> [`ModelConfig`]; with a [`WeightSource`] -> [`Model`] (shared, read-only); with
//! a KV cache -> [`Context`], which computes several [`Sequence`]s at once; with a [`Sampler`] for
//! each [`Request`] -> [`Scheduler`], which continues one prompt or many. A [`Session`] is a
//! context with one sequence. `UPGModel` has all of it from one file; it, the tokenizer and the
//! chat template need the feature `text`.
#![forbid(unsafe_code)]

mod backward;
pub(crate) mod cache;
#[cfg(feature = "text")]
pub mod chat_template;
pub mod config;
mod context;
mod decoder;
pub mod evaluate;
pub mod generate;
#[cfg(feature = "text")]
mod generation_config;
mod layer_input;
mod layerwise;
mod logits;
pub mod model;
pub mod model_dir;
pub(crate) mod pass;
pub mod rope;
pub mod sampler;
mod scheduler;
pub mod session;
#[cfg(feature = "text")]
pub mod tokenizer;
mod tokenizer_config;
#[cfg(feature = "text")]
mod upg_model;
pub mod weights;

pub use backward::{Backward, GainGradients, GradientObserver, Head};
pub use cache::CacheType;
pub use config::ModelConfig;
pub use context::{Context, Logits, Part, Sequence, SessionOptions};
pub use evaluate::{Evaluation, evaluate};
pub use generate::{FinishReason, PieceDecoder, StopStrings, Timings};
pub use layer_input::LayerInput;
pub use layerwise::{Layerwise, Observer, POSITIONS_TOGETHER};
pub use logits::{LogProbs, LogitBias, LogitsProcessor, Penalties};
pub use model::Model;
pub use sampler::{Sampler, SamplingOptions};
pub use scheduler::{Event, Request, RequestId, Scheduler, TextStream};
pub use session::Session;
#[cfg(feature = "text")]
pub use upg_model::UPGModel;
pub use weights::{WeightSource, check_weights};

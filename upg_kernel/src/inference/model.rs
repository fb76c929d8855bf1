//! Model: a decoder that any number of [`Context`](super::Context)s share.
#![forbid(unsafe_code)]

use super::cache::CacheLayout;
use super::config::ModelConfig;
use super::decoder::{Decoder, Engine, MakeEngine};
use super::rope::Rope;
use super::weights::{WeightSource, Weights};
use crate::cpu::Cpu;
use crate::cpu::device::CpuDevice;
use crate::device::Device;
use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// Decoder: its weights on a device and its configuration.
///
/// Read-only: share it in an [`Arc`].
pub struct Model {
    config: ModelConfig,
    rope: Rope,
    decoder: Arc<dyn MakeEngine>,
}

impl Model {
    /// Loads the weights that `config` requires from `source`, to run on [`Cpu::shared`].
    ///
    /// Errors: those of [`Cpu::shared`] and [`Model::load_on`].
    pub fn load(config: ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        Self::load_on(Cpu::shared()?.clone(), config, source)
    }

    /// Loads the weights that `config` requires from `source`, to run on `cpu`.
    ///
    /// Cost: that of the source. Nothing is copied here, and tied embeddings share one matrix.
    /// Errors: `Invalid` (sizes of the config), `Missing`, `Shape` (prints both shapes), and
    /// `Unsupported` for a tensor that this family would have to ignore.
    pub fn load_on(cpu: Cpu, config: ModelConfig, source: &dyn WeightSource) -> Result<Self> {
        Self::on_device(CpuDevice(cpu), config, source)
    }

    pub(crate) fn on_device<D: Device>(
        device: D,
        config: ModelConfig,
        source: &dyn WeightSource,
    ) -> Result<Self> {
        config.check()?;
        let weights = Weights::load(&config, source)?;
        Ok(Self {
            rope: Rope::new(&config.rope),
            decoder: Arc::new(Decoder::new(device, config.clone(), weights)?),
            config,
        })
    }

    /// Returns the configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Creates an engine with its own cache. Errors: those of the device.
    pub(super) fn engine(&self, layout: &CacheLayout) -> Result<Box<dyn Engine>> {
        Arc::clone(&self.decoder).engine(layout)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let config = &self.config;
        f.debug_struct("Model")
            .field("config", config)
            .finish_non_exhaustive()
    }
}

//! Original model, whose predictions are learned.
#![forbid(unsafe_code)]

use crate::progress::Progress;
use crate::sensitivity::calibration::Calibration;
use crate::source::Source;
use crate::source::model::SourceWeights;
use upg_kernel::Result;
use upg_kernel::inference::weights::EMBEDDING;
use upg_kernel::inference::{Head, Layerwise, WeightSource};

/// Last hidden states of the original for the text, and its head.
pub(super) struct Teacher {
    pub(super) head: Head,
    /// Hidden states `[tokens, hidden]`.
    hidden: Vec<f32>,
    /// Number of values per sequence.
    of_sequence: usize,
}

impl Teacher {
    pub(super) fn new(
        source: &dyn Source,
        calibration: &Calibration,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let config = source.files().config()?;
        let source = SourceWeights(source);
        let embedding = source.matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
        let (tokens, window) = (calibration.tokens(), calibration.window());
        let mut run = Layerwise::new(config.clone(), &embedding, tokens, window)?;
        drop(embedding);
        for index in 0..config.num_layers {
            run.layer(index, &source, &mut |_, _, _| progress.check_interrupt())?;
        }
        Ok(Self {
            head: Head::new(&config, &source)?,
            hidden: run.into_hidden(),
            of_sequence: window * config.hidden_size,
        })
    }

    pub(super) fn of(&self, sequence: usize) -> &[f32] {
        &self.hidden[sequence * self.of_sequence..][..self.of_sequence]
    }
}

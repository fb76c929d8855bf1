//! Target: the parts as `config.json` and `generation_config.json`.
//!
//! A small model with random weights then takes a step.

use std::sync::Arc;
use upg_compress::Source;
use upg_compress::source::SyntheticSource;
use upg_kernel::Result;
use upg_kernel::inference::{ModelConfig, Session, SessionOptions};

/// Maximum weights of a model that is run.
const MOST_WEIGHTS: u64 = 1 << 17;

pub fn run(data: &[u8]) {
    let [config, generation] = super::parts(data);
    let (config, generation) = (super::text(config), super::text(generation));
    let generation = (!generation.is_empty()).then_some(generation.as_str());
    if let Err(e) = ModelConfig::from_json(&config, generation) {
        return super::one_line(&e);
    }
    if let Err(e) = step(&config) {
        super::one_line(&e);
    }
}

fn step(config: &str) -> Result<()> {
    let source = SyntheticSource::new(config, 1)?;
    if source.total_weights() > MOST_WEIGHTS {
        return Ok(());
    }
    let model = Arc::new(source.load_model()?);
    let options = SessionOptions {
        context: Some(8),
        ..SessionOptions::default()
    };
    let mut session = Session::new(model, &options)?;
    session.forward(&[0, 1, 2])?;
    session.step(1)?;
    Ok(())
}

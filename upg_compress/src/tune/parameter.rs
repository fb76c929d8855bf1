//! Trainable scales of a matrix or gains of a norm, with Adam.
#![forbid(unsafe_code)]

use upg_kernel::{Error, ErrorKind, Result};

/// Decay rates of Adam (arXiv 1412.6980) for the means of gradients and of their squares.
const MEMORY: (f64, f64) = (0.9, 0.95);

/// Scales of a matrix, or gains of a norm, with the state of their training.
pub(super) struct Parameter {
    /// Values in the file.
    pub(super) original: Vec<f32>,
    /// Factors that multiply these values.
    pub(super) factors: Vec<f32>,
    /// Gradients of the factors for the current sequence.
    pub(super) gradients: Vec<f32>,
    /// Adam's means of gradients and of their squares.
    means: Vec<(f64, f64)>,
}

impl Parameter {
    pub(super) fn new(original: Vec<f32>) -> Self {
        let n = original.len();
        Self {
            original,
            factors: vec![1.0; n],
            gradients: vec![0.0; n],
            means: vec![(0.0, 0.0); n],
        }
    }

    pub(super) fn values(&self) -> Vec<f32> {
        let pairs = self.original.iter().zip(&self.factors);
        pairs.map(|(original, factor)| original * factor).collect()
    }

    /// Takes step number `step` of Adam and clears the gradients.
    ///
    /// Errors (`Invalid`): a gradient is not finite.
    pub(super) fn step(&mut self, step: usize, rate: f64) -> Result<()> {
        if let Some(bad) = self.gradients.iter().find(|g| !g.is_finite()) {
            let message = format!("the gradient of a scale is {bad}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let unbiased = |memory: f64| 1.0 - memory.powi(step as i32);
        let of_means = (unbiased(MEMORY.0), unbiased(MEMORY.1));
        let all = self.factors.iter_mut().zip(&mut self.gradients);
        for ((factor, gradient), (mean, square)) in all.zip(&mut self.means) {
            let g = f64::from(std::mem::take(gradient));
            *mean += (1.0 - MEMORY.0) * (g - *mean);
            *square += (1.0 - MEMORY.1) * (g * g - *square);
            let size = (*square / of_means.1).sqrt();
            if size > 0.0 {
                *factor -= (rate * *mean / of_means.0 / size) as f32;
            }
        }
        Ok(())
    }
}

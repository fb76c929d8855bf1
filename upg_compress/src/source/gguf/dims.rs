//! Sizes and constants of a model, and config fields that follow from its tensors.
#![forbid(unsafe_code)]

use upg_kernel::{Error, ErrorKind, Result};

/// Maximum size of anything in a model, so that the product of two fits a `u64` easily.
const MAX_DIM: usize = 1 << 24;

/// Sizes and constants of a model, checked.
#[derive(Debug, Clone)]
pub(in crate::source) struct Dims {
    pub(in crate::source) hidden: usize,
    pub(in crate::source) layers: usize,
    pub(in crate::source) heads: usize,
    pub(in crate::source) kv_heads: usize,
    pub(in crate::source) head_dim: usize,
    pub(in crate::source) ffn: usize,
    pub(in crate::source) vocab: usize,
    pub(in crate::source) context: usize,
    /// Number of rotated dimensions of a head.
    pub(in crate::source) rotary_dim: usize,
    pub(in crate::source) rope_theta: f64,
    pub(in crate::source) rms_eps: f64,
    pub(in crate::source) sliding_window: Option<usize>,
}

/// Config fields inferred from the tensor list.
#[derive(Debug, Clone, Default)]
pub(super) struct FromTensors {
    pub(super) tied: bool,
    pub(super) attention_bias: bool,
    pub(super) mlp_bias: bool,
    pub(super) torch_dtype: &'static str,
    /// Divisors of the rotary frequencies (`rope_freqs.weight`).
    pub(super) rope_freqs: Option<Vec<f32>>,
    /// LongRoPE factors, short and long (`rope_factors_short.weight`,
    /// `rope_factors_long.weight`).
    pub(super) rope_factors: Option<(Vec<f32>, Vec<f32>)>,
}

impl Dims {
    /// Checks that sizes and constants are in range and consistent.
    pub(super) fn check(&self) -> Result<()> {
        let sizes = [
            ("hidden size", self.hidden),
            ("head count", self.heads),
            ("kv head count", self.kv_heads),
            ("head length", self.head_dim),
            ("feed-forward length", self.ffn),
            ("vocabulary", self.vocab),
        ];
        for (what, size) in sizes {
            if !(1..=MAX_DIM).contains(&size) {
                let message = format!("{what} {size}, expected 1 to {MAX_DIM}");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
        }
        let Self {
            heads,
            kv_heads,
            head_dim,
            rotary_dim,
            ..
        } = *self;
        let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
        if !heads.is_multiple_of(kv_heads) {
            return invalid(format!("{heads} heads share {kv_heads} kv heads"));
        }
        if !head_dim.is_multiple_of(2) || !rotary_dim.is_multiple_of(2) || rotary_dim == 0 {
            return invalid(format!(
                "{rotary_dim} of {head_dim} head dimensions rotated"
            ));
        }
        if rotary_dim > head_dim {
            return invalid(format!(
                "{rotary_dim} of {head_dim} head dimensions rotated"
            ));
        }
        if self.rms_eps < 0.0 || self.rope_theta <= 0.0 {
            return invalid(format!(
                "epsilon {}, rope theta {}",
                self.rms_eps, self.rope_theta
            ));
        }
        Ok(())
    }

    /// Returns the factor by which transformers multiplies the head dimension
    /// to get the rotated dimensions.
    ///
    /// transformers rounds the product down.
    pub(super) fn partial_rotary_factor(&self) -> f64 {
        let factor = self.rotary_dim as f64 / self.head_dim as f64;
        if (self.head_dim as f64 * factor) as usize == self.rotary_dim {
            factor
        } else {
            factor.next_up()
        }
    }
}

#[cfg(test)]
impl Dims {
    /// Creates only the fields that the rope scaling uses.
    pub(super) fn for_rope(rotary_dim: usize, rope_theta: f64) -> Self {
        Self {
            hidden: rotary_dim,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: rotary_dim,
            ffn: 1,
            vocab: 1,
            context: 1,
            rotary_dim,
            rope_theta,
            rms_eps: 0.0,
            sliding_window: None,
        }
    }
}

//! Arithmetic kernels.
//!
//! They are plain reference loops, a blocked matrix product for many vectors, and integer products
//! of packed weights with one vector.

// Parts that only the SIMD kernels of these two use are dead code on other machines.
#![cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]

pub(crate) mod activations;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod compiled;
#[cfg(target_arch = "x86_64")]
mod decode;
pub(crate) mod gemm;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod hadamard;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod many;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod places;
mod rows;
pub(crate) mod scalar;
pub(crate) mod sparse;
pub(crate) mod views;

use crate::error::{Error, ErrorKind, Result};
use crate::rotation::Rotation;
use activations::Activations;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use scalar::Signs;
use std::env::VarError;
use views::{Entries, Strip};

/// Environment variable that selects kernels other than the fastest.
const VARIABLE: &str = "UPG_KERNEL";

/// Memory for [`Kernels::multiply_many`], reused between calls.
#[cfg(target_arch = "x86_64")]
pub(crate) use many::Panel;
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Panel;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[derive(Debug, Default)]
pub(crate) struct Panel;

/// Number type that weights are decoded to: `f32`, `f16` or `bf16`.
pub trait Float: Copy + Default + Element {
    /// Rounds each element of `x` to nearest, ties to even. Panics if the lengths differ.
    fn round(kernels: Kernels, x: &[f32], out: &mut [Self]);

    /// Returns the values if they are f32, else `None`.
    fn as_f32(_values: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
use Copy as Element;
#[cfg(target_arch = "x86_64")]
use decode::Element;

impl Float for f32 {
    fn round(_: Kernels, x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    fn as_f32(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }
}

impl Float for f16 {
    fn round(kernels: Kernels, x: &[f32], out: &mut [Self]) {
        kernels.to_f16(x, out);
    }
}

impl Float for bf16 {
    fn round(kernels: Kernels, x: &[f32], out: &mut [Self]) {
        kernels.to_bf16(x, out);
    }
}

/// Kernels for one instruction set. A value proves that this machine supports it.
#[derive(Debug, Clone, Copy)]
pub struct Kernels(Set);

#[derive(Debug, Clone, Copy)]
enum Set {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

/// Dispatches on the instruction set: `$scalar` for the reference, `$call` for all SIMD sets,
/// which have the same methods.
macro_rules! dispatch {
    ($set:expr, $scalar:expr, $kernels:ident => $call:expr) => {
        match $set {
            Set::Scalar => $scalar,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2($kernels) => $call,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512($kernels) => $call,
            #[cfg(target_arch = "aarch64")]
            Set::Neon($kernels) => $call,
        }
    };
}

impl Kernels {
    /// Returns all kernels that this machine can run, the fastest last.
    pub fn available() -> Vec<Self> {
        let all = [
            Some(Set::Scalar),
            #[cfg(target_arch = "x86_64")]
            avx2::Avx2::new().map(Set::Avx2),
            #[cfg(target_arch = "x86_64")]
            avx512::Avx512::new().map(Set::Avx512),
            #[cfg(target_arch = "aarch64")]
            neon::Neon::new().map(Set::Neon),
        ];
        all.into_iter().flatten().map(Self).collect()
    }

    /// Returns the reference kernels, plain loops.
    pub fn scalar() -> Self {
        Self(Set::Scalar)
    }

    /// Returns the fastest kernels of this machine.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Set::Scalar))
    }

    /// Returns the kernels called `name`.
    ///
    /// Errors (`Unsupported`): the name is unknown, or this machine cannot run them.
    pub fn by_name(name: &str) -> Result<Self> {
        let all = Self::available();
        all.iter()
            .find(|k| k.name() == name)
            .copied()
            .ok_or_else(|| {
                let known: Vec<_> = all.iter().map(|k| k.name()).collect();
                Error::new(ErrorKind::Unsupported, format!("no kernels '{name}' here"))
                    .hint(format!("available: {}", known.join(", ")))
            })
    }

    /// Returns the kernels named by the environment variable `UPG_KERNEL`, else the fastest.
    ///
    /// Errors (`Unsupported`): as [`Kernels::by_name`], or the variable is not Unicode.
    pub fn from_env() -> Result<Self> {
        let name = match std::env::var(VARIABLE) {
            Err(VarError::NotPresent) => return Ok(Self::best()),
            name => {
                name.map_err(|e| Error::new(ErrorKind::Unsupported, format!("{VARIABLE}: {e}")))?
            }
        };
        Self::by_name(&name)
            .map_err(|e| Error::new(ErrorKind::Unsupported, format!("{VARIABLE}: {e}")))
    }

    /// Returns the name: `scalar`, `avx2`, `avx512` or `neon`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Set::Neon(_) => "neon",
        }
    }

    /// Returns whether [`Kernels::multiply`] and [`Kernels::multiply_many`] exist.
    ///
    /// Products with `scalar` decode weights to f32 instead.
    pub(crate) fn is_integer(self) -> bool {
        !matches!(self.0, Set::Scalar)
    }

    /// Runs [`scalar::transform`], bit-identical; the length is a power of two.
    pub(crate) fn transform(self, x: &mut [f32], factor: f32, signs: Signs<'_>) {
        dispatch!(
            self.0,
            scalar::transform(x, factor, signs),
            kernels => kernels.transform(x, factor, signs)
        )
    }

    /// Runs [`Rotation::apply`], bit-identical.
    pub(crate) fn rotate(self, rotation: &Rotation, x: &mut [f32]) {
        rotation.apply_by(|x, factor, signs| self.transform(x, factor, signs), x);
    }

    /// Runs [`Rotation::invert`], bit-identical.
    pub(crate) fn rotate_back(self, rotation: &Rotation, x: &mut [f32]) {
        rotation.invert_by(|x, factor, signs| self.transform(x, factor, signs), x);
    }

    /// Runs [`scalar::rms_norm`], bit-identical.
    pub(crate) fn rms_norm(self, x: &mut [f32], gain: &[f32], eps: f32) {
        dispatch!(self.0, scalar::rms_norm(x, gain, eps), kernels => kernels.rms_norm(x, gain, eps))
    }

    /// Runs [`scalar::gated_silu`], bit-identical.
    pub(crate) fn gated_silu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        dispatch!(self.0, scalar::gated_silu(gate, up, out), kernels => kernels.gated_silu(gate, up, out))
    }

    /// Decodes a strip to `out [rows, cols]`; returns `false` without an effect if there is no
    /// such kernel.
    ///
    /// The result is bit-identical to [`crate::matrix::StoredMatrix::decode_rows`],
    /// inverse-rotated if there is a rotation, and rounded to nearest, ties to even. `streamed`
    /// bypasses the caches.
    pub(crate) fn decode<T: Float>(
        self,
        strip: Strip<'_>,
        rotation: Option<&Rotation>,
        streamed: bool,
        out: &mut [T],
    ) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(kernels) => {
                kernels.decode(strip, rotation, streamed, out);
                true
            }
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => {
                kernels.decode(strip, rotation, streamed, out);
                true
            }
            _ => {
                // Machines without such kernels have no other use for them.
                let _ = (strip, rotation, streamed, out);
                false
            }
        }
    }

    /// Decodes row `row` of a strip to `out [cols]`.
    ///
    /// The result is bit-identical to [`crate::matrix::StoredMatrix::decode_rows`]. Panics without
    /// [`Kernels::is_integer`], as do the two methods below.
    pub(crate) fn decode_row(self, strip: Strip<'_>, row: usize, out: &mut [f32]) {
        dispatch!(
            self.0,
            unreachable!("the reference decodes {strip:?}"),
            kernels => kernels.decode_row(strip, row, out)
        )
    }

    /// Returns whether entries of `mdcsr` are gathered sixteen at a time instead of one by one.
    pub(crate) fn gathers_entries(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, Set::Avx512(_));
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Decodes a row of `mdcsr` to all columns of `out`.
    ///
    /// The result is bit-identical to [`crate::matrix::StoredMatrix::decode_rows`], rounded to
    /// nearest, ties to even.
    pub(crate) fn decode_entries<T: Float>(self, entries: Entries<'_>, out: &mut [T]) {
        dispatch!(
            self.0,
            unreachable!("the reference decodes {entries:?}"),
            kernels => kernels.decode_entries(entries, out)
        )
    }

    /// Runs [`sparse::dot`], equal up to rounding.
    pub(crate) fn dot_entries(self, entries: Entries<'_>, x: &[f32]) -> f32 {
        dispatch!(
            self.0,
            unreachable!("the reference decodes {entries:?}"),
            kernels => kernels.dot_entries(entries, x)
        )
    }

    /// Converts each element with [`bf16::from_f32`]; the lengths are equal.
    pub(crate) fn to_bf16(self, x: &[f32], out: &mut [bf16]) {
        assert_eq!(x.len(), out.len());
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(kernels) => kernels.to_bf16(x, out),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => kernels.to_bf16(x, out),
            _ => out.convert_from_f32_slice(x),
        }
    }

    /// Converts each element with [`f16::from_f32`]; the lengths are equal.
    pub(crate) fn to_f16(self, x: &[f32], out: &mut [f16]) {
        assert_eq!(x.len(), out.len());
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(kernels) => kernels.to_f16(x, out),
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => kernels.to_f16(x, out),
            _ => out.convert_from_f32_slice(x),
        }
    }

    /// Runs [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        dispatch!(self.0, attention::attend::<[f32; 16], 1>((), task), kernels => kernels.attend(task))
    }

    /// Runs [`activations::quantize`], bit-identical.
    pub(crate) fn quantize(self, x: &[f32], out: &mut Activations) {
        dispatch!(self.0, activations::quantize(x, out), kernels => kernels.quantize(x, out))
    }

    /// Multiplies the rows of a strip by each vector; results past its rows are meaningless.
    ///
    /// Panics without [`Kernels::is_integer`].
    pub(crate) fn multiply_many<'a>(
        self,
        strip: Strip<'_>,
        vectors: &[Activations],
        panel: &'a mut Panel,
    ) -> &'a [[f32; 64]] {
        dispatch!(
            self.0,
            unreachable!("scalar products decode {strip:?} {vectors:?} {panel:?}"),
            kernels => kernels.multiply_many(strip, vectors, panel)
        )
    }

    /// Computes `out[i] = ` row `i` of a strip times `x`.
    ///
    /// Panics without [`Kernels::is_integer`].
    pub(crate) fn multiply(self, strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
        dispatch!(
            self.0,
            unreachable!("scalar products decode {strip:?} {x:?} {out:?}"),
            kernels => kernels.multiply(strip, x, out)
        )
    }
}

#[cfg(test)]
mod tests;

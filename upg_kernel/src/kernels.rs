//! The arithmetic kernels: plain loops, a blocked matrix product for many vectors at once, and products
//! with one vector that multiply packed weights as integers.

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod activations;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod compiled;
pub mod gemm;
mod lanes;
pub mod scalar;
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod views;

use crate::error::{Error, ErrorKind, Result};
use activations::{Activations, Order};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::env::VarError;
use std::sync::LazyLock;
use views::Rows;

/// The environment variable that names the kernels to use instead of the fastest.
const VARIABLE: &str = "UPG_KERNEL";

/// Memory for [`Kernels::multiply_many`], used again from call to call.
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Panel;
#[cfg(not(target_arch = "x86_64"))]
#[derive(Debug, Default)]
pub(crate) struct Panel;

/// Kernels for one instruction set. A value is the proof that this machine has it.
#[derive(Debug, Clone, Copy)]
pub struct Kernels(Set);

#[derive(Debug, Clone, Copy)]
enum Set {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

/// The first expression for the reference, the second for all other kernels, which have the same methods.
macro_rules! dispatch {
    ($set:expr, $scalar:expr, $kernels:ident => $call:expr) => {
        match $set {
            Set::Scalar => $scalar,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2($kernels) => $call,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512($kernels) => $call,
        }
    };
}

impl Kernels {
    /// All that this machine can run, the fastest last.
    pub fn available() -> Vec<Self> {
        let all = [
            Some(Set::Scalar),
            #[cfg(target_arch = "x86_64")]
            avx2::Avx2::new().map(Set::Avx2),
            #[cfg(target_arch = "x86_64")]
            avx512::Avx512::new().map(Set::Avx512),
        ];
        all.into_iter().flatten().map(Self).collect()
    }

    /// The plain loops.
    pub fn scalar() -> Self {
        Self(Set::Scalar)
    }

    /// The fastest of this machine.
    pub fn best() -> Self {
        Self::available().pop().unwrap_or(Self(Set::Scalar))
    }

    /// Errors (`Unsupported`): unknown, or this machine cannot run them.
    pub fn by_name(name: &str) -> Result<Self> {
        let all = Self::available();
        all.iter()
            .find(|k| k.name() == name)
            .copied()
            .ok_or_else(|| {
                let known: Vec<_> = all.iter().map(|k| k.name()).collect();
                Error::new(ErrorKind::Unsupported, format!("no kernels '{name}' here"))
                    .hint(format!("this machine has {}", known.join(", ")))
            })
    }

    /// What products use: those that the environment variable `UPG_KERNEL` names, else the fastest. Read
    /// once. Errors: as [`Kernels::by_name`].
    pub fn active() -> Result<Self> {
        static ACTIVE: LazyLock<std::result::Result<Kernels, String>> =
            LazyLock::new(|| match std::env::var(VARIABLE) {
                Err(VarError::NotPresent) => Ok(Kernels::best()),
                Err(e) => Err(e.to_string()),
                Ok(name) => Kernels::by_name(&name).map_err(|e| e.to_string()),
            });
        ACTIVE
            .clone()
            .map_err(|message| Error::new(ErrorKind::Unsupported, format!("{VARIABLE}: {message}")))
    }

    /// `scalar`, `avx2` or `avx512`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => "avx512",
        }
    }

    /// Whether [`Kernels::multiply`] does anything; `scalar` products decode weights to f32 instead.
    pub(crate) fn is_integer(self) -> bool {
        !matches!(self.0, Set::Scalar)
    }

    /// [`scalar::hadamard`] from span 1 on, the same to the bit.
    pub(crate) fn hadamard(self, x: &mut [f32]) {
        dispatch!(self.0, scalar::hadamard(x, 1), kernels => kernels.hadamard(x))
    }

    /// [`scalar::flip`].
    pub(crate) fn flip(self, x: &mut [f32], signs: &[u8]) {
        dispatch!(self.0, scalar::flip(x, signs), kernels => kernels.flip(x, signs))
    }

    /// [`scalar::scale`], the same to the bit.
    pub(crate) fn scale(self, x: &mut [f32], factor: f32) {
        dispatch!(self.0, scalar::scale(x, factor), kernels => kernels.scale(x, factor))
    }

    /// [`scalar::rms_norm`], the same to the bit.
    pub(crate) fn rms_norm(self, x: &mut [f32], gain: &[f32], eps: f32) {
        dispatch!(self.0, scalar::rms_norm(x, gain, eps), kernels => kernels.rms_norm(x, gain, eps))
    }

    /// [`scalar::gated_silu`], the same to the bit.
    pub(crate) fn gated_silu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        dispatch!(self.0, scalar::gated_silu(gate, up, out), kernels => kernels.gated_silu(gate, up, out))
    }

    /// `out [rows, cols]`: every row in the stored basis, as [`crate::matrix::StoredMatrix::decode_rows`] gives it,
    /// to the bit. `false` without doing anything: there is no such kernel.
    pub(crate) fn decode(self, rows: Rows<'_>, cols: usize, out: &mut [f32]) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => {
                kernels.decode(rows, cols, out);
                true
            }
            _ => {
                // Machines without such kernels have no other use for them.
                let _ = (rows, cols, out);
                false
            }
        }
    }

    /// [`bf16::from_f32`] of each, into as many.
    pub(crate) fn to_bf16(self, x: &[f32], out: &mut [bf16]) {
        assert_eq!(x.len(), out.len());
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => kernels.to_bf16(x, out),
            _ => out.convert_from_f32_slice(x),
        }
    }

    /// [`f16::from_f32`] of each, into as many.
    pub(crate) fn to_f16(self, x: &[f32], out: &mut [f16]) {
        assert_eq!(x.len(), out.len());
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => kernels.to_f16(x, out),
            _ => out.convert_from_f32_slice(x),
        }
    }

    /// [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        dispatch!(self.0, attention::attend::<[f32; 16], 1>((), task), kernels => kernels.attend(task))
    }

    /// [`activations::quantize`], the same to the bit.
    pub(crate) fn quantize(self, x: &[f32], order: Order, out: &mut Activations) {
        dispatch!(self.0, activations::quantize(x, order, out), kernels => kernels.quantize(x, order, out))
    }

    /// Whether there is [`Kernels::multiply_many`].
    pub(crate) fn has_many(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(_) => true,
            _ => false,
        }
    }

    /// `out [n, rows]`: up to 64 rows times every vector, all of them in [`Order::Natural`].
    ///
    /// Panics without [`Kernels::has_many`].
    pub(crate) fn multiply_many(
        self,
        rows: Rows<'_>,
        vectors: &[Activations],
        panel: &mut Panel,
        out: &mut [f32],
    ) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512(kernels) => kernels.multiply_many(rows, vectors, panel, out),
            _ => unreachable!("{rows:?} {vectors:?} {panel:?} {out:?}"),
        }
    }

    /// `out[i] = ` row `i` of `rows` times `x`, which is in the order of the rows.
    ///
    /// Panics if there are other kernels than [`Kernels::is_integer`] allows.
    pub(crate) fn multiply(self, rows: Rows<'_>, x: &Activations, out: &mut [f32]) {
        dispatch!(
            self.0,
            unreachable!("scalar products decode {rows:?} {x:?} {out:?}"),
            kernels => match rows {
                Rows::Grouped(rows) => kernels.grouped(rows, x, out),
                Rows::Bitmap(rows) => kernels.bitmap(rows, x, out),
                Rows::Trellis(strip) => kernels.trellis(strip, x, out),
            }
        )
    }
}

#[cfg(test)]
mod tests;

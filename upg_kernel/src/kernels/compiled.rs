//! Plain loops of the reference, compiled for the instructions of each kernel set.
//!
//! The results are bit-identical; the compiler vectorizes the loops.

#[cfg(target_arch = "aarch64")]
use super::activations::{self, Activations};
use super::views::{Entries, Strip};
use super::{Float, Kernels, Set, rows, scalar, sparse};

/// Defines methods that call inlined plain loops from functions with these features.
macro_rules! compiled {
    ($kernels:ty, $features:literal, [$($path:path => $name:ident($($arg:ident: $type:ty),*);)*]) => {
        impl $kernels {$(
            #[doc = concat!("As [`", stringify!($path), "`].")]
            pub(crate) fn $name(self, $($arg: $type),*) {
                #[target_feature(enable = $features)]
                fn compiled($($arg: $type),*) {
                    $path($($arg),*)
                }
                // SAFETY: `self` proves that the processor has the features.
                unsafe { compiled($($arg),*) }
            }
        )*}
    };
}

#[cfg(target_arch = "x86_64")]
compiled!(super::avx512::Avx512, "avx512f,avx512bw,avx512vl,popcnt", [
    scalar::rms_norm => rms_norm(x: &mut [f32], gain: &[f32], eps: f32);
    scalar::gated_silu => gated_silu(gate: &[f32], up: &[f32], out: &mut [f32]);
    rows::decode => decode_row(strip: Strip<'_>, row: usize, out: &mut [f32]);
]);

#[cfg(target_arch = "x86_64")]
compiled!(super::avx2::Avx2, "avx2,popcnt", [
    scalar::rms_norm => rms_norm(x: &mut [f32], gain: &[f32], eps: f32);
    scalar::gated_silu => gated_silu(gate: &[f32], up: &[f32], out: &mut [f32]);
    rows::decode => decode_row(strip: Strip<'_>, row: usize, out: &mut [f32]);
]);

#[cfg(target_arch = "aarch64")]
compiled!(super::neon::Neon, "neon", [
    scalar::rms_norm => rms_norm(x: &mut [f32], gain: &[f32], eps: f32);
    scalar::gated_silu => gated_silu(gate: &[f32], up: &[f32], out: &mut [f32]);
    rows::decode => decode_row(strip: Strip<'_>, row: usize, out: &mut [f32]);
    activations::quantize => quantize(x: &[f32], out: &mut Activations);
]);

/// Defines [`sparse::decode`] with the kernels that `$set` makes of a value.
macro_rules! decode_entries {
    ($kernels:ty, $features:literal, $set:path) => {
        impl $kernels {
            #[doc = "As [`sparse::decode`]."]
            pub(crate) fn decode_entries<T: Float>(self, entries: Entries<'_>, out: &mut [T]) {
                #[target_feature(enable = $features)]
                fn compiled<T: Float>(kernels: Kernels, entries: Entries<'_>, out: &mut [T]) {
                    sparse::decode(|x, out| T::round(kernels, x, out), entries, out)
                }
                // SAFETY: `self` proves that the processor has the features.
                unsafe { compiled(Kernels($set(self)), entries, out) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
decode_entries!(super::avx2::Avx2, "avx2", Set::Avx2);
#[cfg(target_arch = "aarch64")]
decode_entries!(super::neon::Neon, "neon", Set::Neon);

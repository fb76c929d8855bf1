//! Decoding of rows to f32, f16 or bf16.
#![forbid(unsafe_code)]

use crate::codec::stored::StoredMatrix;
use crate::codec::strips::STRIP_ROWS;
use crate::kernels::views::Strip;
use crate::kernels::{Float, Kernels};
use crate::rotation::Rotation;
use half::{bf16, f16};

/// Rows to decode: at least one, and none past the last.
pub struct Rows<'a> {
    pub(crate) stored: &'a dyn StoredMatrix,
    /// The rotation of their basis, which is inverted.
    pub(crate) rotation: Option<&'a Rotation>,
    pub(crate) kernels: Kernels,
    pub(crate) first: usize,
    /// True if kernels write past the caches.
    pub(crate) streamed: bool,
    /// Memory for rows that are not f32 and have no kernel.
    pub(crate) scratch: &'a mut Vec<f32>,
}

/// A type that rows are decoded to.
///
/// It is implemented type by type, so that its kernels are compiled once, with this crate.
pub trait Decode: Sized {
    /// Fills `out`.
    fn decode(rows: Rows<'_>, out: &mut [Self]);
}

macro_rules! decode {
    ($($type:ty)*) => {$(
        impl Decode for $type {
            fn decode(rows: Rows<'_>, out: &mut [Self]) {
                decode(rows, out);
            }
        }
    )*};
}
decode!(f32 f16 bf16);

fn decode<T: Float>(rows: Rows<'_>, mut out: &mut [T]) {
    let Rows {
        stored,
        rotation,
        kernels,
        mut first,
        streamed,
        scratch,
    } = rows;
    let cols = stored.cols();
    // Without gathers, entry by entry is as fast where rows are not rounded.
    let by_entries = kernels.gathers_entries() || kernels.is_integer() && size_of::<T>() < 4;
    if by_entries && stored.entries(first).is_some() {
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            let entries = stored.entries(row).expect("as the first row has");
            kernels.decode_entries(entries, out);
        }
        return;
    }
    let by_row = |first: usize, strip: Option<Strip<'_>>, out: &mut [f32]| {
        match strip.filter(|_| kernels.is_integer()) {
            None => stored.decode_rows(first, out),
            Some(strip) => {
                for (row, out) in (first % STRIP_ROWS..).zip(out.chunks_exact_mut(cols)) {
                    kernels.decode_row(strip, row, out);
                }
            }
        }
        if let Some(rotation) = rotation {
            let rows = out.chunks_exact_mut(cols);
            rows.for_each(|row| kernels.rotate_back(rotation, row));
        }
    };
    while !out.is_empty() {
        let rows = STRIP_ROWS - first % STRIP_ROWS;
        let (now, rest) = out.split_at_mut(out.len().min(rows * cols));
        let strip = stored.strip(first / STRIP_ROWS);
        let is_whole = |strip: &Strip<'_>| strip.scales.len() * cols == now.len();
        let (whole, part) = (
            strip.filter(is_whole),
            strip.filter(|strip| !is_whole(strip)),
        );
        if !whole.is_some_and(|strip| kernels.decode(strip, rotation, streamed, now)) {
            match T::as_f32(now) {
                Some(now) => by_row(first, part, now),
                None => {
                    scratch.resize(now.len(), 0.0);
                    by_row(first, part, &mut scratch[..now.len()]);
                    T::round(kernels, &scratch[..now.len()], now);
                }
            }
        }
        first += rows;
        out = rest;
    }
}

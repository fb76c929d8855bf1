//! Decoding of packed weights to floats, written once for the instruction sets of x86-64.
#![forbid(unsafe_code)]

use super::activations::GROUP;
use super::scalar::Signs;
use super::views::{Primes, Strip};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use std::cell::RefCell;

/// Tiles per group of columns.
pub(super) const TILES: usize = GROUP / 4;

/// One cache line of 64 bytes: signed levels of a row, or numbers.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; GROUP]);

/// Scratch memory for a strip.
#[derive(Default)]
pub(super) struct Memory {
    /// Levels, row by row: `[64, blocks]`.
    rows: Vec<Line>,
    /// Row after the inverse rotation.
    turned: Vec<Line>,
    /// Rounded row, before it is streamed past the caches.
    rounded: Vec<Line>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Calls `decode` with the scratch memory of this thread.
pub(super) fn with_memory(decode: impl FnOnce(&mut Memory)) {
    MEMORY.with_borrow_mut(decode);
}

impl Memory {
    /// Returns the rows for the levels of a strip with this many columns.
    pub(super) fn rows(&mut self, cols: usize) -> &mut [Line] {
        self.rows
            .resize(cols.div_ceil(GROUP) * 64, Line([0; GROUP]));
        &mut self.rows
    }

    /// Decodes the levels in this memory to `out [rows, cols]`.
    ///
    /// The result is bit-identical to the reference, and inverse-rotated if there is a rotation.
    /// `streamed` bypasses the caches.
    #[inline(always)]
    pub(super) fn put<W: Weights, T: Element>(
        &mut self,
        proof: W::Proof,
        strip: &Strip<'_>,
        rotation: Option<&Rotation>,
        streamed: bool,
        out: &mut [T],
    ) {
        let Self {
            rows,
            turned,
            rounded,
        } = self;
        let rows = rows.chunks_exact(strip.cols.div_ceil(GROUP));
        let out = out.chunks_exact_mut(strip.cols);
        for (i, (levels, out)) in rows.zip(out).enumerate() {
            let row = Row { levels, strip, i };
            if streamed {
                let rounded = numbers(rounded, strip.cols);
                put::<W, T>(proof, row, rotation, turned, rounded);
                let (from, to) = (bytemuck::cast_slice(rounded), bytemuck::cast_slice_mut(out));
                stream::<W>(proof, from, to);
            } else {
                put::<W, T>(proof, row, rotation, turned, out);
            }
        }
        if streamed {
            W::end_stream(proof);
        }
    }
}

/// Writes the weights of a row, inverse-rotated if there is a rotation.
#[inline(always)]
fn put<W: Weights, T: Element>(
    proof: W::Proof,
    row: Row<'_>,
    rotation: Option<&Rotation>,
    turned: &mut Vec<Line>,
    out: &mut [T],
) {
    match rotation {
        None => put_row::<W, T>(proof, row, out),
        Some(rotation) => {
            let turned = numbers(turned, row.strip.cols);
            W::put_turned(proof, row, rotation, turned, out);
        }
    }
}

/// Returns `len` numbers of arbitrary value.
fn numbers<T: Element>(memory: &mut Vec<Line>, len: usize) -> &mut [T] {
    memory.resize((len * size_of::<T>()).div_ceil(GROUP), Line([0; GROUP]));
    &mut bytemuck::cast_slice_mut(memory)[..len]
}

/// Copies into memory past the caches, so that the destination is not read first.
#[inline(always)]
fn stream<W: Weights>(proof: W::Proof, from: &[u8], to: &mut [u8]) {
    let start = to.as_ptr().align_offset(GROUP).min(to.len());
    let (first, to) = to.split_at_mut(start);
    first.copy_from_slice(&from[..start]);
    let (lines, last) = to.as_chunks_mut();
    let (from, from_last) = from[start..].as_chunks();
    for (to, from) in lines.iter_mut().zip(from) {
        W::stream(proof, from, to);
    }
    last.copy_from_slice(from_last);
}

/// Row `i` of a strip, and its levels.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub levels: &'a [Line],
    pub strip: &'a Strip<'a>,
    pub i: usize,
}

/// Runs [`Weights::put_turned`] for any rotation.
#[inline(always)]
pub(super) fn put_turned<W: Weights, T: Element>(
    proof: W::Proof,
    row: Row<'_>,
    rotation: &Rotation,
    turned: &mut [f32],
    out: &mut [T],
) {
    put_row::<W, f32>(proof, row, turned);
    rotation.invert_by(
        |x, factor, signs| W::transform(proof, x, factor, signs),
        turned,
    );
    convert::<W, T>(proof, turned, out);
}

/// Writes the weights of a row.
#[inline(always)]
pub(super) fn put_row<W: Weights, T: Element>(
    proof: W::Proof,
    Row { levels, strip, i }: Row<'_>,
    out: &mut [T],
) {
    for (block, (levels, out)) in levels.iter().zip(out.chunks_mut(GROUP)).enumerate() {
        let [first, second] = match strip.primes {
            Primes::Rows(indices) => [indices[i]; 2],
            Primes::Groups {
                indices,
                cols: GROUP,
            } => [indices[block][i]; 2],
            Primes::Groups { indices, .. } => {
                let first = indices[2 * block][i];
                let second = indices.get(2 * block + 1);
                [first, second.map_or(first, |indices| indices[i])]
            }
        };
        let prime = |index: u8| PRIME_LUT[usize::from(index)] as f32;
        let primes = [prime(first), prime(second)];
        let weights = W::new(proof, &levels.0, primes, strip.scales[i]);
        put_block(weights, out);
    }
}

/// Rounds finite weights.
#[inline(always)]
pub(super) fn convert<W: Weights, T: Element>(proof: W::Proof, row: &[f32], out: &mut [T]) {
    for (x, out) in row.chunks(GROUP).zip(out.chunks_mut(GROUP)) {
        let mut last = [0.0; GROUP];
        let x: &[f32; GROUP] = match x.first_chunk() {
            Some(x) => x,
            None => {
                last[..x.len()].copy_from_slice(x);
                &last
            }
        };
        put_block(W::load(proof, x), out);
    }
}

/// Runs [`Element::put`] for up to 64 weights.
#[inline(always)]
fn put_block<T: Element>(weights: impl Weights, out: &mut [T]) {
    match out.first_chunk_mut() {
        Some(out) => T::put(weights, out),
        None => {
            let mut block = [T::default(); GROUP];
            T::put(weights, &mut block);
            out.copy_from_slice(&block[..out.len()]);
        }
    }
}

/// Vector of 64 finite weights.
///
/// Methods are always inlined, into a function that is compiled for the instructions.
pub(super) trait Weights: Numbers<GROUP> {
    /// Proof that this machine has the instructions.
    type Proof: Copy;

    /// Computes `scale * (prime * level)` with one rounding.
    ///
    /// The primes belong to the first and the second 32 signed levels.
    fn new(proof: Self::Proof, levels: &[u8; GROUP], primes: [f32; 2], scale: f32) -> Self;

    /// Loads weights as they are in memory.
    fn load(proof: Self::Proof, weights: &[f32; GROUP]) -> Self;

    /// Runs [`super::scalar::transform`].
    fn transform(proof: Self::Proof, x: &mut [f32], factor: f32, signs: Signs<'_>);

    /// Writes the weights of a row to `out [cols]`, inverse-rotated and rounded. `turned [cols]`
    /// is scratch memory.
    #[inline(always)]
    fn put_turned<T: Element>(
        proof: Self::Proof,
        row: Row<'_>,
        rotation: &Rotation,
        turned: &mut [f32],
        out: &mut [T],
    ) {
        put_turned::<Self, T>(proof, row, rotation, turned, out);
    }

    /// Copies into an aligned cache line of memory, past the caches.
    fn stream(proof: Self::Proof, from: &[u8; 64], to: &mut [u8; 64]);

    /// Fence: other threads see streamed data before anything that is written afterwards.
    fn end_stream(proof: Self::Proof);
}

/// Vector of `N` finite numbers. Methods are always inlined, as those of [`Weights`].
pub trait Numbers<const N: usize>: Copy {
    /// Stores the numbers unchanged.
    fn put_f32(self, out: &mut [f32; N]);

    /// Stores the numbers rounded to nearest, ties to even.
    fn put_f16(self, out: &mut [f16; N]);

    /// Stores the numbers rounded to nearest, ties to even.
    fn put_bf16(self, out: &mut [bf16; N]);
}

/// Number type that weights can be rounded to.
pub trait Element: Copy + Default + Pod {
    /// Stores numbers, rounded to nearest, ties to even.
    fn put<const N: usize>(numbers: impl Numbers<N>, out: &mut [Self; N]);
}

impl Element for f32 {
    #[inline(always)]
    fn put<const N: usize>(numbers: impl Numbers<N>, out: &mut [Self; N]) {
        numbers.put_f32(out);
    }
}

impl Element for f16 {
    #[inline(always)]
    fn put<const N: usize>(numbers: impl Numbers<N>, out: &mut [Self; N]) {
        numbers.put_f16(out);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn put<const N: usize>(numbers: impl Numbers<N>, out: &mut [Self; N]) {
        numbers.put_bf16(out);
    }
}

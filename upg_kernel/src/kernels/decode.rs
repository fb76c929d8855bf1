//! Packed weights to floats, written once for the instruction sets of x86-64.
#![forbid(unsafe_code)]

use super::Kernels;
use super::activations::GROUP;
use super::views::{Primes, Strip};
use crate::prime_lut::PRIME_LUT;
use crate::rotation::Rotation;
use half::{bf16, f16};
use std::cell::RefCell;

/// Tiles of so many columns.
pub(super) const TILES: usize = GROUP / 4;

/// 64 levels of a row, signed.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Levels64(pub [u8; GROUP]);

/// Memory for a strip.
#[derive(Default)]
pub(super) struct Memory {
    /// The levels, row by row: `[64, blocks]`.
    rows: Vec<Levels64>,
    /// A row before it is turned back.
    row: Vec<f32>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Calls `decode` with memory of this thread.
pub(super) fn with_memory(decode: impl FnOnce(&mut Memory)) {
    MEMORY.with_borrow_mut(decode);
}

impl Memory {
    /// The levels of a strip of so many columns.
    pub(super) fn rows(&mut self, cols: usize) -> &mut [Levels64] {
        self.rows
            .resize(cols.div_ceil(GROUP) * 64, Levels64([0; GROUP]));
        &mut self.rows
    }

    /// `out [rows, cols]`: every row as the reference decodes it, to the bit, from the levels that are here, and
    /// turned back if there is a rotation.
    #[inline(always)]
    pub(super) fn put<W: Weights, T: Element>(
        &mut self,
        (proof, kernels): (W::Proof, Kernels),
        strip: &Strip<'_>,
        rotation: Option<&Rotation>,
        out: &mut [T],
    ) {
        let rows = self.rows.chunks_exact(strip.cols.div_ceil(GROUP));
        let out = out.chunks_exact_mut(strip.cols);
        for (i, (levels, out)) in rows.zip(out).enumerate() {
            match rotation {
                None => put_row::<W, T>(proof, levels, strip, i, out),
                Some(rotation) => {
                    self.row.resize(strip.cols, 0.0);
                    put_row::<W, f32>(proof, levels, strip, i, &mut self.row);
                    rotation.invert_with(kernels, &mut self.row);
                    convert::<W, T>(proof, &self.row, out);
                }
            }
        }
    }
}

/// The weights of row `row` of a strip.
#[inline(always)]
fn put_row<W: Weights, T: Element>(
    proof: W::Proof,
    levels: &[Levels64],
    strip: &Strip<'_>,
    row: usize,
    out: &mut [T],
) {
    for (block, (levels, out)) in levels.iter().zip(out.chunks_mut(GROUP)).enumerate() {
        let [first, second] = match strip.primes {
            Primes::Rows(indices) => [indices[row]; 2],
            Primes::Groups {
                indices,
                cols: GROUP,
            } => [indices[block][row]; 2],
            Primes::Groups { indices, .. } => {
                let first = indices[2 * block][row];
                [first, indices.get(2 * block + 1).map_or(first, |i| i[row])]
            }
        };
        let prime = |index: u8| PRIME_LUT[usize::from(index)] as f32;
        let primes = [prime(first), prime(second)];
        let weights = W::new(proof, &levels.0, primes, strip.scales[row]);
        put_block(weights, out);
    }
}

/// Rounds finite weights.
#[inline(always)]
fn convert<W: Weights, T: Element>(proof: W::Proof, row: &[f32], out: &mut [T]) {
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

/// [`Element::put`] of up to 64 weights.
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

/// 64 finite weights in registers. Methods are always put in their place, in a function that is compiled for the
/// instructions.
pub trait Weights: Copy {
    /// A value is the proof that this machine has the instructions.
    type Proof: Copy;

    /// `scale * (prime * level)` with one rounding, the primes those of the first and of the second 32 signed levels.
    fn new(proof: Self::Proof, levels: &[u8; GROUP], primes: [f32; 2], scale: f32) -> Self;

    /// As they lie in memory.
    fn load(proof: Self::Proof, weights: &[f32; GROUP]) -> Self;

    /// As they are.
    fn put_f32(self, out: &mut [f32; GROUP]);

    /// Rounded to nearest, ties to even.
    fn put_f16(self, out: &mut [f16; GROUP]);

    /// The same.
    fn put_bf16(self, out: &mut [bf16; GROUP]);
}

/// What a weight can be rounded to.
pub trait Element: Copy + Default {
    /// 64 weights, rounded to nearest, ties to even.
    fn put(weights: impl Weights, out: &mut [Self; GROUP]);
}

impl Element for f32 {
    #[inline(always)]
    fn put(weights: impl Weights, out: &mut [Self; GROUP]) {
        weights.put_f32(out);
    }
}

impl Element for f16 {
    #[inline(always)]
    fn put(weights: impl Weights, out: &mut [Self; GROUP]) {
        weights.put_f16(out);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn put(weights: impl Weights, out: &mut [Self; GROUP]) {
        weights.put_bf16(out);
    }
}

//! The transform of a rotation, written once over registers of any width.
#![forbid(unsafe_code)]

use super::scalar;

/// A register of f32.
pub(super) trait Register: Copy {
    /// A value is the proof that this machine has the instructions.
    type Proof: Copy;
    /// What it holds.
    type Block;
    /// The most that are transformed at once: as many as there are, with what a transform needs beside them, or 16.
    const TOGETHER: usize = 16;

    fn load(proof: Self::Proof, block: &Self::Block) -> Self;
    fn store(self, block: &mut Self::Block);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;

    /// The transforms of each register by itself.
    fn within<const N: usize>(registers: &mut [Self; N]);
}

/// The unscaled Walsh-Hadamard transform, with the additions of the reference in its order, of so many blocks and
/// of what is too short for one.
///
/// As many spans as [`Register::TOGETHER`] registers allow are done in one pass over memory.
#[inline(always)]
pub(super) fn hadamard<R: Register>(proof: R::Proof, blocks: &mut [R::Block], rest: &mut [f32]) {
    let mut span = match blocks.len().min(R::TOGETHER) {
        0 => return scalar::hadamard(rest, 1),
        1 => first_pass::<R, 1>(proof, blocks),
        2 => first_pass::<R, 2>(proof, blocks),
        4 => first_pass::<R, 4>(proof, blocks),
        8 => first_pass::<R, 8>(proof, blocks),
        _ => first_pass::<R, 16>(proof, blocks),
    };
    while span < blocks.len() {
        span = match (blocks.len() / span).min(R::TOGETHER) {
            2 => pass::<R, 2>(proof, blocks, span),
            4 => pass::<R, 4>(proof, blocks, span),
            8 => pass::<R, 8>(proof, blocks, span),
            _ => pass::<R, 16>(proof, blocks, span),
        };
    }
}

/// Spans in each register, and those between `N` registers; returns the next span in registers.
#[inline(always)]
fn first_pass<R: Register, const N: usize>(proof: R::Proof, blocks: &mut [R::Block]) -> usize {
    for blocks in blocks.as_chunks_mut::<N>().0 {
        let mut registers = [R::load(proof, &blocks[0]); N];
        for i in 1..N {
            registers[i] = R::load(proof, &blocks[i]);
        }
        R::within(&mut registers);
        between(&mut registers);
        for i in 0..N {
            registers[i].store(&mut blocks[i]);
        }
    }
    N
}

/// `N` registers at a distance of `span` registers each; returns the next span.
#[inline(always)]
fn pass<R: Register, const N: usize>(
    proof: R::Proof,
    blocks: &mut [R::Block],
    span: usize,
) -> usize {
    for blocks in blocks.chunks_exact_mut(N * span) {
        for first in 0..span {
            let mut registers = [R::load(proof, &blocks[first]); N];
            for i in 1..N {
                registers[i] = R::load(proof, &blocks[first + i * span]);
            }
            between(&mut registers);
            for i in 0..N {
                registers[i].store(&mut blocks[first + i * span]);
            }
        }
    }
    N * span
}

/// The transform across registers, lane by lane.
#[inline(always)]
fn between<R: Register, const N: usize>(registers: &mut [R; N]) {
    // Spans that are constants: only then all of it stays in registers.
    if N > 1 {
        between_at::<R, N, 1>(registers);
    }
    if N > 2 {
        between_at::<R, N, 2>(registers);
    }
    if N > 4 {
        between_at::<R, N, 4>(registers);
    }
    if N > 8 {
        between_at::<R, N, 8>(registers);
    }
}

#[inline(always)]
fn between_at<R: Register, const N: usize, const SPAN: usize>(registers: &mut [R; N]) {
    for i in 0..N / 2 {
        let first = i / SPAN * 2 * SPAN + i % SPAN;
        let (a, b) = (registers[first], registers[first + SPAN]);
        registers[first] = a.add(b);
        registers[first + SPAN] = a.sub(b);
    }
}

//! Hadamard transform of a rotation, written once over registers of any width.
#![forbid(unsafe_code)]

use super::scalar::{self, Signs};

/// Vector register of f32.
pub(super) trait Register: Copy {
    /// Proof that this machine has the instructions.
    type Proof: Copy;
    /// Array with the content of a register.
    type Block;
    /// Maximum registers that are transformed at once, 8 or 16: those left beside what a
    /// transform needs.
    const TOGETHER: usize = 16;

    fn load(proof: Self::Proof, block: &Self::Block) -> Self;
    fn store(self, block: &mut Self::Block);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    /// Multiplies every element by `factor`.
    fn scale(self, factor: f32) -> Self;
    /// Flips signs as [`scalar::flip`] does, for register `index` of the vector that the signs
    /// belong to.
    fn flip(self, signs: &[u8], index: usize) -> Self;

    /// Transforms each register by itself.
    fn within<const N: usize>(registers: &mut [Self; N]);
}

/// Source of the registers of a vector in the first pass over memory.
pub(super) trait Source<R: Register> {
    fn load(&self, proof: R::Proof, blocks: &[R::Block], index: usize) -> R;
}

/// Destination of the registers in the last pass over memory.
pub(super) trait Sink<R: Register> {
    fn store(&mut self, blocks: &mut [R::Block], index: usize, register: R);
}

/// The vector itself.
pub(super) struct Same;

/// Sign flips with [`Register::flip`].
struct Flipped<'a>(&'a [u8]);

/// Multiplication of every element by a factor.
struct Scaled(f32);

/// Multiplication by a factor, then sign flips.
pub(super) struct ScaledAndFlipped<'a>(pub(super) f32, pub(super) &'a [u8]);

impl<R: Register> Source<R> for Same {
    #[inline(always)]
    fn load(&self, proof: R::Proof, blocks: &[R::Block], index: usize) -> R {
        R::load(proof, &blocks[index])
    }
}

impl<R: Register> Sink<R> for Same {
    #[inline(always)]
    fn store(&mut self, blocks: &mut [R::Block], index: usize, register: R) {
        register.store(&mut blocks[index]);
    }
}

impl<R: Register> Source<R> for Flipped<'_> {
    #[inline(always)]
    fn load(&self, proof: R::Proof, blocks: &[R::Block], index: usize) -> R {
        R::load(proof, &blocks[index]).flip(self.0, index)
    }
}

impl<R: Register> Sink<R> for Scaled {
    #[inline(always)]
    fn store(&mut self, blocks: &mut [R::Block], index: usize, register: R) {
        register.scale(self.0).store(&mut blocks[index]);
    }
}

impl<R: Register> Sink<R> for ScaledAndFlipped<'_> {
    #[inline(always)]
    fn store(&mut self, blocks: &mut [R::Block], index: usize, register: R) {
        let register = register.scale(self.0).flip(self.1, index);
        register.store(&mut blocks[index]);
    }
}

/// Runs [`scalar::transform`] on blocks, or on a rest too short for one.
#[inline(always)]
pub(super) fn transform_in_place<R: Register>(
    proof: R::Proof,
    blocks: &mut [R::Block],
    rest: &mut [f32],
    factor: f32,
    signs: Signs<'_>,
) {
    if blocks.is_empty() {
        return scalar::transform(rest, factor, signs);
    }
    match signs {
        Signs::FlippedBefore(signs) => {
            transform::<R>(proof, blocks, Flipped(signs), Scaled(factor));
        }
        Signs::FlippedAfter(signs) => {
            transform::<R>(proof, blocks, Same, ScaledAndFlipped(factor, signs));
        }
    }
}

/// Computes the unscaled Walsh-Hadamard transform,
/// with the additions in the order of the reference.
///
/// Between passes the registers are in `blocks`, whose number is a power of two. One pass over
/// memory handles as many spans as [`Register::TOGETHER`] registers allow.
#[inline(always)]
pub(super) fn transform<R: Register>(
    proof: R::Proof,
    blocks: &mut [R::Block],
    source: impl Source<R>,
    mut sink: impl Sink<R>,
) {
    let mut span = R::TOGETHER;
    match blocks.len() {
        1 => return first_pass::<R, 1>(proof, blocks, &source, &mut sink),
        2 => return first_pass::<R, 2>(proof, blocks, &source, &mut sink),
        4 => return first_pass::<R, 4>(proof, blocks, &source, &mut sink),
        8 => return first_pass::<R, 8>(proof, blocks, &source, &mut sink),
        _ if span == 8 => first_pass::<R, 8>(proof, blocks, &source, &mut Same),
        16 => return first_pass::<R, 16>(proof, blocks, &source, &mut sink),
        _ => first_pass::<R, 16>(proof, blocks, &source, &mut Same),
    }
    while blocks.len() / span > R::TOGETHER {
        match R::TOGETHER {
            8 => pass::<R, 8>(proof, blocks, span, &mut Same),
            _ => pass::<R, 16>(proof, blocks, span, &mut Same),
        }
        span *= R::TOGETHER;
    }
    match blocks.len() / span {
        2 => pass::<R, 2>(proof, blocks, span, &mut sink),
        4 => pass::<R, 4>(proof, blocks, span, &mut sink),
        8 => pass::<R, 8>(proof, blocks, span, &mut sink),
        _ => pass::<R, 16>(proof, blocks, span, &mut sink),
    }
}

/// Transforms over the spans within each register, and between `N` registers.
#[inline(always)]
fn first_pass<R: Register, const N: usize>(
    proof: R::Proof,
    blocks: &mut [R::Block],
    source: &impl Source<R>,
    sink: &mut impl Sink<R>,
) {
    for first in (0..blocks.len()).step_by(N) {
        let mut registers = [source.load(proof, blocks, first); N];
        for (i, register) in registers.iter_mut().enumerate() {
            *register = source.load(proof, blocks, first + i);
        }
        R::within(&mut registers);
        between(&mut registers);
        for (i, register) in registers.into_iter().enumerate() {
            sink.store(blocks, first + i, register);
        }
    }
}

/// Transforms `N` registers at a distance of `span` registers each.
#[inline(always)]
fn pass<R: Register, const N: usize>(
    proof: R::Proof,
    blocks: &mut [R::Block],
    span: usize,
    sink: &mut impl Sink<R>,
) {
    for start in (0..blocks.len()).step_by(N * span) {
        for first in start..start + span {
            let mut registers = [R::load(proof, &blocks[first]); N];
            for (i, register) in registers.iter_mut().enumerate() {
                *register = R::load(proof, &blocks[first + i * span]);
            }
            between(&mut registers);
            for (i, register) in registers.into_iter().enumerate() {
                sink.store(blocks, first + i * span, register);
            }
        }
    }
}

/// Transforms across registers, lane by lane.
#[inline(always)]
fn between<R: Register, const N: usize>(registers: &mut [R; N]) {
    // Spans are constants: otherwise not everything stays in registers.
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

//! The transform of a rotation, written once over registers of any width.
#![forbid(unsafe_code)]

use super::scalar::{self, Signs};

/// A register of f32.
pub(super) trait Register: Copy {
    /// A value is the proof that this machine has the instructions.
    type Proof: Copy;
    /// What it holds.
    type Block;
    /// The most that are transformed at once, 8 or 16: as many as there are beside what a transform needs.
    const TOGETHER: usize = 16;

    fn load(proof: Self::Proof, block: &Self::Block) -> Self;
    fn store(self, block: &mut Self::Block);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    /// Every element times `factor`.
    fn scale(self, factor: f32) -> Self;
    /// As [`scalar::flip`] for register `index` of what the signs belong to.
    fn flip(self, signs: &[u8], index: usize) -> Self;

    /// The transforms of each register by itself.
    fn within<const N: usize>(registers: &mut [Self; N]);
}

/// Where the first pass over memory finds the registers of a vector.
pub(super) trait Source<R: Register> {
    fn load(&self, proof: R::Proof, blocks: &[R::Block], index: usize) -> R;
}

/// Where the last pass over memory leaves them.
pub(super) trait Sink<R: Register> {
    fn store(&mut self, blocks: &mut [R::Block], index: usize, register: R);
}

/// The vector itself.
pub(super) struct Same;

/// The same with changed signs, which [`Register::flip`] knows.
struct Flipped<'a>(&'a [u8]);

/// Every element times a factor.
struct Scaled(f32);

/// With changed signs after that.
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

/// As [`scalar::transform`] of so many blocks, or of what is too short for one.
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

/// The unscaled Walsh-Hadamard transform, with the additions of the reference in its order. In between registers lie
/// in `blocks`, a power of two of them.
///
/// As many spans as [`Register::TOGETHER`] registers allow are done in one pass over memory.
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

/// Spans in each register, and those between `N` registers.
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

/// `N` registers at a distance of `span` registers each.
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

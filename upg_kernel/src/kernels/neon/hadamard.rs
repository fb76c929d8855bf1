//! The transform of a rotation.

use super::*;

/// The unscaled Walsh-Hadamard transform, with the additions of the reference in its order.
///
/// As many spans as registers allow are done in one pass over memory: 4,096 elements take three.
#[target_feature(enable = "neon")]
pub(super) fn hadamard(x: &mut [f32]) {
    let (blocks, rest) = x.as_chunks_mut::<4>();
    let mut span = match blocks.len() {
        0 => return scalar::hadamard(rest, 1),
        1 => first_pass::<1>(blocks),
        2 => first_pass::<2>(blocks),
        4 => first_pass::<4>(blocks),
        8 => first_pass::<8>(blocks),
        _ => first_pass::<16>(blocks),
    };
    while span < blocks.len() {
        span = match blocks.len() / span {
            2 => pass::<2>(blocks, span),
            4 => pass::<4>(blocks, span),
            8 => pass::<8>(blocks, span),
            _ => pass::<16>(blocks, span),
        };
    }
}

/// Spans below 4 in each register, and those between `N` registers; returns the next span in registers.
#[target_feature(enable = "neon")]
fn first_pass<const N: usize>(blocks: &mut [[f32; 4]]) -> usize {
    for blocks in blocks.as_chunks_mut::<N>().0 {
        let mut registers = [vdupq_n_f32(0.0); N];
        for (v, block) in registers.iter_mut().zip(&*blocks) {
            *v = within(load_f32(block));
        }
        between(&mut registers);
        for (block, v) in blocks.iter_mut().zip(registers) {
            store_f32(block, v);
        }
    }
    N
}

/// `N` registers at a distance of `span` registers each; returns the next span.
#[target_feature(enable = "neon")]
fn pass<const N: usize>(blocks: &mut [[f32; 4]], span: usize) -> usize {
    for blocks in blocks.chunks_exact_mut(N * span) {
        for first in 0..span {
            let mut registers = [vdupq_n_f32(0.0); N];
            for i in 0..N {
                registers[i] = load_f32(&blocks[first + i * span]);
            }
            between(&mut registers);
            for i in 0..N {
                store_f32(&mut blocks[first + i * span], registers[i]);
            }
        }
    }
    N * span
}

/// Spans 1 and 2.
#[inline]
#[target_feature(enable = "neon")]
fn within(v: float32x4_t) -> float32x4_t {
    // a + b, a - b, c + d, c - d of a, b, c, d, and then the same of a, c and b, d.
    let (even, odd) = (vtrn1q_f32(v, v), vtrn2q_f32(v, v));
    let v = vtrn1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
    let (low, high) = (vget_low_f32(v), vget_high_f32(v));
    vcombine_f32(vadd_f32(low, high), vsub_f32(low, high))
}

/// The transform across registers, lane by lane.
#[inline]
#[target_feature(enable = "neon")]
fn between<const N: usize>(registers: &mut [float32x4_t; N]) {
    // Spans that are constants: only then all of it stays in registers.
    if N > 1 {
        between_at::<N, 1>(registers);
    }
    if N > 2 {
        between_at::<N, 2>(registers);
    }
    if N > 4 {
        between_at::<N, 4>(registers);
    }
    if N > 8 {
        between_at::<N, 8>(registers);
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn between_at<const N: usize, const SPAN: usize>(registers: &mut [float32x4_t; N]) {
    for i in 0..N / 2 {
        let first = i / SPAN * 2 * SPAN + i % SPAN;
        let (a, b) = (registers[first], registers[first + SPAN]);
        registers[first] = vaddq_f32(a, b);
        registers[first + SPAN] = vsubq_f32(a, b);
    }
}

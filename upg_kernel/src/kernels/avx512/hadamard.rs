//! The two parts of a rotation.

use super::*;

/// Sign changes as in [`scalar::flip`].
#[target_feature(enable = "avx512f")]
pub(super) fn flip(x: &mut [f32], signs: &[u8]) {
    let (blocks, rest) = x.as_chunks_mut::<16>();
    let (pairs, _) = signs.as_chunks::<2>();
    for (block, signs) in blocks.iter_mut().zip(pairs) {
        let bits = _mm512_castps_si512(load_f32(block));
        let sign = _mm512_maskz_set1_epi32(u16::from_le_bytes(*signs), i32::MIN);
        *block = to_array(_mm512_castsi512_ps(_mm512_xor_si512(bits, sign)));
    }
    scalar::flip(rest, &signs[2 * blocks.len()..]);
}

/// The unscaled Walsh-Hadamard transform, with the additions of the reference in its order.
///
/// As many spans as registers allow are done in one pass over memory: 4,096 elements take two.
#[target_feature(enable = "avx512f")]
pub(super) fn hadamard(x: &mut [f32]) {
    let (blocks, rest) = x.as_chunks_mut::<16>();
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

/// Spans below 16 in each register, and those between `N` registers; returns the next span in registers.
#[target_feature(enable = "avx512f")]
fn first_pass<const N: usize>(blocks: &mut [[f32; 16]]) -> usize {
    for blocks in blocks.as_chunks_mut::<N>().0 {
        let mut registers = [_mm512_setzero_ps(); N];
        for i in 0..N {
            registers[i] = load_f32(&blocks[i]);
        }
        within(&mut registers);
        between(&mut registers);
        for i in 0..N {
            blocks[i] = to_array(registers[i]);
        }
    }
    N
}

/// `N` registers at a distance of `span` registers each; returns the next span.
#[target_feature(enable = "avx512f")]
fn pass<const N: usize>(blocks: &mut [[f32; 16]], span: usize) -> usize {
    for blocks in blocks.chunks_exact_mut(N * span) {
        for first in 0..span {
            let mut registers = [_mm512_setzero_ps(); N];
            for i in 0..N {
                registers[i] = load_f32(&blocks[first + i * span]);
            }
            between(&mut registers);
            for i in 0..N {
                blocks[first + i * span] = to_array(registers[i]);
            }
        }
    }
    N * span
}

/// Spans 1, 2, 4 and 8 in each register.
#[inline]
#[target_feature(enable = "avx512f")]
fn within<const N: usize>(registers: &mut [__m512; N]) {
    for v in registers.iter_mut() {
        *v = pairs::<0xAAAA>(*v, _mm512_permute_ps::<0b10_11_00_01>(*v));
    }
    for v in registers.iter_mut() {
        *v = pairs::<0xCCCC>(*v, _mm512_permute_ps::<0b01_00_11_10>(*v));
    }
    for v in registers.iter_mut() {
        *v = pairs::<0xF0F0>(*v, _mm512_shuffle_f32x4::<0b10_11_00_01>(*v, *v));
    }
    for v in registers.iter_mut() {
        *v = pairs::<0xFF00>(*v, _mm512_shuffle_f32x4::<0b01_00_11_10>(*v, *v));
    }
}

/// `v + other`; in lanes whose bit is set, which are the second of their pair, `other - v`. A product with 1 or -1
/// is exact: there is one rounding, that of the sum.
#[inline]
#[target_feature(enable = "avx512f")]
fn pairs<const SECOND: u16>(v: __m512, other: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.0);
    let sign = _mm512_mask_sub_ps(one, SECOND, _mm512_setzero_ps(), one);
    _mm512_fmadd_ps(v, sign, other)
}

/// The transform across registers, lane by lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn between<const N: usize>(registers: &mut [__m512; N]) {
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
#[target_feature(enable = "avx512f")]
fn between_at<const N: usize, const SPAN: usize>(registers: &mut [__m512; N]) {
    for i in 0..N / 2 {
        let first = i / SPAN * 2 * SPAN + i % SPAN;
        let (a, b) = (registers[first], registers[first + SPAN]);
        registers[first] = _mm512_add_ps(a, b);
        registers[first + SPAN] = _mm512_sub_ps(a, b);
    }
}

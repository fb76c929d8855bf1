//! `q8` and `q4`.

use super::*;
use crate::kernels::views::LevelsView;
use std::ops::Range;

/// Rows that are multiplied together, so that each part of the activations is loaded once for all.
const TOGETHER: usize = 2;

/// Bytes of a step: 64 levels, or as many codes, two a byte.
const LEVELS: usize = 64;
const CODES: usize = 32;

/// The rows times `x`, whose order is that of the codes.
#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn multiply(rows: GroupedRows<'_>, x: &Activations, out: &mut [f32]) {
    match (rows.levels, rows.group) {
        (LevelsView::Bytes, GROUP) => all_rows::<LEVELS, 1>(rows, &[0; 16], x, out),
        (LevelsView::Bytes, _) => all_rows::<LEVELS, 2>(rows, &[0; 16], x, out),
        (LevelsView::Nibbles(codebook), GROUP) => all_rows::<CODES, 1>(rows, codebook, x, out),
        (LevelsView::Nibbles(codebook), _) => all_rows::<CODES, 2>(rows, codebook, x, out),
    }
}

/// Rows of steps of so many bytes and groups.
#[target_feature(enable = "avx2,fma,popcnt")]
fn all_rows<const BYTES: usize, const GROUPS: usize>(
    rows: GroupedRows<'_>,
    codebook: &[i8; 16],
    x: &Activations,
    out: &mut [f32],
) {
    let table = biased(twice(bytemuck::cast_ref(codebook)));
    let (together, rest) = out.as_chunks_mut::<TOGETHER>();
    let done = together.len() * TOGETHER;
    for (i, out) in together.iter_mut().enumerate() {
        some_rows::<BYTES, GROUPS, TOGETHER>(&rows, i * TOGETHER, table, x, out);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        let out = std::array::from_mut(out);
        some_rows::<BYTES, GROUPS, 1>(&rows, done + i, table, x, out);
    }
}

/// `N` rows from `first` on.
#[target_feature(enable = "avx2,fma,popcnt")]
fn some_rows<const BYTES: usize, const GROUPS: usize, const N: usize>(
    rows: &GroupedRows<'_>,
    first: usize,
    table: __m256i,
    x: &Activations,
    out: &mut [f32; N],
) {
    let &GroupedRows {
        row_bytes, groups, ..
    } = rows;
    let mut whole = [Steps {
        codes: &[],
        indices: &[],
    }; N];
    let mut last = [([0; BYTES], [0; GROUPS]); N];
    for i in 0..N {
        let codes = &rows.codes[(first + i) * row_bytes..][..row_bytes];
        let indices = &rows.prime_indices[(first + i) * groups..][..groups];
        let (codes, codes_rest) = codes.as_chunks();
        let (indices, indices_rest) = indices.as_chunks();
        whole[i] = Steps { codes, indices };
        last[i].0[..codes_rest.len()].copy_from_slice(codes_rest);
        last[i].1[..indices_rest.len()].copy_from_slice(indices_rest);
    }
    let steps = row_bytes / BYTES;
    let mut sums = [_mm256_setzero_ps(); N];
    add_steps(whole, 0..steps, table, x, &mut sums);
    if row_bytes % BYTES != 0 {
        let mut rest = whole;
        for (rest, (codes, indices)) in rest.iter_mut().zip(&last) {
            *rest = Steps {
                codes: std::slice::from_ref(codes),
                indices: std::slice::from_ref(indices),
            };
        }
        add_steps(rest, steps..steps + 1, table, x, &mut sums);
    }
    for i in 0..N {
        out[i] = rows.scales[first + i] * sum_of(sums[i]);
    }
}

/// Some steps of a row.
#[derive(Clone, Copy)]
struct Steps<'a, const BYTES: usize, const GROUPS: usize> {
    codes: &'a [[u8; BYTES]],
    indices: &'a [[u8; GROUPS]],
}

/// Adds the products of the steps, which are those of `range` in their rows.
#[target_feature(enable = "avx2,fma,popcnt")]
fn add_steps<const BYTES: usize, const GROUPS: usize, const N: usize>(
    rows: [Steps<'_, BYTES, GROUPS>; N],
    range: Range<usize>,
    table: __m256i,
    x: &Activations,
    out: &mut [__m256; N],
) {
    let steps = range.len();
    let scales = &x.scales[range.clone()];
    // Said once, so that the loop need not ask again.
    for row in rows {
        assert!(row.codes.len() == steps && row.indices.len() == steps);
    }
    let low_half = _mm256_set1_epi8(15);
    let mut sums = *out;
    for (step, scale) in scales.iter().enumerate() {
        let step_of_row = range.start + step;
        let [first, second] = if BYTES == CODES {
            // Low halves of the codes belong to the first block of a pair, high halves to the second.
            let (pair, second) = (step_of_row / 2, step_of_row % 2 == 1);
            [2 * pair, 2 * pair + 1].map(|block| Half::of(&x.blocks[block], second))
        } else {
            [false, true].map(|second| Half::of(&x.blocks[step_of_row], second))
        };
        let high = [load(first.high), load(second.high)];
        let low = [load(first.low), load(second.low)];
        let offset = [load_i32(first.offset), load_i32(second.offset)];
        let both = _mm256_add_epi32(offset[0], offset[1]);
        let scale = _mm256_set1_ps(*scale);
        for i in 0..N {
            let (registers, _) = rows[i].codes[step].as_chunks();
            prefetch(&rows[i].codes[step], N * BYTES * steps);
            let indices = rows[i].indices[step];
            let levels = if BYTES == CODES {
                let codes = load(&registers[0]);
                let first = _mm256_and_si256(codes, low_half);
                let second = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), low_half);
                [
                    _mm256_shuffle_epi8(table, first),
                    _mm256_shuffle_epi8(table, second),
                ]
            } else {
                [biased(load(&registers[0])), biased(load(&registers[1]))]
            };
            let first = dot(levels[0], high[0], low[0]);
            let second = dot(levels[1], high[1], low[1]);
            if GROUPS == 2 && BYTES == LEVELS {
                // A group in each register.
                for (group, products) in [first, second].into_iter().enumerate() {
                    let products = _mm256_cvtepi32_ps(_mm256_add_epi32(products, offset[group]));
                    let factor = _mm256_mul_ps(prime(indices[group]), scale);
                    sums[i] = _mm256_fmadd_ps(products, factor, sums[i]);
                }
                continue;
            }
            // Eight products a lane: at most 8 * 128 * 8,127, which is below 2^23.
            let products = _mm256_add_epi32(_mm256_add_epi32(first, second), both);
            let prime = match indices[..] {
                // A group in each half of the register.
                [low, high] => primes([low, high]),
                _ => prime(indices[0]),
            };
            let factor = _mm256_mul_ps(prime, scale);
            sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, sums[i]);
        }
    }
    *out = sums;
}

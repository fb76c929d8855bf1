//! `q8` and `q4`.

use super::*;
use crate::kernels::views::LevelsView;

/// Rows that are multiplied together, so that each part of the activations is loaded once for all.
const TOGETHER: usize = 4;

/// Bytes of a step: 64 levels, or as many codes, two a byte.
const LEVELS: usize = 64;
const CODES: usize = 32;

/// The rows times `x`, whose order is that of the codes.
#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn multiply(rows: GroupedRows<'_>, x: &Activations, out: &mut [f32]) {
    match (rows.levels, rows.group) {
        (LevelsView::Bytes, GROUP) => all_rows::<LEVELS, false>(rows, &[0; 16], x, out),
        (LevelsView::Bytes, _) => all_rows::<LEVELS, true>(rows, &[0; 16], x, out),
        (LevelsView::Nibbles(codebook), GROUP) => all_rows::<CODES, false>(rows, codebook, x, out),
        (LevelsView::Nibbles(codebook), _) => all_rows::<CODES, true>(rows, codebook, x, out),
    }
}

/// With groups of 32 columns `PAIRS` has to be true: a step has two of them.
#[target_feature(enable = "avx2,fma,popcnt")]
fn all_rows<const BYTES: usize, const PAIRS: bool>(
    rows: GroupedRows<'_>,
    codebook: &[i8; 16],
    x: &Activations,
    out: &mut [f32],
) {
    let table = biased(twice(bytemuck::cast_ref(codebook)));
    let (together, rest) = out.as_chunks_mut::<TOGETHER>();
    let done = together.len() * TOGETHER;
    for (i, out) in together.iter_mut().enumerate() {
        some_rows::<BYTES, PAIRS, TOGETHER>(&rows, i * TOGETHER, table, x, out);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        let out = std::array::from_mut(out);
        some_rows::<BYTES, PAIRS, 1>(&rows, done + i, table, x, out);
    }
}

/// `N` rows from `first` on.
#[target_feature(enable = "avx2,fma,popcnt")]
fn some_rows<const BYTES: usize, const PAIRS: bool, const N: usize>(
    rows: &GroupedRows<'_>,
    first: usize,
    table: __m256i,
    x: &Activations,
    out: &mut [f32; N],
) {
    let &GroupedRows {
        row_bytes, groups, ..
    } = rows;
    let codes: [&[u8]; N] =
        std::array::from_fn(|i| &rows.codes[(first + i) * row_bytes..][..row_bytes]);
    let indices: [&[u8]; N] =
        std::array::from_fn(|i| &rows.prime_indices[(first + i) * groups..][..groups]);
    let whole = codes.map(|codes| codes.as_chunks::<BYTES>().0);
    let pairs = indices.map(|indices| indices.as_chunks::<2>().0);
    let full = row_bytes / BYTES;
    // A last step of one group of 32 columns.
    let mut last = [[0; BYTES]; N];
    let mut last_pair = [[0; 2]; N];
    for i in 0..N {
        let rest = &codes[i][full * BYTES..];
        last[i][..rest.len()].copy_from_slice(rest);
        last_pair[i][0] = indices[i].last().copied().unwrap_or_default();
        // Said once, so that the loop need not ask again.
        assert!(whole[i].len() == full);
        assert!(if PAIRS { pairs[i].len() } else { groups } == full);
    }
    let low_half = _mm256_set1_epi8(15);
    let mut sums = [_mm256_setzero_ps(); N];
    for step in 0..row_bytes.div_ceil(BYTES) {
        let [first, second] = if BYTES == CODES {
            // Low halves of the codes belong to the first block of a pair, high halves to the second.
            let half = step % 2;
            let pair = [&x.blocks[step - half], &x.blocks[step - half + 1]];
            [halves(pair[0])[half], halves(pair[1])[half]]
        } else {
            halves(&x.blocks[step])
        };
        let high = [load(first.high), load(second.high)];
        let low = [load(first.low), load(second.low)];
        let offset = [load_i32(first.offset), load_i32(second.offset)];
        let both = _mm256_add_epi32(offset[0], offset[1]);
        let scale = _mm256_set1_ps(x.scales[step]);
        for i in 0..N {
            prefetch(codes[i], BYTES * step + N * row_bytes);
            let (bytes, pair) = match step < full {
                true if PAIRS => (&whole[i][step], pairs[i][step]),
                true => (&whole[i][step], [indices[i][step]; 2]),
                false => (&last[i], last_pair[i]),
            };
            let (registers, _) = bytes.as_chunks();
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
            if PAIRS && BYTES == LEVELS {
                // A group in each register.
                for (group, products) in [first, second].into_iter().enumerate() {
                    let products = _mm256_cvtepi32_ps(_mm256_add_epi32(products, offset[group]));
                    let factor = _mm256_mul_ps(prime(pair[group]), scale);
                    sums[i] = _mm256_fmadd_ps(products, factor, sums[i]);
                }
                continue;
            }
            // Eight products a lane: at most 8 * 128 * 8,127, which is below 2^23.
            let products = _mm256_add_epi32(_mm256_add_epi32(first, second), both);
            let prime = match PAIRS {
                // A group in each half of the register.
                true => primes(pair),
                false => prime(pair[0]),
            };
            let factor = _mm256_mul_ps(prime, scale);
            sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, sums[i]);
        }
    }
    for i in 0..N {
        out[i] = rows.scales[first + i] * sum_of(sums[i]);
    }
}

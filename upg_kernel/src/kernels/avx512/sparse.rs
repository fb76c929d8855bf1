//! Rows of `mdcsr`: an entry takes 4 bytes to read (3 in rows without holes), a weight 2 or 4 to write.
//!
//! Primes are gathered from their table of 40 kB. One of 20 kB with what differs from ten times the index was no faster
//! (0.20 instead of 0.19 ns a weight from L2), 64 look-ups that are stored and loaded again a little slower (0.24).

use super::decode::Sixteens;
use super::*;
use crate::kernels::sparse::{BLOCK, Block, Blocks, Entries, Place, put_apart};
use crate::prime_lut::PRIME_COUNT;

/// As [`crate::kernels::sparse::decode`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn decode<T: Element>(proof: Avx512, entries: Entries<'_>, out: &mut [T]) {
    let mut blocks = Blocks::new(entries, out.len());
    if !blocks.is_full {
        out.fill(T::default());
    }
    let scale = _mm512_set1_ps(entries.scale);
    let (mut rounded, mut column) = ([T::default(); BLOCK], 0);
    while let Some(block) = blocks.next(&mut column) {
        let weights = Sixteens::of(proof, weights(&block, scale), entries.scale);
        match block.place {
            Place::From(first) => match out[first..].first_chunk_mut() {
                Some(out) if block.len == BLOCK => T::put(weights, out),
                _ => {
                    T::put(weights, &mut rounded);
                    out[first..first + block.len].copy_from_slice(&rounded[..block.len]);
                }
            },
            Place::Apart => {
                T::put(weights, &mut rounded);
                column = put_apart(&block, &rounded, column, out);
            }
        }
    }
}

/// The product with `x [cols]`, in f32: 64 partial sums, of which each gets every 64th entry in order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dot(entries: Entries<'_>, x: &[f32]) -> f32 {
    assert!(
        i32::try_from(x.len()).is_ok(),
        "columns are gathered by i32"
    );
    let mut blocks = Blocks::new(entries, x.len());
    let scale = _mm512_set1_ps(entries.scale);
    let (mut sums, mut column) = ([_mm512_setzero_ps(); 4], 0);
    while let Some(block) = blocks.next(&mut column) {
        let weights = weights(&block, scale);
        let run = match block.place {
            Place::From(first) if block.len == BLOCK => x[first..].first_chunk::<BLOCK>(),
            _ => None,
        };
        let mut picked = [_mm512_setzero_ps(); 4];
        match run {
            Some(run) => {
                for (picked, run) in picked.iter_mut().zip(run.as_chunks().0) {
                    *picked = load_f32(run);
                }
            }
            None => {
                let before = match block.place {
                    // Wraps only where the delta is no longer the one that `first` was made of.
                    Place::From(first) => first.wrapping_sub(usize::from(block.deltas[0])),
                    Place::Apart => column,
                };
                (picked, column) = pick(&block, before, x);
            }
        }
        for i in 0..4 {
            sums[i] = _mm512_fmadd_ps(weights[i], picked[i], sums[i]);
        }
    }
    let [a, b, c, d] = sums;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
}

/// The weights of a block.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn weights(block: &Block<'_>, scale: __m512) -> [__m512; 4] {
    let mut weights = [scale; 4];
    let (values, primes) = (
        block.values.as_chunks::<16>().0,
        block.primes.as_chunks::<16>().0,
    );
    for i in 0..4 {
        let indices = _mm512_cvtepu16_epi32(load_half(bytemuck::cast_ref(&primes[i])));
        let indices = _mm512_min_epu32(indices, _mm512_set1_epi32(PRIME_COUNT as i32 - 1));
        // SAFETY: every index is below the length of the table.
        let primes = unsafe { _mm512_i32gather_epi32::<4>(indices, PRIME_LUT.as_ptr().cast()) };
        // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
        let values = unsafe { _mm_loadu_si128(values[i].as_ptr().cast()) };
        let values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
        // Exact: there is one rounding, that of the scale.
        let product = _mm512_mul_ps(_mm512_cvtepi32_ps(primes), values);
        weights[i] = _mm512_mul_ps(scale, product);
    }
    weights
}

/// The elements of `x` in the columns of a block, zeros after them, and the last of these columns; `before` is the column
/// of the entry before. Panics if the last one is past the end of `x`.
///
/// The columns that are gathered are bounded by themselves: another process may change the deltas of a mapped file
/// between two reads of them, and the compiler may read them again.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pick(block: &Block<'_>, before: usize, x: &[f32]) -> ([__m512; 4], usize) {
    let zero = _mm512_setzero_si512();
    let mut before = _mm512_set1_epi32(before as i32);
    let mut columns = [before; 4];
    for (columns, deltas) in columns.iter_mut().zip(block.deltas.as_chunks::<16>().0) {
        // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
        let deltas = unsafe { _mm_loadu_si128(deltas.as_ptr().cast()) };
        let mut sums = _mm512_cvtepu8_epi32(deltas);
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<15>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<14>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<12>(sums, zero));
        sums = _mm512_add_epi32(sums, _mm512_alignr_epi32::<8>(sums, zero));
        *columns = _mm512_add_epi32(before, sums);
        before = _mm512_permutexvar_epi32(_mm512_set1_epi32(15), *columns);
    }
    // Deltas after the last entry are 1.
    let last = _mm_cvtsi128_si32(_mm512_castsi512_si128(before)) as usize - (BLOCK - block.len);
    assert!(last < x.len(), "column {last} of {}", x.len());
    let largest = _mm512_set1_epi32((x.len() - 1) as i32);
    let valid = u64::MAX >> (BLOCK - block.len);
    let mut picked = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let valid = (valid >> (16 * i)) as u16;
        let columns = _mm512_min_epu32(columns[i], largest);
        // SAFETY: `x` has elements, by the assertion above, and each column is at most the last of them.
        picked[i] = unsafe {
            let (none, x) = (_mm512_setzero_ps(), x.as_ptr().cast());
            _mm512_mask_i32gather_ps::<4>(none, valid, columns, x)
        };
    }
    (picked, last)
}

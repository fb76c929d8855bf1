//! Rows of `mdcsr`.
//!
//! An entry takes 4 bytes to read (3 in rows without gaps), and a weight 2 or 4 to write. Primes
//! are gathered from their table of 40 kB. A table of 20 kB with the difference from ten times the
//! index was no faster (0.20 instead of 0.19 ns per weight from L2). 64 look-ups that are stored
//! and loaded again were slightly slower (0.24).

use super::decode::Sixteens;
use super::{Avx512, load_f32, load_half};
use crate::kernels::decode::Element;
use crate::kernels::sparse::{BLOCK, Block, Blocks, Place, put_apart};
use crate::kernels::views::Entries;
use crate::prime_lut::PRIME_COUNT;
use crate::prime_lut::PRIME_LUT;
use std::arch::asm;
use std::arch::x86_64::*;

/// Runs [`crate::kernels::sparse::decode`].
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

/// Computes the product with `x [cols]` in f32.
///
/// There are 64 partial sums; each adds every 64th entry in order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn dot(entries: Entries<'_>, x: &[f32]) -> f32 {
    assert!(
        i32::try_from(x.len()).is_ok(),
        "columns are gathered by i32"
    );
    let mut blocks = Blocks::new(entries, x.len());
    let scale = _mm512_set1_ps(entries.scale);
    let (mut sums, mut column) = ([_mm512_setzero_ps(); 4], 0);
    loop {
        let before = column;
        let Some(block) = blocks.next(&mut column) else {
            break;
        };
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

/// Computes the weights of a block.
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
        // Exact: the only rounding is that of the scale.
        let product = _mm512_mul_ps(_mm512_cvtepi32_ps(primes), values);
        weights[i] = _mm512_mul_ps(scale, product);
    }
    weights
}

/// Returns the elements of `x` in the columns of a block, then zeros,
/// and the last of these columns.
///
/// `before` is the column of the entry before the block. Panics if it or the last column is past
/// the end of `x`.
///
/// Another process may change the deltas of a mapped file between two reads. So they are read once,
/// into registers, and the columns that are checked are the columns that are gathered.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn pick(block: &Block<'_>, before: usize, x: &[f32]) -> ([__m512; 4], usize) {
    let zero = _mm512_setzero_si512();
    assert!(before < x.len(), "column {before} of {}", x.len());
    let mut before = _mm512_set1_epi32(before as i32);
    let mut columns = [before; 4];
    for (columns, deltas) in columns.iter_mut().zip(block.deltas.as_chunks::<16>().0) {
        let mut sums = widened_once(deltas);
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
    let valid = u64::MAX >> (BLOCK - block.len);
    let mut picked = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let valid = (valid >> (16 * i)) as u16;
        // SAFETY: only lanes of entries are gathered. Their columns ascend, in these registers,
        // from `before` to `last`, and both are columns of `x`. They do not wrap: `before` is below
        // 2^31, and 64 deltas add up to less than 2^14.
        picked[i] = unsafe {
            let (none, x) = (_mm512_setzero_ps(), x.as_ptr().cast());
            _mm512_mask_i32gather_ps::<4>(none, valid, columns[i], x)
        };
    }
    (picked, last)
}

/// Widens 16 bytes to 32-bit integers. Reads them exactly once, which no intrinsic promises.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn widened_once(bytes: &[u8; 16]) -> __m512i {
    let widened;
    // SAFETY: the reference is to 16 readable bytes, and the instruction needs no alignment.
    // Without `pure` the compiler keeps every execution that is written.
    unsafe {
        asm!(
            "vpmovzxbd {widened}, xmmword ptr [{bytes}]",
            bytes = in(reg) bytes.as_ptr(),
            widened = lateout(zmm_reg) widened,
            options(readonly, nostack, preserves_flags),
        );
    }
    widened
}

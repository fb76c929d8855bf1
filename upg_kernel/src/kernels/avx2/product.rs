//! A strip times a vector.

use super::levels::{Bytes, Kept, Levels, Nibbles};
use super::trellis::{self, Trellis};
use super::*;
use crate::kernels::views::PAIRS;

#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn multiply(strip: Strip<'_>, x: &Activations, out: &mut [f32]) {
    let sums = match strip.codes {
        Codes::Bytes(codes) => sums(Bytes::new(codes), &strip, x),
        Codes::Nibbles(codes, codebook) => sums(Nibbles::new(codes, codebook), &strip, x),
        Codes::Kept {
            bitmap,
            codes,
            codebook: None,
        } => sums(Kept::<false>::new(bitmap, codes, &[0; 16]), &strip, x),
        Codes::Kept {
            bitmap,
            codes,
            codebook: Some(codebook),
        } => sums(Kept::<true>::new(bitmap, codes, codebook), &strip, x),
        Codes::Trellis {
            k,
            stream,
            shift_table,
            level_table,
        } => {
            let trellis = Trellis {
                k,
                stream,
                shift_table,
                level_table,
            };
            trellis::multiply(trellis, strip.cols, x)
        }
    };
    strip.put_rows(bytemuck::cast_ref(&sums), out);
}

/// The rows times `x`, without what all of a row is multiplied with.
#[target_feature(enable = "avx2,fma,popcnt")]
fn sums<L: Levels>(mut levels: L, strip: &Strip<'_>, x: &Activations) -> [[f32; 8]; 8] {
    let mut sums = [[0.0; 8]; 8];
    for group in strip.groups(x) {
        let products = products(&mut levels, group.block, group.pairs, group.offset);
        add(products, group.primes, group.scale, &mut sums);
    }
    sums
}

/// The sums of the products of some pairs of tiles with their columns of a block. Exact.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn products<L: Levels>(
    levels: &mut L,
    block: &Block,
    pairs: Range<usize>,
    offset: i32,
) -> [__m256i; 8] {
    let high: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.high);
    let low: &[[i32; 2]; PAIRS] = bytemuck::cast_ref(&block.low);
    let mut sums = [_mm256_set1_epi32(offset); 8];
    for (high, low) in high[pairs.clone()].iter().zip(&low[pairs]) {
        levels.next();
        for tile in 0..2 {
            let (high, low) = (_mm256_set1_epi32(high[tile]), _mm256_set1_epi32(low[tile]));
            for (eight, sum) in sums.iter_mut().enumerate() {
                let products = dot(levels.eight_rows(tile, eight), high, low);
                *sum = _mm256_add_epi32(*sum, products);
            }
        }
    }
    sums
}

/// Adds the products of a group, times its primes and the scale of its activations.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add(products: [__m256i; 8], indices: Option<&[u8; 64]>, scale: f32, sums: &mut [[f32; 8]; 8]) {
    for (i, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
        let mut factor = _mm256_set1_ps(scale);
        if let Some(indices) = indices {
            factor = _mm256_mul_ps(factor, primes(&indices.as_chunks().0[i]));
        }
        // SAFETY: the reference is to 8 floats; neither load nor store needs an alignment.
        unsafe {
            let before = _mm256_loadu_ps(sum.as_ptr());
            let after = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, before);
            _mm256_storeu_ps(sum.as_mut_ptr(), after);
        }
    }
}

/// The primes of some indices.
#[inline]
#[target_feature(enable = "avx2")]
fn primes(indices: &[u8; 8]) -> __m256 {
    let indices = _mm_cvtsi64_si128(i64::from_le_bytes(*indices));
    // SAFETY: a byte is the index of one of the 256 entries, which are 4 bytes apart.
    unsafe { _mm256_i32gather_ps::<4>(PRIMES.as_ptr(), _mm256_cvtepu8_epi32(indices)) }
}

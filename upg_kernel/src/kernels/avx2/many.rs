//! Products of a strip with many vectors.
//!
//! Levels and activations are multiplied as 16-bit numbers: `vpmaddwd` adds two products in int32,
//! which takes half the work of two planes of bytes. Of the four columns of a tile it adds the
//! first and third, and the second and fourth, because separating these takes only shifts.

use super::levels::{self, Levels};
use super::{biased, load, load_f32, primes, store, store_f32};
use crate::kernels::activations::{Activations, Block};
use crate::kernels::many::{self, Decoded, Many, Panel, Rows, TILES};
use crate::kernels::views::{Strip, with_levels};
use std::arch::x86_64::*;

/// Multiplies every row by every vector.
#[target_feature(enable = "avx2,fma,popcnt,bmi2")]
pub(super) fn multiply<'a>(
    strip: Strip<'_>,
    vectors: &[Activations],
    panel: &'a mut Panel,
) -> &'a [Rows] {
    with_levels!(strip, levels => many::multiply(Multiplier(levels), &strip, vectors, panel))
}

/// Kernels for one kind of levels, which exist only where the processor has the features.
struct Multiplier<L>(L);

/// Levels of a tile.
///
/// Dimensions: sixteen rows per part; odd and even columns; two registers of eight rows.
type Tile = [[[[u8; 32]; 2]; 2]; 4];

impl<L: Levels> Many for Multiplier<L> {
    const TILE: usize = size_of::<Tile>();
    /// Blocks of decoded levels, 128 KiB.
    const BLOCKS: usize = 16;

    fn decode(&mut self, tiles: usize, levels: &mut [u8]) {
        // SAFETY: `self` proves that the processor has the features, also below.
        unsafe { decode(&mut self.0, tiles, bytemuck::cast_slice_mut(levels)) }
    }

    fn primes(&self, indices: &[u8; 64]) -> Rows {
        let mut rows = [[0.0; 8]; 8];
        for (rows, indices) in rows.iter_mut().zip(indices.as_chunks().0) {
            // SAFETY: as above.
            unsafe { store_f32(primes(indices), rows) };
        }
        bytemuck::cast(rows)
    }

    fn add<const T: usize>(
        &self,
        decoded: Decoded<'_>,
        vectors: &[Activations; T],
        sums: &mut [Rows; T],
    ) {
        // SAFETY: as above.
        unsafe { add(decoded, vectors, sums) }
    }
}

#[target_feature(enable = "avx2,fma,popcnt,bmi2")]
fn decode<L: Levels>(levels: &mut L, tiles: usize, out: &mut [Tile]) {
    // Levels past the last pair are multiplied by zeros.
    for pair in &mut out.as_chunks_mut::<2>().0[..tiles.div_ceil(2)] {
        levels.next();
        for (tile, out) in pair.iter_mut().enumerate() {
            for (quarter, out) in out.iter_mut().enumerate() {
                let rows = levels.sixteen_rows(tile, quarter);
                for (i, rows) in rows.into_iter().enumerate() {
                    let [even, odd] = widen(biased(rows));
                    store(even, &mut out[0][i]);
                    store(odd, &mut out[1][i]);
                }
            }
        }
    }
}

/// Widens signed bytes to 16 bits: those at even places and those at odd ones.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(bytes: __m256i) -> [__m256i; 2] {
    [
        _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(bytes)),
        _mm256_srai_epi16::<8>(bytes),
    ]
}

/// Activations of a block, two per number: those of even columns, then those of odd columns.
type Pairs = [[i32; TILES]; 2];

#[inline]
#[target_feature(enable = "avx2")]
fn pairs(block: &Block) -> Pairs {
    let high: &[[u8; 32]; 2] = bytemuck::cast_ref(&block.high);
    let low: &[[u8; 32]; 2] = bytemuck::cast_ref(&block.low);
    let mut pairs = [[[0; 32]; 2]; 2];
    for half in 0..2 {
        let (high, low) = (widen(load(&high[half])), widen(load(&low[half])));
        for i in 0..2 {
            let values = _mm256_add_epi16(_mm256_slli_epi16::<7>(high[i]), low[i]);
            store(values, &mut pairs[i][half]);
        }
    }
    bytemuck::cast(pairs)
}

/// Implements [`Many::add`].
#[target_feature(enable = "avx2,fma")]
fn add<const T: usize>(decoded: Decoded<'_>, vectors: &[Activations; T], sums: &mut [Rows; T]) {
    let tiles: &[Tile] = bytemuck::cast_slice(decoded.levels);
    let blocks = tiles.as_chunks::<TILES>().0;
    let per_block = decoded.factors.len() / blocks.len();
    let factors = decoded.factors.chunks_exact(per_block);
    let mut x = [[[0; TILES]; 2]; T];
    let mut scales = [0.0; T];
    for (i, (tiles, factors)) in blocks.iter().zip(factors).enumerate() {
        for t in 0..T {
            x[t] = pairs(&vectors[t].blocks[decoded.first + i]);
            scales[t] = vectors[t].scales[decoded.first + i];
        }
        let width = TILES / per_block;
        for (group, (tiles, factors)) in tiles.chunks_exact(width).zip(factors).enumerate() {
            for quarter in 0..4 {
                let products = products(tiles, quarter, &x, group * width);
                let factors = &factors.as_chunks::<16>().0[quarter];
                for t in 0..T {
                    let sums = &mut sums[t].as_chunks_mut::<16>().0[quarter];
                    add_products(products[t], factors, scales[t], sums);
                }
            }
        }
    }
}

/// Sums the products of sixteen rows of some tiles with `T` blocks, from activation `first`
/// on. Exact.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn products<const T: usize>(
    tiles: &[Tile],
    quarter: usize,
    x: &[Pairs; T],
    first: usize,
) -> [[__m256i; 2]; T] {
    let mut sums = [[_mm256_setzero_si256(); 2]; T];
    for (i, tile) in tiles.iter().enumerate() {
        for odd in 0..2 {
            let [a, b] = &tile[quarter][odd];
            let (a, b) = (load(a), load(b));
            for t in 0..T {
                let x = _mm256_set1_epi32(x[t][odd][(first + i) % TILES]);
                sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(a, x));
                sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(b, x));
            }
        }
    }
    // Registers instead of the sums themselves, which would be stored each time.
    let mut products = [[_mm256_setzero_si256(); 2]; T];
    for (products, sums) in products.iter_mut().zip(sums) {
        *products = sums;
    }
    products
}

/// Adds products, times the factors of their rows and the scale of their activations.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add_products(products: [__m256i; 2], factors: &[f32; 16], scale: f32, sums: &mut [f32; 16]) {
    let factors: &[[f32; 8]; 2] = bytemuck::cast_ref(factors);
    let sums: &mut [[f32; 8]; 2] = bytemuck::cast_mut(sums);
    let scale = _mm256_set1_ps(scale);
    for i in 0..2 {
        let factor = _mm256_mul_ps(load_f32(&factors[i]), scale);
        let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[i]), factor, load_f32(&sums[i]));
        store_f32(sum, &mut sums[i]);
    }
}

//! Products of packed weights with many vectors.

use super::levels::{self, Levels};
use super::{load, load_f32, primes_of, store, to_array};
use crate::kernels::activations::{Activations, Block};
use crate::kernels::many::{self, Decoded, Many, Panel, Rows, TILES};
use crate::kernels::views::{Strip, with_levels};
use std::arch::x86_64::*;

/// Registers per tile.
const QUARTERS: usize = 4;

/// Four columns of 64 rows, as `level + 128`.
type Quad = [[u8; 64]; QUARTERS];

/// Multiplies every row by every vector.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn multiply<'a>(
    strip: Strip<'_>,
    vectors: &[Activations],
    panel: &'a mut Panel,
) -> &'a [Rows] {
    with_levels!(strip, levels => many::multiply(Multiplier(levels), &strip, vectors, panel))
}

/// Kernels for one kind of levels, which exist only where the processor has the features.
struct Multiplier<L>(L);

impl<L: Levels> Many for Multiplier<L> {
    const TILE: usize = size_of::<Quad>();
    /// Blocks of decoded levels, 128 KiB.
    const BLOCKS: usize = 32;

    fn decode(&mut self, tiles: usize, levels: &mut [u8]) {
        // SAFETY: `self` proves that the processor has the features, also below.
        unsafe { decode(&mut self.0, tiles, bytemuck::cast_slice_mut(levels)) }
    }

    fn primes(&self, indices: &[u8; 64]) -> Rows {
        // SAFETY: as above.
        unsafe { primes(indices) }
    }

    fn in_order(&self, sums: &Rows) -> Rows {
        // SAFETY: as above.
        unsafe { in_order::<L>(sums) }
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn decode<L: Levels>(levels: &mut L, tiles: usize, quads: &mut [Quad]) {
    let (pairs, _) = quads.as_chunks_mut::<2>();
    // Levels past the last pair are multiplied by zeros.
    for pair in &mut pairs[..tiles.div_ceil(2)] {
        for (quad, tile) in pair.iter_mut().zip(levels.next()) {
            for (quarter, levels) in quad.iter_mut().zip(tile) {
                store(quarter, levels);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn primes(indices: &[u8; 64]) -> Rows {
    let mut primes = [[0.0; 16]; QUARTERS];
    for (primes, register) in primes.iter_mut().zip(primes_of(indices)) {
        *primes = to_array(register);
    }
    bytemuck::cast(primes)
}

#[target_feature(enable = "avx512f")]
fn in_order<L: Levels>(sums: &Rows) -> Rows {
    let sums: &[[f32; 16]; QUARTERS] = bytemuck::cast_ref(sums);
    let mut registers = [_mm512_setzero_ps(); QUARTERS];
    for (register, sums) in registers.iter_mut().zip(sums) {
        *register = load_f32(sums);
    }
    levels::in_order_of_rows::<L>(registers)
}

/// Implements [`Many::add`]. 24 registers hold the sums of six vectors.
#[target_feature(enable = "avx512f,avx512vnni")]
fn add<const T: usize>(decoded: Decoded<'_>, vectors: &[Activations; T], sums: &mut [Rows; T]) {
    let quads: &[Quad] = bytemuck::cast_slice(decoded.levels);
    let per_group = quads.len() / decoded.factors.len();
    let groups = quads.chunks_exact(per_group).zip(decoded.factors);
    for (group, (quads, factors)) in groups.enumerate() {
        let factors: &[[f32; 16]; QUARTERS] = bytemuck::cast_ref(factors);
        let at = group * per_group;
        let block = decoded.first + at / TILES;
        let x: [&Block; T] = std::array::from_fn(|t| &vectors[t].blocks[block]);
        // The quads of a group of 32 are one half of a block.
        let half = at % TILES;
        let mut products = [[_mm512_setzero_si512(); QUARTERS]; T];
        let planes: [&[i32; TILES]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].high));
        add_quads(quads, planes, half, &mut products);
        for t in 0..T {
            let offsets = &vectors[t].offsets[block];
            let offset = match per_group {
                TILES => offsets[0] + offsets[1],
                _ => offsets[half / (TILES / 2)],
            };
            let offset = _mm512_set1_epi32(offset);
            for product in &mut products[t] {
                *product = _mm512_add_epi32(_mm512_slli_epi32::<7>(*product), offset);
            }
        }
        let planes: [&[i32; TILES]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].low));
        add_quads(quads, planes, half, &mut products);
        for t in 0..T {
            let scale = _mm512_set1_ps(vectors[t].scales[block]);
            let sums: &mut [[f32; 16]; QUARTERS] = bytemuck::cast_mut(&mut sums[t]);
            for quarter in 0..QUARTERS {
                let factor = _mm512_mul_ps(load_f32(&factors[quarter]), scale);
                let product = _mm512_cvtepi32_ps(products[t][quarter]);
                let sum = _mm512_fmadd_ps(product, factor, load_f32(&sums[quarter]));
                sums[quarter] = to_array(sum);
            }
        }
    }
}

/// Adds the products of quads with one plane of `T` blocks, from element `half` on.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_quads<const T: usize>(
    quads: &[Quad],
    planes: [&[i32; TILES]; T],
    half: usize,
    products: &mut [[__m512i; QUARTERS]; T],
) {
    let mut sums = *products;
    for (i, quad) in quads.iter().enumerate() {
        let levels = [
            load(&quad[0]),
            load(&quad[1]),
            load(&quad[2]),
            load(&quad[3]),
        ];
        for t in 0..T {
            let x = _mm512_set1_epi32(planes[t][(half + i) % TILES]);
            for quarter in 0..QUARTERS {
                sums[t][quarter] = _mm512_dpbusd_epi32(sums[t][quarter], levels[quarter], x);
            }
        }
    }
    *products = sums;
}

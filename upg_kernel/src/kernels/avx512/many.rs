//! Packed weights times many vectors.
//!
//! A panel has the tiles of a strip, decoded once for all vectors.

use super::levels::{self, Levels, with_levels};
use super::*;

/// Columns of a tile.
const TILE: usize = 4;

/// Registers of a tile.
const QUARTERS: usize = 4;

/// Blocks of columns that are decoded at once: a panel of 128 KiB, and what it is multiplied with, stay in the
/// L2 cache.
const BLOCKS: usize = 32;

/// Vectors that are multiplied together: 24 registers hold their sums.
const TOGETHER: usize = 6;

/// Four columns of 64 rows, as `level + 128`.
type Quad = [[u8; 64]; QUARTERS];

/// The quads of a block.
const QUADS: usize = GROUP / TILE;

/// Memory for a panel.
#[derive(Debug, Default)]
pub(crate) struct Panel {
    quads: Vec<Quad>,
    /// The primes of a group: `[groups, 64]`.
    factors: Vec<[[f32; 16]; QUARTERS]>,
    /// Of each vector: `[n, 64]`.
    sums: Vec<[[f32; 16]; QUARTERS]>,
}

/// `out [n, rows]`: every row times every vector.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn multiply(
    strip: Strip<'_>,
    vectors: &[Activations],
    panel: &mut Panel,
    out: &mut [f32],
) {
    with_levels!(strip, levels => multiply_levels(levels, &strip, vectors, panel, out));
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
fn multiply_levels<L: Levels>(
    mut levels: L,
    strip: &Strip<'_>,
    vectors: &[Activations],
    panel: &mut Panel,
    out: &mut [f32],
) {
    let rows = strip.scales.len();
    assert_eq!(vectors.len() * rows, out.len());
    let Panel {
        quads,
        factors,
        sums,
    } = panel;
    sums.clear();
    sums.resize(vectors.len(), [[0.0; 16]; QUARTERS]);
    let all = strip.cols.div_ceil(TILE);
    let (indices, group) = match strip.primes {
        Primes::Groups { indices, cols } => (indices, cols),
        Primes::Rows(_) => (&[][..], GROUP),
    };
    for first in (0..all).step_by(BLOCKS * QUADS) {
        let tiles = first..all.min(first + BLOCKS * QUADS);
        decode(&mut levels, tiles.len(), quads);
        factors.clear();
        let groups = indices.iter().skip(first * TILE / group);
        let groups_of_panel = quads.len() * TILE / group;
        factors.extend(groups.take(groups_of_panel).map(|indices| primes(indices)));
        // Those of rows come later; past the last group all sums are 0.
        factors.resize(groups_of_panel, [[1.0; 16]; QUARTERS]);
        let block = first / QUADS;
        let together = vectors.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER));
        for (vectors, sums) in together {
            let of_panel = (&quads[..], &factors[..]);
            match vectors.len() {
                1 => multiply_panel::<1>(of_panel, vectors, block, sums),
                2 => multiply_panel::<2>(of_panel, vectors, block, sums),
                3 => multiply_panel::<3>(of_panel, vectors, block, sums),
                4 => multiply_panel::<4>(of_panel, vectors, block, sums),
                5 => multiply_panel::<5>(of_panel, vectors, block, sums),
                _ => multiply_panel::<TOGETHER>(of_panel, vectors, block, sums),
            }
        }
    }
    for (sums, out) in sums.iter().zip(out.chunks_exact_mut(rows.max(1))) {
        let mut registers = [_mm512_setzero_ps(); QUARTERS];
        for (register, sums) in registers.iter_mut().zip(sums) {
            *register = load_f32(sums);
        }
        let rows = levels::in_order_of_rows::<L>(registers);
        strip.put_rows(bytemuck::cast_ref(&rows), out);
    }
}

/// The next so many tiles, and some to fill up the last block of columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn decode<L: Levels>(levels: &mut L, tiles: usize, quads: &mut Vec<Quad>) {
    quads.resize(tiles.next_multiple_of(QUADS), [[0; 64]; QUARTERS]);
    let (pairs, _) = quads.as_chunks_mut::<2>();
    // What is past the last pair is multiplied with zeros.
    for pair in &mut pairs[..tiles.div_ceil(2)] {
        for (quad, tile) in pair.iter_mut().zip(levels.next()) {
            for (quarter, levels) in quad.iter_mut().zip(tile) {
                store(quarter, levels);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn primes(indices: &[u8; 64]) -> [[f32; 16]; QUARTERS] {
    let mut primes = [[0.0; 16]; QUARTERS];
    for (primes, register) in primes.iter_mut().zip(primes_of(indices)) {
        *primes = to_array(register);
    }
    primes
}

/// Adds the products of a panel, whose first block is `first`, with `T` vectors to their sums.
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_panel<const T: usize>(
    (quads, factors): (&[Quad], &[[[f32; 16]; QUARTERS]]),
    vectors: &[Activations],
    first: usize,
    sums: &mut [[[f32; 16]; QUARTERS]],
) {
    let vectors: &[Activations; T] = vectors.first_chunk().expect("as many vectors as asked for");
    let sums: &mut [[[f32; 16]; QUARTERS]; T] =
        sums.first_chunk_mut().expect("sums of every vector");
    let per_group = quads.len() / factors.len();
    for (group, (quads, factors)) in quads.chunks_exact(per_group).zip(factors).enumerate() {
        let at = group * per_group;
        let block = first + at / QUADS;
        let x: [&Block; T] = std::array::from_fn(|t| &vectors[t].blocks[block]);
        // The quads of a group of 32 are one half of a block.
        let half = at % QUADS;
        let mut products = [[_mm512_setzero_si512(); QUARTERS]; T];
        let planes: [&[i32; QUADS]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].high));
        add_quads(quads, planes, half, &mut products);
        for t in 0..T {
            let offsets = &vectors[t].offsets[block];
            let offset = match per_group {
                QUADS => offsets[0] + offsets[1],
                _ => offsets[half / (QUADS / 2)],
            };
            let offset = _mm512_set1_epi32(offset);
            for product in &mut products[t] {
                *product = _mm512_add_epi32(_mm512_slli_epi32::<7>(*product), offset);
            }
        }
        let planes: [&[i32; QUADS]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].low));
        add_quads(quads, planes, half, &mut products);
        for t in 0..T {
            let scale = _mm512_set1_ps(vectors[t].scales[block]);
            let sums = &mut sums[t];
            for quarter in 0..QUARTERS {
                let factor = _mm512_mul_ps(load_f32(&factors[quarter]), scale);
                let product = _mm512_cvtepi32_ps(products[t][quarter]);
                let sum = _mm512_fmadd_ps(product, factor, load_f32(&sums[quarter]));
                sums[quarter] = to_array(sum);
            }
        }
    }
}

/// Adds the products of quads with one plane of `T` blocks, of which they start at element `half`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_quads<const T: usize>(
    quads: &[Quad],
    planes: [&[i32; QUADS]; T],
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
            let x = _mm512_set1_epi32(planes[t][(half + i) % QUADS]);
            for quarter in 0..QUARTERS {
                sums[t][quarter] = _mm512_dpbusd_epi32(sums[t][quarter], levels[quarter], x);
            }
        }
    }
    *products = sums;
}

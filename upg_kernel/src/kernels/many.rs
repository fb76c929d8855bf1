//! Products of packed weights with many vectors,
//! written once for the instruction sets of x86-64.
//!
//! A panel has the tiles of a strip, decoded once for all vectors.
#![forbid(unsafe_code)]

use super::activations::{Activations, GROUP};
use super::views::{Primes, Strip};

/// Columns of a tile.
const TILE: usize = 4;

/// Tiles of a block of columns.
pub(super) const TILES: usize = GROUP / TILE;

/// Maximum vectors that are multiplied together.
const TOGETHER: usize = 6;

/// Bytes of a cache line.
const LINE: usize = 64;

/// One number per row of a strip.
pub(crate) type Rows = [f32; 64];

/// Memory for a panel.
#[derive(Debug, Default)]
pub(crate) struct Panel {
    /// Levels, from the first cache line on: no register of levels spans two lines.
    levels: Vec<u8>,
    /// Primes of a group of columns.
    factors: Vec<Rows>,
    /// Sums of each vector, at the end its products.
    sums: Vec<Rows>,
}

/// Whole blocks of columns, decoded.
#[derive(Clone, Copy)]
pub(super) struct Decoded<'a> {
    /// Levels, `TILES *` [`Many::TILE`] bytes per block.
    pub levels: &'a [u8],
    /// Factors of each group of columns: one or two groups per block.
    pub factors: &'a [Rows],
    /// Index of the first block.
    pub first: usize,
}

/// Kernels of an instruction set for the levels of one strip.
pub(super) trait Many {
    /// Bytes of the levels of a tile.
    const TILE: usize;
    /// Blocks of columns that are decoded at once. With their factors they stay in the L2 cache.
    const BLOCKS: usize;

    /// Decodes the next `tiles` tiles; those that pad the last block have arbitrary levels.
    fn decode(&mut self, tiles: usize, levels: &mut [u8]);

    /// Returns the primes of a group.
    fn primes(&self, indices: &[u8; 64]) -> Rows;

    /// Returns the sums of a vector in row order, if the levels of a tile have another order.
    fn in_order(&self, sums: &Rows) -> Rows {
        *sums
    }

    /// Adds the products with `T` vectors to their sums.
    fn add<const T: usize>(
        &self,
        decoded: Decoded<'_>,
        vectors: &[Activations; T],
        sums: &mut [Rows; T],
    );
}

/// Multiplies every row of a strip by every vector.
pub(super) fn multiply<'a>(
    mut many: impl Many,
    strip: &Strip<'_>,
    vectors: &[Activations],
    panel: &'a mut Panel,
) -> &'a [Rows] {
    panel.sums.clear();
    panel.sums.resize(vectors.len(), [0.0; 64]);
    add_panels(&mut many, strip, vectors, panel);
    let factors = strip.row_factors();
    for sums in &mut panel.sums {
        *sums = many.in_order(sums);
        factors.apply(sums);
    }
    &panel.sums
}

/// Adds up the sums of every vector.
fn add_panels<M: Many>(
    many: &mut M,
    strip: &Strip<'_>,
    vectors: &[Activations],
    panel: &mut Panel,
) {
    let Panel {
        levels,
        factors,
        sums,
    } = panel;
    let all = strip.cols.div_ceil(TILE);
    let (indices, per_block) = match strip.primes {
        Primes::Groups { indices, cols } => (indices, GROUP / cols),
        Primes::Rows(_) => (&[][..], 1),
    };
    for first in (0..all).step_by(M::BLOCKS * TILES) {
        let tiles = (all - first).min(M::BLOCKS * TILES);
        let blocks = tiles.div_ceil(TILES);
        let bytes = blocks * TILES * M::TILE;
        levels.resize(bytes + LINE, 0);
        let line = levels.as_ptr().align_offset(LINE).min(LINE);
        let levels = &mut levels[line..line + bytes];
        many.decode(tiles, levels);
        let first = first / TILES;
        let groups = indices.iter().skip(first * per_block);
        factors.clear();
        factors.extend(groups.take(blocks * per_block).map(|i| many.primes(i)));
        // Factors of rows are applied later; past the last group all sums are 0.
        factors.resize(blocks * per_block, [1.0; 64]);
        let decoded = Decoded {
            levels,
            factors,
            first,
        };
        let together = vectors.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER));
        for (vectors, sums) in together {
            match vectors.len() {
                1 => add::<M, 1>(many, decoded, vectors, sums),
                2 => add::<M, 2>(many, decoded, vectors, sums),
                3 => add::<M, 3>(many, decoded, vectors, sums),
                4 => add::<M, 4>(many, decoded, vectors, sums),
                5 => add::<M, 5>(many, decoded, vectors, sums),
                _ => add::<M, TOGETHER>(many, decoded, vectors, sums),
            }
        }
    }
}

fn add<M: Many, const T: usize>(
    many: &M,
    decoded: Decoded<'_>,
    vectors: &[Activations],
    sums: &mut [Rows],
) {
    let vectors = vectors.first_chunk::<T>();
    let sums = sums.first_chunk_mut::<T>();
    let (Some(vectors), Some(sums)) = (vectors, sums) else {
        unreachable!("as many vectors and sums as asked for");
    };
    many.add(decoded, vectors, sums);
}

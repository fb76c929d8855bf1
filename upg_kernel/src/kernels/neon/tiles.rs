//! Tiles of a strip in order.

use std::arch::aarch64::*;

/// Levels of a strip, one block of 64 columns at a time.
///
/// A value exists only where the processor has the features: every constructor requires them.
pub(super) trait Levels {
    /// Advances to the next block of columns.
    fn next(&mut self);

    /// Returns four rows of two tiles.
    ///
    /// `quad` is one of the 16 groups of four rows in a strip, `pair` one of the 8 pairs of tiles
    /// in a block. Levels are arbitrary where a tile starts past the last column. Panics if there
    /// is no group of columns.
    fn pair(&self, pair: usize, quad: usize) -> [int8x16_t; 2];

    /// Prefetches the data ahead of this and the next three quads.
    #[inline(always)]
    fn prefetch(&self, _pair: usize, _quad: usize) {}
}

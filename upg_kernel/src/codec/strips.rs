//! The layout of packed matrices: strips of 64 rows, cut into tiles of 4 columns.
//!
//! A kernel loads a tile into registers whose lanes are rows with four columns each. It broadcasts
//! four activations to all lanes and adds dot products of bytes; it never sums across lanes.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use std::ops::Range;

/// Rows of a strip; the last strip of a matrix is padded to as many.
pub const STRIP_ROWS: usize = 64;

/// Columns of a tile; the last tile of a strip is padded to as many.
pub const TILE_COLS: usize = 4;

/// Weights in a tile, padding included.
pub const TILE_WEIGHTS: usize = STRIP_ROWS * TILE_COLS;

/// Returns the number of weight `row`, `col` in its strip: tile by tile, row by row in a tile.
pub fn position(row: usize, col: usize) -> usize {
    col / TILE_COLS * TILE_WEIGHTS + row % STRIP_ROWS * TILE_COLS + col % TILE_COLS
}

/// Returns the byte of a strip with the 4-bit code of `row`, `col`, and the bits below the code.
///
/// Two tiles share their bytes: the first of them has the low halves.
pub fn nibble(row: usize, col: usize) -> (usize, u32) {
    let tile = col / TILE_COLS;
    let byte = tile / 2 * TILE_WEIGHTS + position(row, col % TILE_COLS);
    (byte, if tile.is_multiple_of(2) { 0 } else { 4 })
}

/// Returns the number of strips of a matrix with `rows` rows.
pub fn count(rows: usize) -> usize {
    rows.div_ceil(STRIP_ROWS)
}

/// Returns the rows of strip `index` in a matrix with `rows` rows.
pub(crate) fn rows(index: usize, rows: usize) -> Range<usize> {
    let first = index * STRIP_ROWS;
    first..rows.min(first + STRIP_ROWS)
}

/// Returns the weights in a strip of `cols` columns, padded to a multiple of `group`.
///
/// Errors (`TooLarge`): overflow.
pub(crate) fn padded_weights(cols: usize, group: usize) -> Result<usize> {
    let padded = cols.div_ceil(group).checked_mul(group * STRIP_ROWS);
    padded.ok_or_else(|| Error::new(ErrorKind::TooLarge, format!("a strip of {cols} columns")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_by_hand() {
        assert_eq!([position(0, 0), position(0, 3), position(1, 0)], [0, 3, 4]);
        assert_eq!(
            [position(63, 3), position(0, 4), position(64, 4)],
            [255, 256, 256]
        );
        assert_eq!(nibble(2, 1), (9, 0));
        assert_eq!(nibble(2, 5), (9, 4));
        assert_eq!(nibble(66, 8), (264, 0));
    }

    #[test]
    fn every_weight_of_a_strip_has_a_place_of_its_own() {
        let cols = 16;
        let (mut bytes, mut halves) = ([0; 1024], [0u8; 512]);
        for row in 0..STRIP_ROWS {
            for col in 0..cols {
                bytes[position(row, col)] += 1;
                let (byte, shift) = nibble(row, col);
                halves[byte] += 1 << shift;
            }
        }
        assert_eq!(bytes, [1; 1024]);
        assert_eq!(halves, [0x11; 512]);
    }
}

//! The rotation of the trellis encodings: random signs, then a block-diagonal Hadamard transform.
#![forbid(unsafe_code)]

use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};

/// `R = H D`: `D` flips signs, `H` is a Hadamard transform of each block, scaled to be orthogonal.
///
/// A matrix in the rotated basis holds `W R^T`, so `W x = (W R^T)(R x)`. Source: QuaRot
/// (arXiv 2404.00456), QuIP# (arXiv 2402.04396).
#[derive(Debug, Clone)]
pub struct Rotation {
    cols: usize,
    block: usize,
    /// One bit a column, least significant first; 1 flips the sign.
    signs: Array<u8>,
}

impl Rotation {
    /// Errors (`Invalid`): `block` is not a power of two that divides `cols`; (`Shape`): `signs` is
    /// not `ceil(cols / 8)` bytes.
    pub fn new(cols: usize, block: usize, signs: Array<u8>) -> Result<Self> {
        if !block.is_power_of_two() || !cols.is_multiple_of(block) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("Hadamard block of {block} for {cols} columns"),
            ));
        }
        if signs.len() != cols.div_ceil(8) {
            return Err(Error::new(
                ErrorKind::Shape,
                format!("{} bytes of signs for {cols} columns", signs.len()),
            ));
        }
        Ok(Self { cols, block, signs })
    }

    /// The columns it is made for.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The Hadamard block: a power of two that divides the columns.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The sign bits, `ceil(cols / 8)` bytes, least significant first.
    pub fn signs(&self) -> &[u8] {
        &self.signs
    }

    /// `x <- R x`; `x` has `cols` values.
    pub fn apply(&self, x: &mut [f32]) {
        self.flip(x);
        self.transform(x);
    }

    /// `x <- R^T x`, the inverse of [`Rotation::apply`] up to rounding.
    pub fn invert(&self, x: &mut [f32]) {
        self.transform(x);
        self.flip(x);
    }

    fn flip(&self, x: &mut [f32]) {
        debug_assert_eq!(x.len(), self.cols);
        for (c, x) in x.iter_mut().enumerate() {
            if self.signs[c / 8] >> (c % 8) & 1 == 1 {
                *x = -*x;
            }
        }
    }

    fn transform(&self, x: &mut [f32]) {
        let norm = (1.0 / (self.block as f64).sqrt()) as f32;
        for block in x.chunks_exact_mut(self.block) {
            hadamard(block);
            block.iter_mut().for_each(|x| *x *= norm);
        }
    }
}

/// The unscaled Walsh-Hadamard transform in natural order; `x.len()` is a power of two.
///
/// The order of the additions is part of the format: spans 1, 2, 4, ... and `(a + b, a - b)`.
fn hadamard(x: &mut [f32]) {
    let mut span = 1;
    while span < x.len() {
        for pair in x.chunks_exact_mut(2 * span) {
            let (low, high) = pair.split_at_mut(span);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        span *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotation(cols: usize, block: usize) -> Rotation {
        let signs: Vec<u8> = (0..cols.div_ceil(8)).map(|i| (i * 37 + 11) as u8).collect();
        Rotation::new(cols, block, signs.into()).unwrap()
    }

    #[test]
    fn a_block_of_four_by_hand() {
        let r = Rotation::new(4, 4, vec![0b0010].into()).unwrap();
        let mut x = [1.0, 2.0, 3.0, 4.0];
        r.apply(&mut x);
        // signs: [1, -2, 3, 4]; rows of H4 / 2: ++++, +-+-, ++--, +--+
        assert_eq!(x, [3.0, 1.0, -4.0, 2.0]);
    }

    #[test]
    fn orthogonal_and_invertible() {
        for (cols, block) in [(1, 1), (24, 8), (576, 64), (1024, 1024)] {
            let r = rotation(cols, block);
            let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut y = x.clone();
            r.apply(&mut y);
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>();
            assert!((norm(&x) - norm(&y)).abs() <= 1e-4 * norm(&x));
            r.invert(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    #[test]
    fn a_block_that_does_not_divide_is_refused() {
        for (cols, block) in [(24, 16), (24, 3), (24, 0)] {
            assert!(Rotation::new(cols, block, vec![0; 3].into()).is_err());
        }
        assert!(Rotation::new(24, 8, vec![0; 2].into()).is_err());
    }
}

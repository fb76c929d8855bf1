//! Rotation of the trellis encodings: random signs, then Hadamard transforms.
#![forbid(unsafe_code)]

use crate::array::Array;
use crate::error::Result;
use crate::format::rules;
use crate::kernels::scalar::{self, Signs};

/// Rotation of vectors in one or two passes.
///
/// The first pass covers columns 0 to `size - 1`. If there are more columns, a second pass covers
/// the last `size` of them. A pass flips the sign of its column `i` if bit `i` is 1, then
/// multiplies by an orthogonal Hadamard matrix.
///
/// If `size` is the largest power of two up to the number of columns, every column is mixed with
/// nearly all others. Both passes need signs: a transform turns a single column into a row of its
/// matrix, and the columns of another transform at a distance would largely undo that. A matrix in
/// the rotated basis holds `W R^T`, so `W x = (W R^T)(R x)`. Source: QuaRot (arXiv 2404.00456),
/// QuIP# (arXiv 2402.04396).
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    cols: usize,
    size: usize,
    /// Sign bits of the columns of a pass, least significant first; 1 flips the sign.
    signs: Array<u8>,
}

impl Rotation {
    /// Creates a rotation.
    ///
    /// Errors (`Invalid`): `size` is neither 1 (sign flips only) nor a power of two from `cols / 2`
    /// to `cols`; (`Shape`): `signs` is not `ceil(size / 8)` bytes.
    pub fn new(cols: usize, size: usize, signs: Array<u8>) -> Result<Self> {
        rules::hadamard(cols, size)?;
        rules::length("signs", signs.len(), &[size.div_ceil(8)])?;
        Ok(Self { cols, size, signs })
    }

    /// Returns the number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the columns of each transform, a power of two.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the sign bits, `ceil(size / 8)` bytes, least significant first.
    pub fn signs(&self) -> &[u8] {
        &self.signs
    }

    /// Returns the sign bits with their storage.
    pub(crate) fn sign_array(&self) -> &Array<u8> {
        &self.signs
    }

    /// Computes `x <- R x`; `x` has `cols` values.
    pub fn apply(&self, x: &mut [f32]) {
        self.apply_by(scalar::transform, x);
    }

    /// Runs [`Rotation::apply`] with another [`scalar::transform`].
    pub(crate) fn apply_by(&self, transform: impl Fn(&mut [f32], f32, Signs<'_>), x: &mut [f32]) {
        let signs = Signs::FlippedBefore(&self.signs);
        transform(&mut x[..self.size], self.norm(), signs);
        if self.size < self.cols {
            transform(&mut x[self.cols - self.size..], self.norm(), signs);
        }
    }

    /// Computes `x <- R^T x`, the inverse of [`Rotation::apply`] up to rounding.
    pub fn invert(&self, x: &mut [f32]) {
        self.invert_by(scalar::transform, x);
    }

    /// Runs [`Rotation::invert`] with another [`scalar::transform`].
    pub(crate) fn invert_by(&self, transform: impl Fn(&mut [f32], f32, Signs<'_>), x: &mut [f32]) {
        let signs = Signs::FlippedAfter(&self.signs);
        if self.size < self.cols {
            transform(&mut x[self.cols - self.size..], self.norm(), signs);
        }
        transform(&mut x[..self.size], self.norm(), signs);
    }

    /// Returns the factor that makes a transform orthogonal.
    pub(crate) fn norm(&self) -> f32 {
        (1.0 / (self.size as f64).sqrt()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotation(cols: usize, size: usize) -> Rotation {
        let signs: Vec<u8> = (0..size.div_ceil(8)).map(|i| (i * 37 + 11) as u8).collect();
        Rotation::new(cols, size, signs.into()).unwrap()
    }

    #[test]
    fn four_columns_by_hand() {
        let r = Rotation::new(4, 4, vec![0b0010].into()).unwrap();
        let mut x = [1.0, 2.0, 3.0, 4.0];
        r.apply(&mut x);
        // signs: [1, -2, 3, 4]; rows of H4 / 2: ++++, +-+-, ++--, +--+
        assert_eq!(x, [3.0, 1.0, -4.0, 2.0]);
    }

    #[test]
    fn six_columns_by_hand() {
        let r = Rotation::new(6, 4, vec![0b0001].into()).unwrap();
        let mut x = [-2.0, 0.0, 0.0, 0.0, 4.0, 8.0];
        r.apply(&mut x);
        // Columns 0 to 3 (2, 0, 0, 0) become 1, 1, 1, 1;
        // then columns 2 to 5 (-1, 1, 4, 8) are transformed.
        assert_eq!(x, [1.0, 1.0, 6.0, -3.0, -6.0, 1.0]);
        r.invert(&mut x);
        assert_eq!(x, [-2.0, 0.0, 0.0, 0.0, 4.0, 8.0]);
    }

    #[test]
    fn orthogonal_and_invertible() {
        for (cols, size) in [(1, 1), (24, 16), (70, 64), (576, 512), (1024, 1024)] {
            let r = rotation(cols, size);
            let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let mut y = x.clone();
            r.apply(&mut y);
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>();
            assert!((norm(&x) - norm(&y)).abs() <= 1e-4 * norm(&x));
            r.invert(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }

    /// No column, and no sum of two, gives elements much larger than if it were spread evenly.
    #[test]
    fn single_columns_are_spread() {
        for (cols, size) in [(576, 512), (96, 64), (1536, 1024), (1024, 1024)] {
            let r = rotation(cols, size);
            for col in 0..cols {
                for other in [col, (col + 64) % cols] {
                    let mut x = vec![0.0f32; cols];
                    (x[col], x[other]) = (1.0, 1.0);
                    let norm = x.iter().map(|x| x * x).sum::<f32>().sqrt();
                    r.apply(&mut x);
                    let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                    let spread = norm / (cols as f32).sqrt();
                    assert!(largest < 6.0 * spread, "{cols}: {col} {other} {largest}");
                }
            }
        }
    }

    #[test]
    fn a_size_that_does_not_cover_the_columns_is_refused() {
        for (cols, size) in [(24, 8), (24, 32), (24, 24), (24, 0)] {
            let signs = vec![0; usize::div_ceil(size, 8)].into();
            assert!(Rotation::new(cols, size, signs).is_err());
        }
        assert!(Rotation::new(24, 16, vec![0; 3].into()).is_err());
    }
}

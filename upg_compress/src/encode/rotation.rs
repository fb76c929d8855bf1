//! The rotation of the t encodings: its size and its random signs.
#![forbid(unsafe_code)]

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use upg_kernel::Result;
use upg_kernel::rotation::Rotation;

/// Returns the rotation for matrices of `cols` columns.
///
/// It depends on `cols` and `seed` only, so that matrices with the same input can share the
/// rotated input. The Hadamard size is the largest power of two up to `cols`; the signs are the
/// first `ceil(size / 8)` bytes of ChaCha8 seeded with `ChaCha8Rng::seed_from_u64(seed)`, bits
/// from `size` on cleared. Errors (`Invalid`): no columns.
pub fn rotation(cols: usize, seed: u64) -> Result<Rotation> {
    let size = hadamard_size(cols).unwrap_or(0);
    let mut signs = vec![0; size.div_ceil(8)];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut signs);
    if let ([signs], 1..8) = (&mut signs[..], size) {
        *signs &= (1 << size) - 1;
    }
    Rotation::new(cols, size, signs.into())
}

/// Returns the columns of the Hadamard transform in the [`rotation`] for `cols` columns; `None`
/// for 0.
pub fn hadamard_size(cols: usize) -> Option<usize> {
    cols.checked_ilog2().map(|bits| 1 << bits)
}

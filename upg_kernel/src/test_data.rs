//! Bytes without a pattern, for tests.
#![forbid(unsafe_code)]

use crate::array::Array;

/// A plain sequence of pseudo-random bytes (a linear congruential generator).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (x >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// The same as levels.
pub(crate) fn signed(bytes: Vec<u8>) -> Array<i8> {
    bytes
        .into_iter()
        .map(|b| b as i8)
        .collect::<Vec<_>>()
        .into()
}

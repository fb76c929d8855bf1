//! Bytes without a pattern, and matrices made of them, for tests.
#![forbid(unsafe_code)]

use crate::array::Array;
use crate::matrix::{
    BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, TrellisMatrix, TrellisParts,
    strips::{self, STRIP_ROWS},
    trellis::strip_bytes,
};
use crate::rotation::Rotation;

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

/// Scales of any size; row 0 is all zeros.
pub(crate) fn scales(rows: usize) -> Array<f32> {
    let scale = |r: usize| {
        if r == 0 {
            0.0
        } else {
            let sign = if r % 3 == 1 { -1.0 } else { 1.0 };
            sign * 2f32.powi(r as i32 * 7 % 90 - 60)
        }
    };
    (0..rows).map(scale).collect::<Vec<_>>().into()
}

/// Random codes for all that is stored, padding included.
pub(crate) fn grouped(rows: usize, cols: usize, group: usize, nibbles: bool) -> GroupedMatrix {
    let groups = strips::count(rows) * cols.div_ceil(group);
    let weights = groups * group * STRIP_ROWS;
    let levels = match nibbles {
        false => Levels::Bytes(signed(noise(weights, 1))),
        true => Levels::Nibbles {
            codes: noise(weights / 2, 2).into(),
            codebook: signed(noise(16, 3)),
        },
    };
    let primes = noise(groups * STRIP_ROWS, 4).into();
    GroupedMatrix::new(rows, cols, group, levels, primes, scales(rows)).unwrap()
}

/// Words of every density: empty ones, full ones, and all between.
pub(crate) fn bitmap(rows: usize, cols: usize, nibbles: bool) -> BitmapMatrix {
    let groups = strips::count(rows) * cols.div_ceil(64);
    let (mut bits, mut pointers, mut stored) = (Vec::new(), vec![0u32], 0);
    let words = groups * 64;
    let random = noise(words * 16, 5);
    for (i, random) in random.as_chunks().0.iter().enumerate() {
        let random = u128::from_le_bytes(*random);
        let (a, b) = (random as u64, (random >> 64) as u64);
        // Each kind is met in every quarter of a tile.
        let dense = match (i + i / 4) % 4 {
            0 => u64::MAX,
            1 => 0,
            2 => a,
            _ => a & b,
        };
        let strip = i / (cols.div_ceil(64) * 64);
        let in_strip = i % (cols.div_ceil(64) * 64);
        let mut word = 0;
        for bit in 0..64 {
            let row = strip * STRIP_ROWS + in_strip % 4 * 16 + bit / 4;
            let col = in_strip / 4 * 4 + bit % 4;
            if row < rows && col < cols {
                word |= dense & 1 << bit;
            }
        }
        bits.extend(word.to_le_bytes());
        let n = word.count_ones() as usize;
        stored += if nibbles { n.div_ceil(2) } else { n };
        if (i + 1) % (cols.div_ceil(64) * 64) == 0 {
            pointers.push(stored as u32);
        }
    }
    let levels = match nibbles {
        false => Levels::Bytes(signed(noise(stored, 6))),
        true => Levels::Nibbles {
            codes: noise(stored, 7).into(),
            codebook: signed(noise(16, 8)),
        },
    };
    let arrays = BitmapArrays {
        bitmap: bits.into(),
        levels,
        strip_pointers: pointers.into(),
        prime_indices: noise(groups * STRIP_ROWS, 9).into(),
        scales: scales(rows),
    };
    BitmapMatrix::new(rows, cols, arrays).unwrap()
}

/// With an input that is rotated by passes over `hadamard` columns.
pub(crate) fn trellis(rows: usize, cols: usize, k: u8, hadamard: usize) -> TrellisMatrix {
    let signs = noise(hadamard.div_ceil(8), 16).into();
    let codes = rows.div_ceil(64) * strip_bytes(cols, k).unwrap();
    let parts = TrellisParts {
        codes: noise(codes, 10).into(),
        prime_indices: noise(rows, 13).into(),
        scales: scales(rows),
        rotation: Rotation::new(cols, hadamard, signs).unwrap(),
    };
    TrellisMatrix::new(rows, cols, k, parts).unwrap()
}

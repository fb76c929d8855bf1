//! Matrices of random codes in every packed encoding, for the benchmarks.
#![allow(dead_code, reason = "no benchmark needs all of it")]

use upg_kernel::matrix::strips::{self, STRIP_ROWS};
use upg_kernel::matrix::trellis::strip_bytes;
use upg_kernel::matrix::{
    BITMAP_GROUP, BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, TrellisMatrix, TrellisParts,
    WORD,
};
use upg_kernel::rotation::Rotation;
use upg_kernel::sparse::{MdCSRArrays, MdCSRMatrix};
use upg_kernel::{Array, Matrix};

/// Share of nonzero weights in `s8` and `s4`.
const KEPT_OF_64: u32 = 32;

/// Constructor of a matrix of `rows` and `cols`; also returns its bytes.
pub type Make = fn(usize, usize) -> (Matrix, usize);

/// Packed encodings by name.
pub const PACKED: [(&str, Make); 7] = [
    ("q8", |rows, cols| grouped(rows, cols, false)),
    ("q4", |rows, cols| grouped(rows, cols, true)),
    ("t2", |rows, cols| trellis(rows, cols, 2)),
    ("t3", |rows, cols| trellis(rows, cols, 3)),
    ("t4", |rows, cols| trellis(rows, cols, 4)),
    ("s8", |rows, cols| bitmap(rows, cols, false)),
    ("s4", |rows, cols| bitmap(rows, cols, true)),
];

/// Variants of `mdcsr` by the percentage of stored weights.
pub const SPARSE: [(&str, Make); 4] = [
    ("mdcsr-100", |rows, cols| sparse(rows, cols, 100)),
    ("mdcsr-50", |rows, cols| sparse(rows, cols, 50)),
    ("mdcsr-10", |rows, cols| sparse(rows, cols, 10)),
    ("mdcsr-2", |rows, cols| sparse(rows, cols, 2)),
];

/// Returns pseudo-random bytes (xorshift), eight at a time.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    let words = (0..len.div_ceil(8)).map(|_| next().to_le_bytes());
    let mut bytes: Vec<u8> = words.flatten().collect();
    bytes.truncate(len);
    bytes
}

fn signed(bytes: Vec<u8>) -> Array<i8> {
    bytes
        .into_iter()
        .map(|b| b as i8)
        .collect::<Vec<_>>()
        .into()
}

fn ones(rows: usize) -> Array<f32> {
    vec![1e-4; rows].into()
}

fn grouped(rows: usize, cols: usize, nibbles: bool) -> (Matrix, usize) {
    let group = if nibbles { 32 } else { 64 };
    let groups = strips::count(rows) * cols.div_ceil(group);
    let weights = groups * group * STRIP_ROWS;
    let codes = noise(if nibbles { weights / 2 } else { weights }, 1);
    let primes = noise(groups * STRIP_ROWS, 3);
    let bytes = codes.len() + primes.len() + 4 * rows;
    let levels = match nibbles {
        false => Levels::Bytes(signed(codes)),
        true => Levels::Nibbles {
            codes: codes.into(),
            codebook: signed(noise(16, 2)),
        },
    };
    let m = GroupedMatrix::new(rows, cols, group, levels, primes.into(), ones(rows));
    (Matrix::Grouped(m.expect("fitting parts")), bytes)
}

/// Creates whole strips and groups only: no bit may be set for a weight outside the matrix.
fn bitmap(rows: usize, cols: usize, nibbles: bool) -> (Matrix, usize) {
    assert!(rows.is_multiple_of(STRIP_ROWS) && cols.is_multiple_of(BITMAP_GROUP));
    let words = cols * STRIP_ROWS / WORD;
    let kept = |random: u64| {
        // Sets exactly this many bits, at random places.
        let mut word = random;
        let mut at = random;
        while word.count_ones() != KEPT_OF_64 {
            at = at.wrapping_mul(6364136223846793005).wrapping_add(1);
            let bit = 1 << (at >> 58);
            word = match word.count_ones() > KEPT_OF_64 {
                true => word & !bit,
                false => word | bit,
            };
        }
        word
    };
    let strips = strips::count(rows);
    let random = noise(strips * words * 8, 4);
    let bits: Vec<u8> = random
        .as_chunks::<8>()
        .0
        .iter()
        .flat_map(|r| kept(u64::from_le_bytes(*r)).to_le_bytes())
        .collect();
    let bytes_of_word = KEPT_OF_64 as usize / if nibbles { 2 } else { 1 };
    let codes = noise(strips * words * bytes_of_word, 5);
    let pointers: Vec<u32> = (0..=strips)
        .map(|strip| (strip * words * bytes_of_word) as u32)
        .collect();
    let primes = noise(rows * cols / BITMAP_GROUP, 7);
    let bytes = bits.len() + codes.len() + 4 * pointers.len() + primes.len() + 4 * rows;
    let levels = match nibbles {
        false => Levels::Bytes(signed(codes)),
        true => Levels::Nibbles {
            codes: codes.into(),
            codebook: signed(noise(16, 6)),
        },
    };
    let arrays = BitmapArrays {
        bitmap: bits.into(),
        levels,
        strip_pointers: pointers.into(),
        prime_indices: primes.into(),
        scales: ones(rows),
    };
    let m = BitmapMatrix::new(rows, cols, arrays).expect("fitting parts");
    (Matrix::Bitmap(m), bytes)
}

fn trellis(rows: usize, cols: usize, k: u8) -> (Matrix, usize) {
    let codes = noise(
        strips::count(rows) * strip_bytes(cols, k).expect("a size in memory"),
        8,
    );
    let bytes = codes.len() + 5 * rows;
    let size = 1 << cols.ilog2();
    let signs = noise(usize::div_ceil(size, 8), 9).into();
    let parts = TrellisParts {
        codes: codes.into(),
        prime_indices: vec![0; rows].into(),
        scales: ones(rows),
        rotation: Rotation::new(cols, size, signs).expect("a fitting rotation"),
    };
    let m = TrellisMatrix::new(rows, cols, k, parts).expect("fitting parts");
    (Matrix::Trellis(m), bytes)
}

/// Creates an `mdcsr` matrix whose columns are stored at random.
fn sparse(rows: usize, cols: usize, percent: u8) -> (Matrix, usize) {
    let (mut deltas, mut row_pointers) = (Vec::new(), vec![0]);
    // Several bits per word: a byte is too coarse for a percentage.
    let mut x = 12u64;
    let mut is_stored = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 32) * 100 < u64::from(percent) << 32
    };
    for _ in 0..rows {
        let mut last = 0;
        for column in 0..cols {
            if is_stored() || column - last == 255 {
                deltas.push((column - last) as u8);
                last = column;
            }
        }
        row_pointers.push(deltas.len() as u32);
    }
    let nnz = deltas.len();
    let primes: Vec<u16> = (noise(2 * nnz, 13).as_chunks().0.iter())
        .map(|pair| u16::from_le_bytes(*pair) % 10_000)
        .collect();
    let arrays = MdCSRArrays {
        values: signed(noise(nnz, 14)),
        delta_indices: deltas.into(),
        row_pointers: row_pointers.into(),
        prime_indices: primes.into(),
        scales: ones(rows),
    };
    let m = MdCSRMatrix::new(rows, cols, arrays).expect("columns inside of the matrix");
    (Matrix::MdCsr(m), 4 * nnz + 8 * rows + 4)
}

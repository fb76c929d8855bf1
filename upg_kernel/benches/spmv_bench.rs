//! Products of packed matrices with one vector, at the shapes of a Phi-4 layer and its output head.
//!
//! ```text
//! cargo bench -p upg_kernel --bench spmv_bench                   # every encoding
//! UPG_KERNEL=scalar RAYON_NUM_THREADS=1 cargo bench -p upg_kernel --bench spmv_bench -- t3
//! ```
//!
//! The weights are random codes. Throughput counts the bytes of the matrix, to be compared with what
//! `read` says: the same threads adding up memory. Rotation of the input and its quantization are
//! part of the time. Results are checked against decoded rows before anything is timed.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rayon::prelude::*;
use std::hint::black_box;
use upg_kernel::matrix::trellis::strip_bytes;
use upg_kernel::matrix::{
    BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, TrellisMatrix, TrellisParts,
};
use upg_kernel::rotation::Rotation;
use upg_kernel::{Array, Matrix};

/// Fused query, key and value; attention output; fused gate and up; down.
const SHAPES: [(usize, usize); 4] = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)];

/// Bytes that are read for comparison: far more than any cache holds.
const READ_BYTES: usize = 1 << 30;

/// Share of kept weights in `s8` and `s4`.
const KEPT_OF_64: u32 = 32;

/// Relative to the sum of the magnitudes of all products.
const TOLERANCE: f64 = 1e-4;

/// A plain sequence of pseudo-random bytes (xorshift), eight at a time.
fn noise(len: usize, seed: u64) -> Vec<u8> {
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
    let groups = cols.div_ceil(group);
    let per_group = if nibbles { 16 } else { 64 };
    let codes = noise(rows * groups * per_group, 1);
    let bytes = codes.len() + rows * groups + 4 * rows;
    let levels = match nibbles {
        false => Levels::Bytes(signed(codes)),
        true => Levels::Nibbles {
            codes: codes.into(),
            codebook: signed(noise(16, 2)),
        },
    };
    let primes = noise(rows * groups, 3).into();
    let m = GroupedMatrix::new(rows, cols, group, levels, primes, ones(rows));
    (Matrix::Grouped(m.expect("fitting parts")), bytes)
}

fn bitmap(rows: usize, cols: usize, nibbles: bool) -> (Matrix, usize) {
    let groups = cols.div_ceil(64);
    let kept = |random: u64| {
        // Exactly so many bits, at random places.
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
    let random = noise(rows * groups * 8, 4);
    let bits: Vec<u8> = random
        .as_chunks::<8>()
        .0
        .iter()
        .flat_map(|r| kept(u64::from_le_bytes(*r)).to_le_bytes())
        .collect();
    let per_group = KEPT_OF_64 as usize / if nibbles { 2 } else { 1 };
    let codes = noise(rows * groups * per_group, 5);
    let pointers: Vec<u32> = (0..=rows)
        .map(|r| (r * groups * per_group) as u32)
        .collect();
    let bytes = bits.len() + codes.len() + 4 * pointers.len() + rows * groups + 4 * rows;
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
        row_pointers: pointers.into(),
        prime_indices: noise(rows * groups, 7).into(),
        scales: ones(rows),
    };
    let m = BitmapMatrix::new(rows, cols, arrays).expect("fitting parts");
    (Matrix::Bitmap(m), bytes)
}

fn trellis(rows: usize, cols: usize, k: u8) -> (Matrix, usize) {
    let levels = if k == 4 { 256 } else { 128 };
    let codes = noise(
        rows.div_ceil(64) * strip_bytes(cols, k).expect("a size in memory"),
        8,
    );
    let bytes = codes.len() + 5 * rows;
    let size = 1 << cols.ilog2();
    let signs = noise(cols.div_ceil(8), 9).into();
    let parts = TrellisParts {
        codes: codes.into(),
        shift_table: noise(64, 10).into(),
        level_table: signed(noise(levels, 11)),
        prime_indices: vec![0; rows].into(),
        scales: ones(rows),
        rotation: Rotation::new(cols, size, signs).expect("a fitting rotation"),
    };
    let m = TrellisMatrix::new(rows, cols, k, parts).expect("fitting parts");
    (Matrix::Trellis(m), bytes)
}

/// The first and last rows against sums in f64 over decoded weights.
fn check(matrix: &Matrix, x: &[f32], y: &[f32]) {
    let cols = matrix.cols();
    let mut row = vec![0.0; cols];
    for r in (0..4).chain(matrix.rows() - 4..matrix.rows()) {
        matrix.rows_into(r, &mut row).expect("a row of the matrix");
        let products = || {
            row.iter()
                .zip(x)
                .map(|(&w, &x)| f64::from(w) * f64::from(x))
        };
        let (sum, size) = (
            products().sum::<f64>(),
            products().map(f64::abs).sum::<f64>(),
        );
        let error = (f64::from(y[r]) - sum).abs();
        assert!(
            error <= TOLERANCE * size,
            "row {r}: {} instead of {sum}",
            y[r]
        );
    }
}

/// A matrix of `rows` and `cols`, and its bytes.
type Make = fn(usize, usize) -> (Matrix, usize);

fn spmv(c: &mut Criterion) {
    let encodings: [(&str, Make); 7] = [
        ("q8", |rows, cols| grouped(rows, cols, false)),
        ("q4", |rows, cols| grouped(rows, cols, true)),
        ("t2", |rows, cols| trellis(rows, cols, 2)),
        ("t3", |rows, cols| trellis(rows, cols, 3)),
        ("t4", |rows, cols| trellis(rows, cols, 4)),
        ("s8", |rows, cols| bitmap(rows, cols, false)),
        ("s4", |rows, cols| bitmap(rows, cols, true)),
    ];
    for (name, make) in encodings {
        let mut group = c.benchmark_group(name);
        for (rows, cols) in SHAPES {
            let (matrix, bytes) = make(rows, cols);
            let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut y = vec![0.0; rows];
            matrix.spmm_into(&x, 1, &mut y).expect("fitting lengths");
            check(&matrix, &x, &y);
            group.throughput(Throughput::Bytes(bytes as u64));
            let id = BenchmarkId::from_parameter(format!("{rows}x{cols}"));
            group.bench_function(id, |b| {
                b.iter(|| {
                    matrix
                        .spmm_into(black_box(&x), 1, &mut y)
                        .expect("fitting lengths")
                });
            });
        }
        group.finish();
    }
}

fn read(c: &mut Criterion) {
    let memory: Vec<u64> = (0..READ_BYTES as u64 / 8).collect();
    let mut group = c.benchmark_group("read");
    group.throughput(Throughput::Bytes(READ_BYTES as u64));
    group.bench_function("1GiB", |b| {
        b.iter(|| -> u64 {
            let parts = black_box(&memory).par_chunks(1 << 17);
            parts
                .map(|part| part.iter().fold(0u64, |sum, v| sum.wrapping_add(*v)))
                .reduce(|| 0, u64::wrapping_add)
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = read, spmv
}
criterion_main!(benches);

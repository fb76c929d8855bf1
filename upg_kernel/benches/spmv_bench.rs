//! Products of packed matrices with one vector, at the shapes of a Phi-4 layer and its output
//! head.
//!
//! ```text
//! cargo bench -p upg_kernel --bench spmv_bench                   # every encoding
//! UPG_KERNEL=scalar RAYON_NUM_THREADS=1 cargo bench -p upg_kernel --bench spmv_bench -- t3
//! ```
//!
//! The weights are random codes. Throughput counts the bytes of the matrix. Compare it with `read`,
//! the memory bandwidth of the same threads. Rotation and quantization of the input are included in
//! the time. Results are compared with decoded rows before anything is timed.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use upg_kernel::Matrix;
use upg_kernel::support::sum_words;

/// Shapes of fused query, key and value; attention output; fused gate and up; down.
const SHAPES: [(usize, usize); 4] = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)];

/// Bytes read for the bandwidth, far more than any cache holds.
const READ_BYTES: usize = 1 << 30;

/// Tolerance relative to the sum of the magnitudes of all products.
const TOLERANCE: f64 = 1e-4;

/// Compares the first and last rows with sums in f64 over decoded weights.
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

fn spmv(c: &mut Criterion) {
    for (name, make) in common::PACKED.into_iter().chain(common::SPARSE) {
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
        b.iter(|| sum_words(black_box(&memory)));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = read, spmv
}
criterion_main!(benches);

//! Gathering rows of an embedding, at the shapes of SmolLM2-135M and Phi-4-mini.
//!
//! One row for a generated token, or 512 for a prompt, in every encoding with strips and
//! uncompressed.
//!
//! ```text
//! cargo bench -p upg_kernel --bench gather_bench                   # up to 2 GB of memory
//! UPG_KERNEL=scalar cargo bench -p upg_kernel --bench gather_bench -- 49152x576
//! ```
//!
//! Every call takes other rows, which are therefore in no cache. Results are compared with whole
//! strips, which kernels decode in another way, before anything is timed.

mod common;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use upg_kernel::Matrix;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::matrix::{DenseMatrix, DenseValues};

const SHAPES: [(usize, usize); 2] = [(49152, 576), (200_064, 5120)];

/// Tokens of a step, and of a piece of a prompt.
const TOKENS: [usize; 2] = [1, 512];

const ENCODINGS: [&str; 5] = ["q8", "q4", "s8", "s4", "t3"];

fn keep(rows: usize, cols: usize) -> Matrix {
    let random = common::noise(2 * rows * cols, 1);
    let values: Vec<bf16> = (random.as_chunks().0.iter())
        .map(|bytes| bf16::from_bits(u16::from_le_bytes(*bytes) & 0xBFFF))
        .collect();
    let m = DenseMatrix::new(rows, cols, DenseValues::Bf16(values.into()));
    Matrix::Dense(m.expect("as many values as weights"))
}

/// Compares some rows with the whole strips that contain them.
fn check(matrix: &Matrix) {
    let cols = matrix.cols();
    let mut strip = vec![0.0; STRIP_ROWS * cols];
    for first in [0, matrix.rows() - STRIP_ROWS] {
        matrix
            .rows_into(first, &mut strip)
            .expect("a strip of the matrix");
        let rows = [63, 0, 17, 32].map(|row| (first + row) as u32);
        let mut out = vec![f32::NAN; rows.len() * cols];
        matrix.gather(&rows, &mut out).expect("rows of the matrix");
        for (row, out) in rows.into_iter().zip(out.chunks(cols)) {
            let expected = &strip[(row as usize - first) * cols..][..cols];
            assert!(out == expected, "row {row} differs");
        }
    }
}

fn gather(c: &mut Criterion) {
    let packed = common::PACKED.into_iter();
    let packed = packed.filter(|(name, _)| ENCODINGS.contains(name));
    let all = packed.chain([("keep", (|rows, cols| (keep(rows, cols), 0)) as common::Make)]);
    for (name, make) in all {
        let mut group = c.benchmark_group(name);
        for (rows, cols) in SHAPES {
            let (matrix, _) = make(rows, cols);
            check(&matrix);
            for n in TOKENS {
                let mut out = vec![0.0; n * cols];
                let mut tokens = vec![0; n];
                let mut next = 1u32;
                group.throughput(Throughput::Elements(n as u64));
                group.bench_function(BenchmarkId::new(format!("{rows}x{cols}"), n), |b| {
                    b.iter(|| {
                        for token in &mut tokens {
                            next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                            *token = (next >> 8) % rows as u32;
                        }
                        matrix
                            .gather(&tokens, &mut out)
                            .expect("rows of the matrix");
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = gather
}
criterion_main!(benches);

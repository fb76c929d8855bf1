//! Products of packed matrices with one and four vectors on the GPU of a Mac, at the shapes
//! of a Phi-4 layer.
//!
//! ```text
//! cargo bench -p upg_kernel --features metal --bench metal_bench
//! ```
//!
//! The setup is that of `spmv_bench`, which gives the figures of the CPU of the same machine:
//! random codes, throughput in bytes of the matrix, rotation of the input included. A measurement
//! is a pass of 20 products with different matrices, as in a model, so that no cache holds the
//! weights. Results are compared with the CPU before anything is timed.

#[cfg(target_vendor = "apple")]
mod common;

#[cfg(target_vendor = "apple")]
mod on_device {
    use super::common;
    use criterion::{BenchmarkId, Criterion, Throughput};
    use upg_kernel::Matrix;
    use upg_kernel::metal_kernels::{MetalMatrix, MetalSpMV};

    /// Shapes of fused query, key and value; attention output; fused gate and up; down.
    const SHAPES: [(usize, usize); 4] = [(7680, 5120), (5120, 5120), (35840, 5120), (5120, 17920)];

    /// Products per pass.
    const PRODUCTS: usize = 20;

    /// Tolerance relative to the largest output: the CPU rounds its input to 14 bits.
    const TOLERANCE: f32 = 1e-3;

    fn check(metal: &MetalSpMV, matrix: &Matrix, x: &[f32]) {
        let expected = matrix.spmv(x).expect("fitting lengths");
        let loaded = metal.load(matrix).expect("room");
        let mut pass = metal.pass().expect("a pass");
        let x = metal.vector(x, 1).expect("a vector");
        let y = pass.spmv(&loaded, &x).expect("fitting lengths");
        pass.finish().expect("a product");
        let largest = expected.iter().fold(0.0f32, |a, y| a.max(y.abs()));
        for (row, (y, expected)) in y
            .to_vec::<f32>()
            .expect("f32")
            .iter()
            .zip(&expected)
            .enumerate()
        {
            let error = (y - expected).abs();
            assert!(
                error <= TOLERANCE * largest,
                "row {row}: {y} instead of {expected}"
            );
        }
    }

    fn run(metal: &MetalSpMV, matrices: &[MetalMatrix], x: &[f32], vectors: usize) {
        let x = metal.vector(x, vectors).expect("a vector");
        let mut pass = metal.pass().expect("a pass");
        for matrix in matrices {
            pass.spmv(matrix, &x).expect("fitting lengths");
        }
        pass.finish().expect("products");
    }

    pub fn spmv(c: &mut Criterion) {
        let metal = MetalSpMV::new().unwrap_or_else(|e| panic!("{e}"));
        println!(
            "{}, {:.1} GB for weights",
            metal.device_name(),
            metal.working_set() as f64 / 1e9
        );
        for (name, make) in common::PACKED.into_iter().chain(common::SPARSE) {
            for (rows, cols) in SHAPES {
                let (matrix, bytes) = make(rows, cols);
                let x: Vec<f32> = (0..4 * cols).map(|i| (i as f32 * 0.37).sin()).collect();
                check(&metal, &matrix, &x[..cols]);
                // Copies: owned arrays are copied to the device each time.
                let load = |_| metal.load(&matrix).expect("room");
                let matrices: Vec<_> = (0..PRODUCTS).map(load).collect();
                let mut group = c.benchmark_group(name);
                group.throughput(Throughput::Bytes((PRODUCTS * bytes) as u64));
                for vectors in [1, 4] {
                    let id = BenchmarkId::from_parameter(format!("{rows}x{cols}x{vectors}"));
                    let x = &x[..vectors * cols];
                    group.bench_function(id, |b| b.iter(|| run(&metal, &matrices, x, vectors)));
                }
                group.finish();
            }
        }
    }
}

#[cfg(target_vendor = "apple")]
criterion::criterion_group! {
    name = benches;
    config = criterion::Criterion::default().sample_size(20);
    targets = on_device::spmv
}
#[cfg(target_vendor = "apple")]
criterion::criterion_main!(benches);

#[cfg(not(target_vendor = "apple"))]
fn main() {
    let error = upg_kernel::metal_kernels::MetalSpMV::new().err();
    println!("{}", error.map_or_else(String::new, |e| e.to_string()));
}

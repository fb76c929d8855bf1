//! Decompression of whole matrices from a file to BF16, F16 and F32, in every encoding.
//!
//! ```text
//! cargo bench -p upg_kernel --bench decompress_bench                   # every encoding and type
//! RAYON_NUM_THREADS=1 cargo bench -p upg_kernel --bench decompress_bench -- t3/bf16
//! ```
//!
//! The weights are random codes. Throughput counts the bytes written. Compare it with `fill` (the
//! same threads write as many bytes of one value) and `copy` (they copy as many from elsewhere).
//! Results are compared with rows that are decoded one by one before anything is timed.

mod common;

use common::{PACKED, SPARSE};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use upg_kernel::format::{Encoding, FileWriter, LayerInfo, header_capacity};
use upg_kernel::{Matrix, UPGDecompressor, WeightFloat};

/// Shape of the fused query, key and value of Phi-4; 79 MB as BF16.
const SHAPE: (usize, usize) = (7680, 5120);

/// Values that one thread fills or copies at a time.
const PART: usize = 1 << 18;

/// Rows at each end that are compared.
const CHECKED_ROWS: usize = 70;

const LAYER: &str = "layer";

/// Describes the only layer of a file with this matrix.
fn described(name: &str, matrix: &Matrix) -> LayerInfo {
    let encoding = name.split('-').next().map(str::parse::<Encoding>);
    let encoding = encoding.expect("a name").expect("that of an encoding");
    let mut layer = LayerInfo::new(LAYER, matrix.rows(), matrix.cols(), encoding);
    match matrix {
        Matrix::Grouped(m) => layer.group = Some(m.group()),
        Matrix::Bitmap(_) => layer.group = Some(64),
        Matrix::Trellis(m) => layer.hadamard = Some(m.parts().rotation.size()),
        _ => {}
    }
    layer
}

fn write(path: &Path, name: &str, matrix: &Matrix) {
    let layers = [described(name, matrix)];
    let keys = ["model", "compression_ratio", "bits_per_weight", "recipe"];
    let metadata: BTreeMap<String, String> = keys.map(|key| (key.into(), "-".into())).into();
    let capacity = header_capacity(&layers, [].into_iter(), &metadata).expect("a known encoding");
    let mut writer = FileWriter::create(path, capacity).expect("a folder to write to");
    let written = writer.layer(0, &layers[0], matrix);
    written.expect("a matrix as it is described");
    writer.finish(metadata, &layers).expect("room on the disk");
}

/// Compares the first and last rows with those that are decoded one by one.
fn check<T: WeightFloat + PartialEq>(file: &UPGDecompressor, out: &[T]) {
    let (_, matrix) = file.layer(0).expect("the one layer");
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut row = vec![0.0; cols];
    let mut expected = vec![T::default(); cols];
    for r in (0..CHECKED_ROWS).chain(rows - CHECKED_ROWS..rows) {
        matrix.rows_into(r, &mut row).expect("a row of the matrix");
        T::from_weights(&row, &mut expected).expect("kernels of this machine");
        assert!(out[r * cols..][..cols] == expected, "row {r} differs");
    }
}

fn one_type<T: WeightFloat + PartialEq>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    dtype: &str,
    file: &UPGDecompressor,
) {
    let mut out = vec![T::default(); SHAPE.0 * SHAPE.1];
    let fill = |out: &mut [T]| {
        let filled = file.decompress_layer_into(LAYER, out);
        filled.expect("a buffer of the size of the layer");
    };
    fill(&mut out);
    check(file, &out);
    group.throughput(Throughput::Bytes(size_of_val(&out[..]) as u64));
    group.bench_function(dtype, |b| b.iter(|| fill(&mut out)));
}

fn decompress(c: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join("matrix");
    for (name, make) in PACKED.into_iter().chain(SPARSE) {
        let (matrix, _) = make(SHAPE.0, SHAPE.1);
        write(&path, name, &matrix);
        drop(matrix);
        let file = UPGDecompressor::from_safetensors(&path).expect("a file that was just written");
        let mut group = c.benchmark_group(name);
        one_type::<bf16>(&mut group, "bf16", &file);
        one_type::<f16>(&mut group, "f16", &file);
        one_type::<f32>(&mut group, "f32", &file);
        group.finish();
    }
}

/// Measures the two limits: writing one value, and copying.
fn memory(c: &mut Criterion) {
    for (dtype, values) in [
        ("2-byte", SHAPE.0 * SHAPE.1),
        ("4-byte", 2 * SHAPE.0 * SHAPE.1),
    ] {
        let mut out = vec![0u16; values];
        let from: Vec<u16> = (0..values).map(|i| i as u16).collect();
        let bytes = Throughput::Bytes(size_of_val(&out[..]) as u64);
        let mut next = 0;
        let mut fill = || {
            next += 1;
            out.par_chunks_mut(PART).for_each(|part| part.fill(next));
        };
        let mut group = c.benchmark_group("fill");
        group.throughput(bytes.clone());
        group.bench_function(dtype, |b| b.iter(&mut fill));
        group.finish();
        let mut copy = || {
            let parts = out.par_chunks_mut(PART).zip(from.par_chunks(PART));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        };
        let mut group = c.benchmark_group("copy");
        group.throughput(bytes);
        group.bench_function(dtype, |b| b.iter(&mut copy));
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = memory, decompress
}
criterion_main!(benches);

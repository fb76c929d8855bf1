//! Every kernel of `spmv.metal` on the CPU, compared with sums in f64 over the weights that
//! the reference decodes.
//!
//! The tests need clang: `UPG_CLANG` or one that is found. Without it they print that they
//! did not run, or fail if `UPG_REQUIRE_CLANG` is set. `tests/metal_on_cpu/machine.h`
//! describes the emulation.

mod cases;
mod on_cpu;
mod planted;

use super::plan::SparseKernel;
use super::{Element, KERNELS, Operand, Plan, source};
use crate::matrix::Matrix;
use crate::test_data::{noise, trellis};
use bytemuck::cast_slice;
use cases::*;
use half::f16;
use on_cpu::{Job, Program};
use rayon::prelude::*;
use std::io::Write;
use std::sync::OnceLock;

/// Tolerance relative to the sum of the magnitudes of all products.
///
/// Sums are in f32 and in pieces, except for rows of `mdcsr` with one thread each.
const TOLERANCE: f64 = 2e-6;

/// Thread schedules: forwards, backwards, and two at random.
const SCHEDULES: [u32; 4] = [0, 1, 2, 3];

/// Two builds of the kernels: with minimal and with maximal optimization freedom of clang.
fn programs() -> Option<&'static [Program; 2]> {
    static PROGRAMS: OnceLock<Option<[Program; 2]>> = OnceLock::new();
    let made = PROGRAMS.get_or_init(|| {
        let clang = clang()?;
        let options: [&[&str]; 2] = [&["-ffp-contract=off"], &["-ffast-math"]];
        let program = |options: &[&str]| Program::new(&clang, &source(), |_| true, options);
        let (exact, fast) = rayon::join(|| program(options[0]), || program(options[1]));
        let compiled = |program: Result<_, String>| program.unwrap_or_else(|e| panic!("{e}"));
        Some([compiled(exact), compiled(fast)])
    });
    made.as_ref()
}

fn clang() -> Option<String> {
    let found = on_cpu::clang();
    if found.is_none() {
        let missing =
            "there is no clang++ here: install clang (15 or later), or name it in UPG_CLANG";
        not_run(missing, "UPG_REQUIRE_CLANG");
    }
    found
}

/// Fails if the variable is set; otherwise prints why a test does nothing,
/// past the test harness.
fn not_run(why: &str, required: &str) {
    assert!(std::env::var_os(required).is_none(), "{why}");
    writeln!(std::io::stderr(), "NOT RUN: {why}").expect("standard error");
}

/// Returns inputs of moderate size, as bytes of elements and as exact values.
fn input(len: usize, element: Element, seed: u64) -> (Vec<u8>, Vec<f32>) {
    let values = noise(len * 2, seed);
    let value = |bytes: &[u8; 2]| f32::from(i16::from_le_bytes(*bytes)) / 16384.0;
    let values: Vec<f32> = values.as_chunks().0.iter().map(value).collect();
    match element {
        Element::F32 => (cast_slice(&values).to_vec(), values),
        Element::F16 => {
            let halves: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
            let exact = halves.iter().map(|x| x.to_f32()).collect();
            (cast_slice(&halves).to_vec(), exact)
        }
    }
}

/// Expected output.
struct Expected {
    value: f64,
    /// Sum of the magnitudes of all products, with and without the scale of the row.
    size: f64,
    unscaled: f64,
    /// Number of products.
    terms: usize,
}

impl Expected {
    /// Computes every output, vector by vector.
    fn all(matrix: &Matrix, x: &[f32]) -> Vec<Self> {
        let cols = matrix.cols();
        // As stored, without inverse rotation.
        let decoded = |matrix: &Matrix| {
            let mut weights = vec![0.0; matrix.rows() * cols];
            matrix.stored().decode_rows(0, &mut weights);
            weights
        };
        let weights = decoded(matrix);
        let unscaled = decoded(&matrix.with_scales(vec![1.0; matrix.rows()]).unwrap());
        let mut all = Vec::new();
        for x in x.chunks(cols) {
            let x = rotated(matrix, x);
            for (row, unscaled) in weights.chunks(cols).zip(unscaled.chunks(cols)) {
                let sum = |row: &[f32], term: fn(f64) -> f64| -> f64 {
                    let products = row
                        .iter()
                        .zip(&x)
                        .map(|(&w, &x)| f64::from(w) * f64::from(x));
                    products.map(term).sum()
                };
                all.push(Self {
                    value: sum(row, |p| p),
                    size: sum(row, f64::abs),
                    unscaled: sum(unscaled, f64::abs),
                    terms: row.iter().filter(|w| **w != 0.0).count(),
                });
            }
        }
        all
    }

    /// Returns the error relative to the allowed error.
    ///
    /// NaN and all errors beyond rounding are far above 1. Allowed are rounding of f32 sums, a
    /// scale that counts as 0 because it is too small for an exponent, and rounding of the output.
    fn error(&self, found: f64, case: &Case, element: Element) -> f64 {
        let one_by_one = case.sparse != SparseKernel::Simd;
        let roundings = if one_by_one {
            self.terms as f64 + 2.0
        } else {
            0.0
        };
        let relative = TOLERANCE.max(roundings * f64::from(f32::EPSILON) / 2.0);
        let tiny = f64::from(f32::MIN_POSITIVE);
        let mut allowed = self.size * relative + (self.unscaled + 1.0) * tiny;
        if element == Element::F16 {
            if self.value.abs() + allowed >= 65_504.0 && found == f64::INFINITY.copysign(self.value)
            {
                return 0.0;
            }
            allowed += self.value.abs() / 2048.0 + f64::from(f16::MIN_POSITIVE_SUBNORMAL) / 2.0;
        }
        let error = (found - self.value).abs() / allowed;
        if error.is_nan() { f64::INFINITY } else { error }
    }
}

/// Returns the input rotated for the stored weights.
fn rotated(matrix: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut x = x.to_vec();
    if let Matrix::Trellis(m) = matrix {
        m.parts().rotation.apply(&mut x);
    }
    x
}

/// Runs the case with all schedules and compares; returns the largest error relative to the
/// allowed one.
fn check(
    program: &Program,
    case: &Case,
    vectors: usize,
    element: Element,
    max_threads: usize,
) -> Result<f64, String> {
    let matrix = &case.scaled(element);
    let plan = Plan::with_kernel(matrix, vectors, element, case.sparse, |_| max_threads);
    let plan = plan.map_err(|e| e.to_string())?;
    compare(case, matrix, vectors, element, |x| {
        let job = Job {
            plan: &plan,
            x,
            element,
            outputs: vectors * matrix.rows(),
            schedules: &SCHEDULES,
        };
        let left = program.run(&job)?;
        match left.iter().position(|other| other.y != left[0].y) {
            Some(other) => Err(format!("schedules 0 and {other} differ")),
            None => Ok(left.into_iter().next().expect("four of them").y),
        }
    })
    .map_err(|e| format!("{e} (up to {max_threads} threads)"))
}

/// Compares the outputs that `run` computes from an input, both as bytes.
fn compare(
    case: &Case,
    matrix: &Matrix,
    vectors: usize,
    element: Element,
    run: impl FnOnce(&[u8]) -> Result<Vec<u8>, String>,
) -> Result<f64, String> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let what = format!("{} [{rows}, {cols}] x {vectors} {element:?}", case.name);
    let (bytes, x) = input(vectors * cols, element, 30);
    let y = run(&bytes).map_err(|e| format!("{what}: {e}"))?;
    let y: Vec<f64> = match element {
        Element::F32 => floats::<f32>(&y),
        Element::F16 => floats::<f16>(&y),
    };
    let expected = Expected::all(matrix, &x);
    assert_eq!(y.len(), expected.len());
    let mut worst = 0f64;
    for (i, (&found, expected)) in y.iter().zip(&expected).enumerate() {
        let error = expected.error(found, case, element);
        if error > 1.0 {
            let (row, vector, expected) = (i % rows, i / rows, expected.value);
            return Err(format!(
                "{what}: row {row} of vector {vector} is {found}, not {expected}"
            ));
        }
        worst = worst.max(error);
    }
    Ok(worst)
}

fn floats<T: bytemuck::AnyBitPattern + Into<f64>>(bytes: &[u8]) -> Vec<f64> {
    let values = bytes.chunks_exact(size_of::<T>());
    let value = |bytes| bytemuck::pod_read_unaligned::<T>(bytes).into();
    values.map(value).collect()
}

/// One vector, and two batches of which the second is not full.
const VECTORS: [usize; 2] = [1, 5];

const ELEMENTS: [Element; 2] = [Element::F32, Element::F16];

/// Checks all cases with both programs, with one and several vectors of both types;
/// panics on failures.
fn check_all(cases: &[Case], max_threads: usize) {
    let Some(programs) = programs() else { return };
    let mut jobs = Vec::new();
    for case in cases {
        for program in programs {
            for element in ELEMENTS {
                jobs.extend(VECTORS.map(|vectors| (case, program, element, vectors)));
            }
        }
    }
    let run = |&(case, program, element, vectors): &(_, _, _, _)| {
        let error = check(program, case, vectors, element, max_threads);
        error.map(|error| (element, error))
    };
    report(jobs.par_iter().map(run).collect());
}

/// Panics on failures, or prints the largest errors.
fn report(results: Vec<Result<(Element, f64), String>>) {
    let wrong: Vec<_> = results.iter().filter_map(|r| r.as_ref().err()).collect();
    let (some, count) = (&wrong[..wrong.len().min(5)], wrong.len());
    assert!(wrong.is_empty(), "{count} of {}: {some:#?}", results.len());
    for element in ELEMENTS {
        let errors = results.iter().flatten().filter(|(e, _)| *e == element);
        let (count, worst) = errors.fold((0, 0.0), |(n, worst), (_, e)| (n + 1, e.max(worst)));
        println!("{count} runs with {element:?}, largest error {worst:.2} of what is allowed");
    }
}

/// The same cases on the GPU of this machine.
#[cfg(all(feature = "metal", target_vendor = "apple"))]
#[test]
fn test_metal_spmv_on_the_device() {
    let metal = match super::MetalSpMV::new() {
        Ok(metal) => metal,
        // Most likely a virtual machine.
        Err(e) => return not_run(&e.to_string(), "UPG_REQUIRE_METAL"),
    };
    println!("{}", metal.device_name());
    let mut results = Vec::new();
    for case in [edges(), many_rows(), sparse_rows(), extremes()]
        .into_iter()
        .flatten()
    {
        for element in ELEMENTS {
            for vectors in VECTORS {
                let matrix = case.scaled(element);
                let error = compare(&case, &matrix, vectors, element, |x| {
                    let y = metal.products(&matrix, case.sparse, x, vectors, element);
                    y.map_err(|e| e.to_string())
                });
                results.push(error.map(|error| (element, error)));
            }
        }
    }
    report(results);
}

/// Tolerance relative to the largest output: for BF16, and for an input that the CPU rounds
/// to 14 bits.
#[cfg(all(feature = "metal", target_vendor = "apple"))]
const CANDLE_TOLERANCE: f32 = 1e-2;

/// candle's Metal device gives the same results as its CPU.
#[cfg(all(feature = "metal", target_vendor = "apple"))]
#[test]
fn test_metal_spmv_in_candle() {
    use candle_core::{Device, Module, Tensor};
    let device = match Device::new_metal(0) {
        Ok(device) => device,
        Err(e) => return not_run(&e.to_string(), "UPG_REQUIRE_METAL"),
    };
    for case in packed(67, 130) {
        let scales = (0..67).map(|r| 1e-6 * (1 + r % 7) as f32).collect();
        let matrix = case.matrix.with_scales(scales).unwrap();
        let layer = crate::UpgLinear::new(matrix, None).unwrap();
        for dtype in [
            candle_core::DType::F32,
            candle_core::DType::F16,
            candle_core::DType::BF16,
        ] {
            let (_, x) = input(2 * 3 * 130, Element::F16, 32);
            let x = Tensor::from_vec(x, (2, 3, 130), &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            let on = |device: &Device| -> Vec<f32> {
                let y = layer.forward(&x.to_device(device).unwrap()).unwrap();
                let y = y.to_dtype(candle_core::DType::F32).unwrap();
                y.flatten_all().unwrap().to_vec1().unwrap()
            };
            let (cpu, gpu) = (on(&Device::Cpu), on(&device));
            let largest = cpu.iter().fold(0.0f32, |a, x| a.max(x.abs()));
            for (a, b) in cpu.iter().zip(&gpu) {
                assert!(
                    (a - b).abs() <= CANDLE_TOLERANCE * largest,
                    "{} {dtype:?}: {a} {b}",
                    case.name
                );
            }
        }
    }
}

#[test]
fn test_metal_spmv_source_has_the_types_of_metal() {
    let Some(clang) = clang() else { return };
    on_cpu::check(&clang, &source()).unwrap_or_else(|e| panic!("{e}"));
    // Errors that only address spaces reveal.
    let wrong = [
        (
            "threadgroup const half *levels = table",
            "device const half *levels = table",
        ),
        (
            "shared[i] = float(x[start + i]);",
            "device float *to = shared + i; *to = float(x[start + i]);",
        ),
        (
            "const uint row = at.x;",
            "args.rows = 1; const uint row = at.x;",
        ),
        ("float sum = 0.0f;", "threadgroup float sum;"),
        ("float sum = 0.0f;", "double sum = 0.0;"),
        ("    if (col + 4 <= cols) {", "    if constexpr (true) {"),
    ];
    for (from, to) in wrong {
        let source = source();
        assert!(source.contains(from), "{from}");
        let error = on_cpu::check(&clang, &source.replacen(from, to, 1));
        assert!(error.is_err(), "{to} is not refused");
    }
}

#[test]
fn test_metal_spmv_every_kernel_is_in_the_list() {
    let Some(clang) = clang() else { return };
    let mut found = on_cpu::kernels(&clang, &source()).unwrap_or_else(|e| panic!("{e}"));
    found.sort();
    let mut listed = KERNELS.map(String::from);
    listed.sort();
    assert_eq!(found, listed);
}

#[test]
fn test_metal_spmv_packed_encodings_of_every_edge() {
    check_all(&edges(), 1024);
}

#[test]
fn test_metal_spmv_packed_encodings_with_any_number_of_threads() {
    for max_threads in [32, 96] {
        let mut cases = packed(67, 300);
        cases.extend(every_sparse_kernel("", &sparse(101, 300)));
        check_all(&cases, max_threads);
    }
}

#[test]
fn test_metal_spmv_sparse_rows_of_every_kind() {
    check_all(&sparse_rows(), 1024);
}

#[test]
fn test_metal_spmv_zeros_and_extreme_scales() {
    check_all(&extremes(), 1024);
}

#[test]
fn test_metal_spmv_many_rows() {
    let Some([program, _]) = programs() else {
        return;
    };
    let check = |case: &Case| check(program, case, 1, Element::F32, 1024);
    let errors = many_rows()
        .par_iter()
        .map(check)
        .collect::<Result<Vec<_>, _>>();
    errors.unwrap_or_else(|e| panic!("{e}"));
}

/// Weights that are not stored are not multiplied, not even by an infinity.
#[test]
fn test_metal_spmv_infinities_where_nothing_is_stored() {
    let Some([program, _]) = programs() else {
        return;
    };
    let cols = 600;
    let matrix = sparse(5, cols);
    let mut stored = vec![false; cols];
    // Row 0 is full, so it has none.
    for (i, weight) in matrix.to_dense().iter().enumerate().skip(cols) {
        stored[i % cols] |= *weight != 0.0;
    }
    let x: Vec<f32> = stored
        .iter()
        .map(|&s| if s { 1.0 } else { f32::INFINITY })
        .collect();
    assert!(x.contains(&f32::INFINITY), "a column without weights");
    for case in every_sparse_kernel("", &matrix) {
        let matrix = case.scaled(Element::F32);
        let plan = Plan::with_kernel(&matrix, 1, Element::F32, case.sparse, |_| 1024).unwrap();
        let job = Job {
            plan: &plan,
            x: cast_slice(&x),
            element: Element::F32,
            outputs: 5,
            schedules: &[0],
        };
        let left = program
            .run(&job)
            .unwrap_or_else(|e| panic!("{}: {e}", case.name));
        let y = floats::<f32>(&left[0].y);
        assert!(y[1..].iter().all(|y| y.is_finite()), "{}: {y:?}", case.name);
    }
}

/// A mapped file may change after its matrices were checked.
/// No kernel reads outside a buffer then.
#[test]
fn test_metal_spmv_arrays_that_changed_lead_nowhere_else() {
    let Some([program, _]) = programs() else {
        return;
    };
    let (rows, cols, vectors) = (67, 300, 2);
    let mut cases = packed(rows, cols);
    cases.extend(every_sparse_kernel("", &sparse(rows, cols)));
    let check = |case: &Case| {
        let plan = |vectors| {
            Plan::with_kernel(&case.matrix, vectors, Element::F32, case.sparse, |_| 1024).unwrap()
        };
        let vectors = if case.sparse == SparseKernel::RowBatch {
            vectors
        } else {
            1
        };
        let (x, _) = input(vectors * cols, Element::F32, 5);
        let lens: Vec<_> = (plan(vectors).dispatches.last().unwrap().operands.iter())
            .map(|operand| match operand {
                Operand::Weights(weights) => weights.bytes().len(),
                _ => 0,
            })
            .collect();
        for (operand, &len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            for fill in [0, 1, 127, 255] {
                let changed = vec![fill; len];
                let mut plan = plan(vectors);
                let last = plan.dispatches.last_mut().unwrap();
                if let Operand::Weights(weights) = &mut last.operands[operand] {
                    weights.change(&changed);
                }
                let job = Job {
                    plan: &plan,
                    x: &x,
                    element: Element::F32,
                    outputs: vectors * rows,
                    schedules: &[0],
                };
                let left = program.run(&job);
                left.unwrap_or_else(|e| panic!("{}, operand {operand}: {e}", case.name));
            }
        }
    };
    cases.par_iter().for_each(check);
}

/// The rotated input is bit-identical to that of the CPU.
#[test]
fn test_metal_spmv_rotations() {
    let Some([program, _]) = programs() else {
        return;
    };
    let sizes = [
        (1, 1),
        (2, 2),
        (3, 2),
        (7, 4),
        (8, 8),
        (31, 16),
        (32, 32),
        (70, 64),
        (200, 128),
        (4097, 1),
        (576, 512),
        (5120, 4096),
        (8192, 8192),
        (17_920, 16_384),
        (65_536, 65_536),
        (140_000, 131_072),
    ];
    let run = |&(cols, size): &(usize, usize)| {
        let matrix = Matrix::Trellis(trellis(1, cols, 2, size));
        for (element, vectors) in [(Element::F32, 1), (Element::F32, 2), (Element::F16, 2)] {
            let what = format!("{size} of {cols} columns x {vectors} {element:?}");
            // Also with a number of threads that does not divide the work.
            let max_threads = if vectors == 2 { 96 } else { 1024 };
            let mut plan = Plan::new(&matrix, vectors, element, |_| max_threads).unwrap();
            // Without the product, which takes long for so many columns.
            plan.dispatches.pop();
            let (bytes, x) = input(vectors * cols, element, 31);
            let job = Job {
                plan: &plan,
                x: &bytes,
                element,
                outputs: vectors,
                schedules: if cols > 10_000 { &[3] } else { &SCHEDULES },
            };
            let left = program.run(&job).unwrap_or_else(|e| panic!("{what}: {e}"));
            let expected: Vec<f32> = x.chunks(cols).flat_map(|x| rotated(&matrix, x)).collect();
            for left in left {
                assert!(left.rotated == expected, "{what}");
            }
        }
    };
    sizes.par_iter().for_each(run);
}

#[test]
fn test_metal_spmv_plans_refuse_what_kernels_cannot_do() {
    use crate::error::ErrorKind;
    use crate::matrix::{DenseMatrix, DenseValues};
    let values = DenseValues::F32(vec![1.0; 6].into());
    let dense = Matrix::Dense(DenseMatrix::new(2, 3, values).unwrap());
    let matrix = Matrix::MdCsr(sparse(2, 3));
    let error = |matrix, vectors| {
        let plan = Plan::new(matrix, vectors, Element::F32, |_| 1024);
        plan.unwrap_err().kind()
    };
    assert_eq!(error(&dense, 1), ErrorKind::Unsupported);
    assert_eq!(error(&matrix, 0), ErrorKind::Argument);
    assert_eq!(error(&matrix, 1 << 32), ErrorKind::TooLarge);
    let wide = sparse_of(
        (1 << 30) + 1,
        vec![],
        vec![],
        vec![0; 2],
        vec![],
        vec![1.0].into(),
    );
    assert_eq!(error(&Matrix::MdCsr(wide), 1), ErrorKind::TooLarge);
}

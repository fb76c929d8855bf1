//! Every kernel of this machine, compared with sums in f64 over the weights that the
//! reference decodes.

#[cfg(unix)]
mod changed;

use super::activations::Activations;
use super::*;
use crate::codec::stored::StoredMatrix;
use crate::matrix::{GroupedMatrix, Levels, strips::STRIP_ROWS};
use crate::rotation::Rotation;
use crate::test_data::{bitmap, grouped, noise, signed, trellis};

/// Tolerance relative to the sum of the magnitudes of all products.
///
/// Sums of four products are exact, and those of up to 64 groups are added in f32. Measured: 3e-7.
const TOLERANCE: f64 = 2e-6;

/// Columns around the edges of registers (64 and 128), of groups, and of chunks of 32 groups.
const COLS: [usize; 14] = [
    1, 5, 31, 32, 33, 63, 64, 65, 127, 129, 576, 1023, 2048, 2115,
];

/// Rows around the edges of strips.
const ROWS: [usize; 4] = [1, 3, 64, 67];

/// Kernels of this machine, and their variants for machines with fewer instructions.
fn with_fallbacks() -> Vec<Kernels> {
    let all = Kernels::available();
    #[cfg(target_arch = "x86_64")]
    let all = {
        let without = all.iter().filter_map(|kernels| match kernels.0 {
            Set::Avx512(kernels) => Some(Kernels(Set::Avx512(kernels.without_bf16()))),
            _ => None,
        });
        without.chain(all.iter().copied()).collect()
    };
    all
}

/// Activations with groups of every size, and one of zeros.
fn activations(cols: usize) -> Vec<f32> {
    let random = noise(cols, 14);
    let value = |(i, &byte): (usize, &u8)| {
        let size = match i / 64 % 3 {
            0 => 1.0,
            1 => 1e-6,
            _ => 3e4,
        };
        if i / 64 == 4 {
            0.0
        } else {
            size * (f32::from(byte) - 127.3)
        }
    };
    random.iter().enumerate().map(value).collect()
}

/// Returns the values that the quantized activations represent.
fn dequantized(x: &Activations, cols: usize) -> Vec<f64> {
    let value = |column: usize| {
        let (block, i) = (&x.blocks[column / 64], column % 64);
        let value = 128 * i32::from(block.high[i]) + i32::from(block.low[i]);
        f64::from(value) * f64::from(x.scales[column / 64])
    };
    (0..cols).map(value).collect()
}

fn check(kernels: Kernels, matrix: &dyn StoredMatrix, what: &str) {
    check_decode(kernels, matrix, what);
    check_rows(kernels, matrix, what);
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let x = Activations::new(&activations(cols));
    let exact = dequantized(&x, cols);
    let mut weights = vec![0.0; rows * cols];
    matrix.decode_rows(0, &mut weights);
    for (strip, weights) in weights.chunks(STRIP_ROWS * cols).enumerate() {
        let mut out = vec![f32::NAN; weights.len() / cols];
        kernels.multiply(matrix.strip(strip).unwrap(), &x, &mut out);
        let what = format!("{} {what} [{rows}, {cols}], {strip}", kernels.name());
        compare(weights, &exact, &out, &what);
    }
}

/// Checks [`Kernels::decode_row`] of every row.
fn check_rows(kernels: Kernels, matrix: &dyn StoredMatrix, what: &str) {
    let cols = matrix.cols();
    let (mut expected, mut found) = (vec![0.0; cols], vec![f32::NAN; cols]);
    for row in 0..matrix.rows() {
        matrix.decode_rows(row, &mut expected);
        let strip = matrix.strip(row / STRIP_ROWS).unwrap();
        kernels.decode_row(strip, row % STRIP_ROWS, &mut found);
        let bits = |row: &[f32]| row.iter().map(|w| w.to_bits()).collect::<Vec<_>>();
        let name = kernels.name();
        assert_eq!(
            bits(&found),
            bits(&expected),
            "{name} {what} row {row} of {cols} columns"
        );
    }
}

/// Compares `out` with the products of as many rows of `weights` with `x`.
fn compare(weights: &[f32], x: &[f64], out: &[f32], what: &str) {
    for (i, (row, &found)) in weights.chunks_exact(x.len()).zip(out).enumerate() {
        let products = || row.iter().zip(x).map(|(&w, x)| f64::from(w) * x);
        let (expected, size) = (
            products().sum::<f64>(),
            products().map(f64::abs).sum::<f64>(),
        );
        let error = (f64::from(found) - expected).abs();
        assert!(
            error <= TOLERANCE * size,
            "{what} row {i}: {found} instead of {expected}"
        );
    }
}

/// Checks [`Kernels::multiply_many`] with `n` different vectors.
fn check_many(kernels: Kernels, matrix: &dyn StoredMatrix, n: usize, what: &str) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let x = activations(cols + n);
    let vectors: Vec<_> = (0..n).map(|i| Activations::new(&x[i..i + cols])).collect();
    let mut weights = vec![0.0; rows * cols];
    matrix.decode_rows(0, &mut weights);
    let mut panel = Panel::default();
    for (strip, weights) in weights.chunks(STRIP_ROWS * cols).enumerate() {
        let count = weights.len() / cols;
        let view = matrix.strip(strip).unwrap();
        let products = kernels.multiply_many(view, &vectors, &mut panel);
        assert_eq!(products.len(), n);
        for (i, products) in products.iter().enumerate() {
            let out = &products[..count];
            let exact = dequantized(&vectors[i], cols);
            let what = format!("{} {what} [{rows}, {cols}] x {i} of {n}", kernels.name());
            compare(weights, &exact, out, &what);
        }
    }
}

#[test]
fn every_kernel_multiplies_many_vectors_as_the_reference_does() {
    // Around the edges of panels (1024 or 2048 columns), with every number of vectors that are
    // multiplied together.
    let sizes = [
        (1, 1),
        (3, 33),
        (17, 64),
        (64, 200),
        (67, 576),
        (3, 1090),
        (5, 2048),
        (66, 2115),
    ];
    for kernels in integer_kernels() {
        for (rows, cols) in sizes {
            for n in [1, 2, 3, 4, 5, 6, 7, 13] {
                for (group, nibbles) in [(32, false), (64, false), (32, true), (64, true)] {
                    let name = format!("{} group {group}", if nibbles { "q4" } else { "q8" });
                    check_many(kernels, &grouped(rows, cols, group, nibbles), n, &name);
                }
                check_many(kernels, &bitmap(rows, cols, false), n, "s8");
                check_many(kernels, &bitmap(rows, cols, true), n, "s4");
                for k in [2, 3, 4] {
                    check_many(kernels, &trellis(rows, cols, k, 1), n, &format!("t{k}"));
                }
            }
        }
    }
}

/// Checks [`Kernels::decode`] against [`StoredMatrix::decode_rows`], with and without inverse
/// rotation, in every type.
fn check_decode(kernels: Kernels, matrix: &dyn StoredMatrix, what: &str) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let size = 1 << cols.ilog2();
    let signs = noise(usize::div_ceil(size, 8), 15).into();
    let rotation = Rotation::new(cols, size, signs).unwrap();
    for rotation in [None, Some(&rotation)] {
        let mut expected = vec![0.0; rows * cols];
        matrix.decode_rows(0, &mut expected);
        if let Some(rotation) = rotation {
            let rows = expected.chunks_mut(cols);
            rows.for_each(|row| rotation.invert(row));
        }
        let what = format!("{what} [{rows}, {cols}]");
        check_decode_to::<f32>(kernels, matrix, rotation, &expected, &what);
        check_decode_to::<f16>(kernels, matrix, rotation, &expected, &what);
        check_decode_to::<bf16>(kernels, matrix, rotation, &expected, &what);
    }
}

fn check_decode_to<T: Float + bytemuck::Pod>(
    kernels: Kernels,
    matrix: &dyn StoredMatrix,
    rotation: Option<&Rotation>,
    weights: &[f32],
    what: &str,
) {
    let cols = matrix.cols();
    for (strip, weights) in weights.chunks(STRIP_ROWS * cols).enumerate() {
        let mut expected = vec![T::default(); weights.len()];
        T::round(Kernels::scalar(), weights, &mut expected);
        for streamed in [false, true] {
            let mut out = vec![T::default(); weights.len()];
            // A pattern that no weight has.
            bytemuck::cast_slice_mut::<T, u8>(&mut out).fill(0xFF);
            let strip = matrix.strip(strip).unwrap();
            let is_done = kernels.decode(strip, rotation, streamed, &mut out);
            assert_eq!(is_done, kernels.name().starts_with("avx"));
            let dtype = std::any::type_name::<T>();
            assert!(
                !is_done
                    || bytemuck::cast_slice::<T, u8>(&out)
                        == bytemuck::cast_slice::<T, u8>(&expected),
                "{} {what} {dtype}",
                kernels.name()
            );
        }
    }
}

/// Numbers that a processor may treat as zero.
#[test]
fn subnormal_weights_are_decoded_as_the_reference_does() {
    let scales = [
        1e-45,
        -1e-40,
        f32::MIN_POSITIVE / 2.0,
        f32::MIN_POSITIVE,
        -0.0,
    ];
    let cols = 130;
    let levels = Levels::Bytes(signed(noise(64 * 192, 1)));
    let primes = vec![0; 3 * 64].into();
    let scales = scales.to_vec().into();
    let matrix = GroupedMatrix::new(5, cols, 64, levels, primes, scales).unwrap();
    for kernels in with_fallbacks() {
        check_decode(kernels, &matrix, "q8 with tiny scales");
    }
}

#[test]
fn floats_of_16_bits_are_those_of_the_library() {
    let special = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        1e-44,
        65_520.0,
        f32::MAX,
    ];
    // Every pattern of the upper half of a float, with lower halves around the middle.
    let patterns = (0..=u16::MAX).flat_map(|upper| {
        [0, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001]
            .map(|lower| f32::from_bits(u32::from(upper) << 16 | lower))
    });
    let x: Vec<f32> = special.into_iter().chain(patterns).collect();
    for kernels in Kernels::available() {
        let mut found = vec![bf16::ZERO; x.len()];
        kernels.to_bf16(&x, &mut found);
        for (x, found) in x.iter().zip(&found) {
            assert_eq!(found.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
        }
        let mut found = vec![f16::ZERO; x.len()];
        kernels.to_f16(&x, &mut found);
        for (x, found) in x.iter().zip(&found) {
            assert_eq!(found.to_bits(), f16::from_f32(*x).to_bits(), "{x}");
        }
    }
}

fn integer_kernels() -> Vec<Kernels> {
    let all = with_fallbacks().into_iter();
    all.filter(|k| k.is_integer()).collect()
}

#[test]
fn every_kernel_multiplies_every_encoding_as_the_reference_does() {
    for kernels in integer_kernels() {
        for cols in COLS {
            for rows in ROWS {
                for (group, nibbles) in [(32, false), (64, false), (32, true), (64, true)] {
                    let name = format!("{} group {group}", if nibbles { "q4" } else { "q8" });
                    check(kernels, &grouped(rows, cols, group, nibbles), &name);
                }
                check(kernels, &bitmap(rows, cols, false), "s8");
                check(kernels, &bitmap(rows, cols, true), "s4");
                for k in [2, 3, 4] {
                    check(kernels, &trellis(rows, cols, k, 1), &format!("t{k}"));
                }
            }
        }
    }
}

/// With the largest levels and activations in every column nothing wraps around.
#[test]
fn extreme_values_are_exact() {
    let cols = 128;
    for kernels in integer_kernels() {
        for (level, activation) in [(-128, 1.0), (-128, -1.0), (127, 1.0), (127, -1.0)] {
            let bytes = Levels::Bytes(vec![level; 64 * cols].into());
            let nibbles = Levels::Nibbles {
                codes: vec![0; 32 * cols].into(),
                codebook: vec![level; 16].into(),
            };
            for levels in [bytes, nibbles] {
                let primes = vec![0; 128].into();
                let m = GroupedMatrix::new(1, cols, 64, levels, primes, vec![0.5].into());
                let m = m.unwrap();
                let x = Activations::new(&vec![activation; cols]);
                let mut out = [0.0];
                kernels.multiply(m.strip(0).unwrap(), &x, &mut out);
                let expected = f32::from(level) * activation * cols as f32;
                assert!(
                    (out[0] - expected).abs() <= 1e-6 * expected.abs(),
                    "{out:?}"
                );
            }
        }
    }
}

#[test]
fn every_kernel_rounds_activations_as_the_reference_does() {
    let mut wild = activations(300);
    (wild[3], wild[70], wild[299]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let tiny = vec![1e-44; 65];
    // A scale of 1, so that halves are ties, and groups around the smallest and the largest scale.
    let mut ties = vec![8_127.0, -0.0, 1e-44];
    for tie in [0.5, 1.5, 63.5, 64.5, 127.5, 8_126.5] {
        ties.extend([tie, -tie]);
    }
    ties.resize(64, 0.0);
    let least = 8_127.0 * f32::MIN_POSITIVE;
    for largest in [least, least.next_down(), f32::MAX] {
        ties.extend((0..64).map(|i| largest / 64.0 * (i as f32 - 31.0) * 2.0));
    }
    for kernels in Kernels::available() {
        // One buffer for all, to show that nothing of a longer vector is left.
        let mut found = Activations::default();
        let sizes = COLS.into_iter().rev().map(activations);
        for x in sizes.chain([wild.clone(), tiny.clone(), ties.clone()]) {
            let expected = Activations::new(&x);
            kernels.quantize(&x, &mut found);
            let what = format!("{} {}", kernels.name(), x.len());
            assert_eq!(found.blocks, expected.blocks, "{what}");
            assert_eq!(found.offsets, expected.offsets, "{what}");
            let bits = |scales: &[f32]| scales.iter().map(|s| s.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found.scales), bits(&expected.scales), "{what}");
        }
    }
}

#[test]
fn rotations_are_the_same_to_the_bit_with_every_kernel() {
    for (cols, size) in [
        (1usize, 1),
        (7, 4),
        (15, 8),
        (16, 16),
        (33, 32),
        (70, 64),
        (200, 128),
        (256, 256),
        (576, 512),
        (1030, 1024),
        (2048, 2048),
        (5120, 4096),
        (8200, 8192),
    ] {
        let signs = noise(usize::div_ceil(size, 8), 15);
        let rotation = Rotation::new(cols, size, signs.into()).unwrap();
        let of = |kernels: Kernels| {
            let mut x = activations(cols);
            kernels.rotate(&rotation, &mut x);
            let rotated = x.clone();
            kernels.rotate_back(&rotation, &mut x);
            (rotated, x)
        };
        for kernels in Kernels::available() {
            assert_eq!(
                of(kernels),
                of(Kernels::scalar()),
                "{} {cols}",
                kernels.name()
            );
        }
    }
}

#[test]
fn norms_and_gates_are_the_same_to_the_bit_with_every_kernel() {
    for len in [1, 15, 16, 17, 64, 576] {
        let x = activations(len);
        let up: Vec<f32> = x.iter().rev().map(|x| x * 1e-3).collect();
        let of = |kernels: Kernels| {
            let (mut normed, mut gated) = (x.clone(), vec![f32::NAN; len]);
            kernels.rms_norm(&mut normed, &up, 1e-5);
            kernels.gated_silu(&normed, &up, &mut gated);
            (normed, gated)
        };
        for kernels in Kernels::available() {
            assert_eq!(
                of(kernels),
                of(Kernels::scalar()),
                "{} {len}",
                kernels.name()
            );
        }
    }
}

/// `/proc/cpuinfo` of Linux is a second source beside the detection of the standard library.
/// Kernels that this machine must have are not silently left out.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[test]
fn kernels_that_the_processor_can_run_are_available() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpu.lines().find(|l| l.starts_with("flags")).unwrap();
    let flags: Vec<&str> = flags.split_whitespace().collect();
    let avx512 = [
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512vbmi",
        "avx512_vbmi2",
        "avx512_vnni",
        "popcnt",
    ];
    let sets = [
        ("avx2", &["avx2", "fma", "f16c", "popcnt", "bmi2"][..]),
        ("avx512", &avx512),
    ];
    for (name, needed) in sets {
        let expected = needed.iter().all(|f| flags.contains(f));
        let found = Kernels::available().iter().any(|k| k.name() == name);
        assert_eq!(found, expected, "{name}");
        if !expected {
            println!("skipped: the kernels {name}, which this processor cannot run");
        }
    }
}

/// The same on 64-bit ARM. An emulator reports the processor of its host: its caller knows
/// the expected last line.
#[cfg(all(target_os = "linux", target_arch = "aarch64"))]
#[test]
fn kernels_that_the_processor_can_run_are_available() {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let Set::Neon(kernels) = Kernels::best().0 else {
        panic!("every 64-bit ARM has NEON");
    };
    if let Some(features) = cpu.lines().find(|l| l.starts_with("Features")) {
        let expected = features.split_whitespace().any(|f| f == "asimddp");
        assert_eq!(kernels.has_sdot(), expected);
    }
    println!("dot products: {}", kernels.has_sdot());
}

#[test]
fn names_choose_kernels() {
    for kernels in Kernels::available() {
        assert_eq!(
            Kernels::by_name(kernels.name()).unwrap().name(),
            kernels.name()
        );
    }
    let e = Kernels::by_name("mmx").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Unsupported);
    assert!(e.to_string().contains("scalar"), "{e}");
}

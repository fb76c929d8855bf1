//! Rows of entries with every kernel of this machine,
//! compared with the reference and sums in f64.

use super::*;
use crate::codec::stored::StoredMatrix;
use crate::kernels::{Float, Kernels};
use crate::sparse::{MdCSRArrays, MdCSRMatrix};
use crate::test_data::{noise, signed};
use half::{bf16, f16};
use std::fmt::Debug;

/// Tolerance relative to the sum of the magnitudes of all products: 64 sums of up to 20
/// products. Measured: 3e-7.
const TOLERANCE: f64 = 2e-6;

/// Sizes around the edges of blocks.
const COLS: [usize; 11] = [1, 2, 63, 64, 65, 127, 128, 129, 300, 700, 1283];

/// Scales that round to zero, to subnormals and to infinities in 16 bits.
const SCALES: [f32; 8] = [
    0.0,
    1e-4,
    -1.5,
    1e-42,
    -1e-42,
    1e-11,
    1.8446744e19,
    -1.8446744e19,
];

/// Columns of rows of every kind.
///
/// Empty, full, one run, runs that start and end within blocks or between them, every other column,
/// arbitrary columns, wide gaps, and the last column alone.
fn rows(cols: usize) -> Vec<Vec<usize>> {
    let random = noise(cols, 1);
    let all = || 0..cols;
    let mut rows = vec![
        vec![],
        all().collect(),
        all().skip(1).collect(),
        all().take(cols - 1).collect(),
        all().filter(|c| c % 2 == 1).collect(),
        all().filter(|&c| random[c] < 128).collect(),
        all().filter(|&c| random[c] < 20).collect(),
        all().filter(|c| c % 300 == 299).collect(),
        all().filter(|c| c / 64 % 2 == 1).collect(),
        vec![cols - 1],
    ];
    for hole in [62, 63, 64, 65, 128] {
        rows.push(all().filter(|&c| c != hole).collect());
        rows.push(all().skip(7).take(hole).collect());
    }
    rows
}

/// Creates entries in these columns with arbitrary levels, including the largest; gaps above
/// 255 are bridged.
fn matrix(cols: usize, rows: &[Vec<usize>]) -> MdCSRMatrix {
    let (mut deltas, mut values, mut row_pointers) = (Vec::new(), Vec::new(), vec![0]);
    let levels = signed(noise(cols, 2));
    for columns in rows {
        let mut last = 0;
        for &column in columns {
            while column - last > 255 {
                deltas.push(255);
                values.push(0);
                last += 255;
            }
            deltas.push((column - last) as u8);
            values.push(if column % 50 == 3 {
                -128
            } else {
                levels[column]
            });
            last = column;
        }
        row_pointers.push(values.len() as u32);
    }
    let index = |(i, pair): (usize, &[u8; 2])| match i % 40 {
        0 => 9_999,
        _ => u16::from_le_bytes(*pair) % 10_000,
    };
    let random = noise(2 * values.len(), 3);
    let primes: Vec<u16> = random.as_chunks().0.iter().enumerate().map(index).collect();
    let scales = SCALES.iter().cycle().take(rows.len()).copied();
    let arrays = MdCSRArrays {
        values: values.into(),
        delta_indices: deltas.into(),
        row_pointers: row_pointers.into(),
        prime_indices: primes.into(),
        scales: scales.collect::<Vec<_>>().into(),
    };
    MdCSRMatrix::new(rows.len(), cols, arrays).unwrap()
}

/// Every row of every kind with every scale.
fn matrices() -> impl Iterator<Item = MdCSRMatrix> {
    COLS.into_iter().flat_map(|cols| {
        let mut rows = rows(cols);
        (0..SCALES.len()).map(move |_| {
            rows.rotate_left(1);
            matrix(cols, &rows)
        })
    })
}

fn fast() -> Vec<Kernels> {
    let all = Kernels::available().into_iter();
    all.filter(|k| k.is_integer()).collect()
}

#[test]
fn every_kernel_decodes_entries_as_the_reference_does() {
    for m in matrices() {
        let mut expected = vec![f32::NAN; m.rows() * m.cols()];
        m.decode_rows(0, &mut expected);
        for kernels in fast() {
            for (row, expected) in expected.chunks(m.cols()).enumerate() {
                let what = format!("{} row {row} of {} columns", kernels.name(), m.cols());
                let entries = m.entries(row).unwrap();
                check_decode(kernels, entries, expected, &what, f32::to_bits, f32::NAN);
                check_decode(kernels, entries, expected, &what, f16::to_bits, f16::NAN);
                check_decode(kernels, entries, expected, &what, bf16::to_bits, bf16::NAN);
            }
        }
    }
}

/// Checks for the same bits, independent of the previous content.
fn check_decode<T: Float, B: PartialEq + Debug>(
    kernels: Kernels,
    entries: Entries<'_>,
    weights: &[f32],
    what: &str,
    to_bits: impl Fn(T) -> B + Copy,
    before: T,
) {
    let mut expected = vec![T::default(); weights.len()];
    T::round(Kernels::scalar(), weights, &mut expected);
    let mut found = vec![before; weights.len()];
    kernels.decode_entries(entries, &mut found);
    let bits = |values: Vec<T>| values.into_iter().map(to_bits).collect::<Vec<_>>();
    let dtype = std::any::type_name::<T>();
    assert_eq!(bits(found), bits(expected), "{what} {dtype}");
}

#[test]
fn every_kernel_multiplies_entries_close_to_exact_sums() {
    for m in matrices() {
        let x: Vec<f32> = (0..m.cols()).map(|i| (i as f32 * 0.37).sin()).collect();
        for row in 0..m.rows() {
            let entries = m.entries(row).unwrap();
            let mut weights = vec![f32::NAN; m.cols()];
            m.decode_rows(row, &mut weights);
            // Columns without an entry must not be touched.
            let mut x = x.clone();
            let mut column = 0;
            let mut is_stored = vec![false; m.cols()];
            for delta in entries.deltas {
                column += usize::from(*delta);
                is_stored[column] = true;
            }
            let holes = x.iter_mut().zip(&is_stored).filter(|(_, stored)| !**stored);
            holes.for_each(|(x, _)| *x = f32::NAN);
            let pairs = weights.iter().zip(&x).zip(&is_stored);
            let products: Vec<f64> = pairs
                .filter(|(_, stored)| **stored)
                .map(|((&w, &x), _)| f64::from(w) * f64::from(x))
                .collect();
            let exact: f64 = products.iter().sum();
            let size: f64 = products.iter().map(|p| p.abs()).sum();
            // Products of the smallest scales are subnormal.
            let smallest = f64::from(f32::MIN_POSITIVE) * f64::from(f32::EPSILON);
            let room = TOLERANCE * size + products.len() as f64 * smallest;
            let fast = fast().into_iter();
            let all = fast.map(|kernels| (kernels.name(), kernels.dot_entries(entries, &x)));
            for (name, found) in all.chain([("plain", dot::<[f32; 16]>((), entries, &x))]) {
                let error = (f64::from(found) - exact).abs();
                assert!(
                    error <= room,
                    "{name} row {row} of {}: {found}, not {exact}",
                    m.cols()
                );
            }
        }
    }
}

//! Test matrices of every encoding at every edge.

use super::SparseKernel;
use crate::array::Array;
use crate::matrix::Matrix;
use crate::metal_kernels::Element;
use crate::prime_lut::PRIME_COUNT;
use crate::sparse::{MdCSRArrays, MdCSRMatrix};
use crate::test_data::{bitmap, grouped, noise, scales, trellis};

/// Matrix with a name.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) matrix: Matrix,
    pub(super) sparse: SparseKernel,
    /// Flag: the case tests its scales.
    has_scales: bool,
}

impl Case {
    pub(super) fn new(name: impl Into<String>, matrix: Matrix) -> Self {
        Self {
            name: name.into(),
            matrix,
            sparse: SparseKernel::default(),
            has_scales: false,
        }
    }

    /// Returns the matrix with scales of every size; for f16, scales that keep outputs in range.
    pub(super) fn scaled(&self, element: Element) -> Matrix {
        if self.has_scales {
            return self.matrix.clone();
        }
        let scale = |row: usize| {
            let sign = if row % 3 == 1 { -1.0 } else { 1.0 };
            let exponent = match element {
                Element::F32 => row as i32 * 7 % 90 - 60,
                Element::F16 => -16 - (row % 8) as i32,
            };
            if row % 16 == 15 {
                0.0
            } else {
                sign * 2f32.powi(exponent)
            }
        };
        let scales = (0..self.matrix.rows()).map(scale).collect();
        self.matrix.with_scales(scales).unwrap()
    }
}

/// Returns the size of a rotation in compressed files.
pub(super) fn hadamard(cols: usize) -> usize {
    1 << cols.ilog2()
}

/// Every packed encoding with random codes.
pub(super) fn packed(rows: usize, cols: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (group, nibbles) in [(32, false), (64, false), (32, true), (64, true)] {
        let name = format!("q{} of {group}", if nibbles { 4 } else { 8 });
        let matrix = Matrix::Grouped(grouped(rows, cols, group, nibbles));
        cases.push(Case::new(name, matrix));
    }
    for nibbles in [false, true] {
        let name = if nibbles { "s4" } else { "s8" };
        cases.push(Case::new(name, Matrix::Bitmap(bitmap(rows, cols, nibbles))));
    }
    for k in [2, 3, 4] {
        let matrix = Matrix::Trellis(trellis(rows, cols, k, hadamard(cols)));
        cases.push(Case::new(format!("t{k}"), matrix));
    }
    cases
}

/// One matrix for every kernel of `mdcsr`.
pub(super) fn every_sparse_kernel(name: &str, matrix: &MdCSRMatrix) -> Vec<Case> {
    let all = [
        ("row", SparseKernel::Row),
        ("row_shared", SparseKernel::RowShared),
        ("row_batch", SparseKernel::RowBatch),
        ("simd", SparseKernel::Simd),
    ];
    let case = |(kernel, sparse)| Case {
        name: format!("mdcsr_{kernel} {name}"),
        matrix: Matrix::MdCsr(matrix.clone()),
        sparse,
        has_scales: false,
    };
    all.into_iter().map(case).collect()
}

/// Rows of every kind: empty, full, with every gap up to 300 columns,
/// with only the last column.
pub(super) fn sparse(rows: usize, cols: usize) -> MdCSRMatrix {
    let mut arrays = (Vec::new(), Vec::new(), vec![0u32]);
    let (values, deltas, pointers) = (&mut arrays.0, &mut arrays.1, &mut arrays.2);
    let mut random = noise(rows * cols * 2, 20).into_iter();
    let mut byte = || usize::from(random.next().expect("enough"));
    for row in 0..rows {
        let columns: Vec<usize> = match row % 5 {
            0 => (0..cols).collect(),
            1 => Vec::new(),
            2 => vec![cols - 1],
            3 => (0..cols).filter(|_| byte() < 100).collect(),
            _ => {
                let next = |column: &usize| Some(column + 1 + byte() * 300 / 256);
                let all = std::iter::successors(Some(row % cols), next);
                all.take_while(|column| *column < cols).collect()
            }
        };
        let mut at = 0;
        for column in columns {
            while column - at > 255 {
                values.push(0);
                deltas.push(255);
                at += 255;
            }
            values.push((byte() as i8).max(-127) | 1);
            deltas.push((column - at) as u8);
            at = column;
        }
        pointers.push(values.len() as u32);
    }
    let primes = noise(values.len() * 2, 21);
    let prime = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) % PRIME_COUNT as u16;
    let primes: Vec<u16> = primes.as_chunks().0.iter().map(prime).collect();
    sparse_of(cols, arrays.0, arrays.1, arrays.2, primes, scales(rows))
}

/// More columns than 16 bits count.
pub(super) fn wide() -> MdCSRMatrix {
    let entries = 300;
    let (values, primes) = (vec![5; 2 * entries], vec![77; 2 * entries]);
    let pointers = vec![0, entries as u32, 2 * entries as u32];
    let scales = vec![1.0, -0.5].into();
    sparse_of(
        70_000,
        values,
        vec![233; 2 * entries],
        pointers,
        primes,
        scales,
    )
}

pub(super) fn sparse_of(
    cols: usize,
    values: Vec<i8>,
    deltas: Vec<u8>,
    pointers: Vec<u32>,
    primes: Vec<u16>,
    scales: Array<f32>,
) -> MdCSRMatrix {
    let arrays = MdCSRArrays {
        values: values.into(),
        delta_indices: deltas.into(),
        row_pointers: pointers.into(),
        prime_indices: primes.into(),
        scales,
    };
    MdCSRMatrix::new(arrays.scales.len(), cols, arrays).unwrap()
}

/// Packed encodings of every edge.
pub(super) fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    for rows in [1, 7, 64, 65] {
        for cols in [1, 63, 64, 65] {
            cases.extend(packed(rows, cols));
        }
    }
    cases.extend(packed(3, 5120));
    cases.extend(packed(130, 200));
    cases
}

/// So many rows that a threadgroup has fewer SIMD-groups.
pub(super) fn many_rows() -> Vec<Case> {
    let mut cases = packed(64 * 128 + 1, 3);
    cases.extend(packed(64 * 256, 2));
    cases
}

/// Cases of `mdcsr`: rows of every kind, without entries, and with a partial last block of
/// every length.
pub(super) fn sparse_rows() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols) in [
        (1, 1),
        (5, 63),
        (11, 64),
        (300, 65),
        (23, 5120),
        (9, 70_000),
    ] {
        cases.extend(every_sparse_kernel("", &sparse(rows, cols)));
    }
    cases.extend(every_sparse_kernel("wide", &wide()));
    let empty = sparse_of(9, vec![], vec![], vec![0; 4], vec![], vec![1.0; 3].into());
    cases.extend(every_sparse_kernel("empty", &empty));
    for entries in 1..=9 {
        let deltas = (0..entries).map(|i| u8::from(i > 0)).collect();
        let pointers = vec![0, 0, entries as u32, entries as u32];
        let (values, primes) = (vec![-3; entries], vec![9_999; entries]);
        let scales = vec![1.0, -0.5, 2.0].into();
        let matrix = sparse_of(9, values, deltas, pointers, primes, scales);
        cases.extend(every_sparse_kernel(&format!("of {entries}"), &matrix));
    }
    cases
}

/// The largest and smallest scales that a file may have, and only zeros.
pub(super) fn extremes() -> Vec<Case> {
    let (rows, cols) = (66, 130);
    let tiny = f32::from_bits(1);
    let largest = 2f32.powi(64);
    let scales = [
        largest,
        -largest,
        tiny,
        -tiny,
        f32::MIN_POSITIVE,
        0.0,
        -0.0,
        2f32.powi(-20),
    ];
    let scales: Vec<f32> = scales.into_iter().cycle().take(rows).collect();
    let mut cases = every_sparse_kernel("", &sparse(rows, cols));
    cases.extend(packed(rows, cols));
    let with = |case: &Case, name: &str, scales: &[f32]| Case {
        name: format!("{} of {name}", case.name),
        matrix: case.matrix.with_scales(scales.to_vec()).unwrap(),
        sparse: case.sparse,
        has_scales: true,
    };
    let extreme = cases
        .iter()
        .map(|case| with(case, "extreme scales", &scales));
    let zeros = cases.iter().map(|case| with(case, "zeros", &[0.0; 66]));
    extreme.chain(zeros).collect()
}

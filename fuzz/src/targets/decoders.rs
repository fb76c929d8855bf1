//! Target: matrices of any size and content in every encoding.
//!
//! All kernels of this machine are compared with the reference.

use std::sync::LazyLock;
use upg_kernel::Cpu;
use upg_kernel::kernels::Kernels;
use upg_kernel::matrix::strips::{self, STRIP_ROWS};
use upg_kernel::matrix::trellis::strip_bytes;
use upg_kernel::matrix::{
    BITMAP_GROUP, BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, TrellisMatrix, TrellisParts,
};
use upg_kernel::rotation::Rotation;
use upg_kernel::sparse::{MdCSRArrays, MdCSRMatrix};
use upg_kernel::{Array, Matrix, Result};

/// Tolerance relative to the sum of the magnitudes of all products.
///
/// Covers sums in another order, as in the tests of the kernels.
const TOLERANCE: f64 = 1e-5;

/// Step of integer products, which round activations to 14 bits: half a step of the largest
/// of 64.
const STEP: f64 = 1.0 / (1 << 13) as f64;

/// Largest weight that is compared; larger ones would make sums overflow.
const LARGEST_WEIGHT: f32 = 1e30;

pub fn run(data: &[u8]) {
    let Some((&[encoding, rows, low, high], content)) = data.split_first_chunk() else {
        return;
    };
    let rows = 1 + usize::from(rows) % 130;
    let cols = 1 + usize::from(u16::from_le_bytes([low, high])) % 700;
    match matrix(encoding, rows, cols, &mut Bytes(content)) {
        Ok(matrix) => check(&matrix),
        Err(e) => super::one_line(&e),
    }
}

/// Rest of an input, with zeros after its end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn take(&mut self, n: usize) -> Vec<u8> {
        let (now, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        let mut taken = now.to_vec();
        taken.resize(n, 0);
        taken
    }

    fn levels(&mut self, n: usize) -> Array<i8> {
        let levels = self.take(n).into_iter().map(|b| b as i8);
        levels.collect::<Vec<_>>().into()
    }

    fn words(&mut self, n: usize) -> Vec<u32> {
        let bytes = self.take(4 * n);
        let words = bytes.as_chunks().0.iter();
        words.map(|word| u32::from_le_bytes(*word)).collect()
    }

    /// Scales: half of them arbitrary bits, half of moderate size.
    fn scales(&mut self, n: usize) -> Array<f32> {
        let bits = self.words(n).into_iter();
        let scales = bits.map(|bits| match bits & 1 {
            0 => f32::from_bits(bits),
            _ => bits as f32 * 1e-9,
        });
        scales.collect::<Vec<_>>().into()
    }
}

fn matrix(encoding: u8, rows: usize, cols: usize, bytes: &mut Bytes<'_>) -> Result<Matrix> {
    let scales = bytes.scales(rows);
    match encoding % 8 {
        0 => sparse(rows, cols, scales, bytes).map(Matrix::MdCsr),
        1 => grouped(rows, cols, scales, false, bytes).map(Matrix::Grouped),
        2 => grouped(rows, cols, scales, true, bytes).map(Matrix::Grouped),
        3 => bitmap(rows, cols, scales, false, bytes).map(Matrix::Bitmap),
        4 => bitmap(rows, cols, scales, true, bytes).map(Matrix::Bitmap),
        k => trellis(rows, cols, k - 3, scales, bytes).map(Matrix::Trellis),
    }
}

/// Reads entries until a byte says that a row ends; invalid ones are refused.
fn sparse(
    rows: usize,
    cols: usize,
    scales: Array<f32>,
    bytes: &mut Bytes<'_>,
) -> Result<MdCSRMatrix> {
    let is_strict = bytes.take(1)[0] & 1 == 0;
    let (mut values, mut deltas, mut primes) = (Vec::new(), Vec::new(), Vec::new());
    let mut row_pointers = vec![0];
    for _ in 0..rows {
        let mut column = 0;
        while !bytes.0.is_empty() {
            let entry = bytes.take(4);
            // Only the first entry of a row may be in column 0.
            let is_first = row_pointers.last() == Some(&(values.len() as u32));
            let delta = match is_strict && !is_first {
                true => entry[0].max(1),
                false => entry[0],
            };
            column += usize::from(delta);
            if entry[3] & 0x80 != 0 || is_strict && column >= cols {
                break;
            }
            deltas.push(delta);
            values.push(entry[1] as i8);
            let prime = u16::from_le_bytes([entry[2], entry[3]]);
            primes.push(if is_strict { prime % 10_000 } else { prime });
        }
        row_pointers.push(values.len() as u32);
    }
    let arrays = MdCSRArrays {
        values: values.into(),
        delta_indices: deltas.into(),
        row_pointers: row_pointers.into(),
        prime_indices: primes.into(),
        scales,
    };
    MdCSRMatrix::new(rows, cols, arrays)
}

fn grouped(
    rows: usize,
    cols: usize,
    scales: Array<f32>,
    nibbles: bool,
    bytes: &mut Bytes<'_>,
) -> Result<GroupedMatrix> {
    let group = [32, 64][usize::from(bytes.take(1)[0] & 1)];
    let groups = strips::count(rows) * cols.div_ceil(group);
    let weights = groups * group * STRIP_ROWS;
    let codebook = bytes.levels(16);
    let prime_indices = bytes.take(groups * STRIP_ROWS).into();
    let levels = match nibbles {
        false => Levels::Bytes(bytes.levels(weights)),
        true => Levels::Nibbles {
            codes: bytes.take(weights / 2).into(),
            codebook,
        },
    };
    GroupedMatrix::new(rows, cols, group, levels, prime_indices, scales)
}

fn bitmap(
    rows: usize,
    cols: usize,
    scales: Array<f32>,
    nibbles: bool,
    bytes: &mut Bytes<'_>,
) -> Result<BitmapMatrix> {
    let is_strict = bytes.take(1)[0] & 1 == 0;
    let strips = strips::count(rows);
    let groups = strips * cols.div_ceil(BITMAP_GROUP);
    let codebook = bytes.levels(16);
    let words = groups * BITMAP_GROUP;
    let (mut bits, mut pointers, mut stored) = (Vec::new(), vec![0u32], 0);
    for i in 0..words {
        let mut word = u64::from_le_bytes(bytes.take(8).try_into().expect("eight bytes"));
        let (strip, in_strip) = (i / (words / strips), i % (words / strips));
        for bit in 0..64 {
            let row = strip * STRIP_ROWS + in_strip % 4 * 16 + bit / 4;
            let col = in_strip / 4 * 4 + bit % 4;
            if is_strict && (row >= rows || col >= cols) {
                word &= !(1 << bit);
            }
        }
        bits.extend(word.to_le_bytes());
        let n = word.count_ones();
        stored += if nibbles { n.div_ceil(2) } else { n };
        if (i + 1) % (words / strips) == 0 {
            pointers.push(stored);
        }
    }
    if !is_strict {
        pointers = bytes.words(strips + 1);
    }
    let levels = match nibbles {
        false => Levels::Bytes(bytes.levels(stored as usize)),
        true => Levels::Nibbles {
            codes: bytes.take(stored as usize).into(),
            codebook,
        },
    };
    let arrays = BitmapArrays {
        bitmap: bits.into(),
        levels,
        strip_pointers: pointers.into(),
        prime_indices: bytes.take(groups * STRIP_ROWS).into(),
        scales,
    };
    BitmapMatrix::new(rows, cols, arrays)
}

fn trellis(
    rows: usize,
    cols: usize,
    k: u8,
    scales: Array<f32>,
    bytes: &mut Bytes<'_>,
) -> Result<TrellisMatrix> {
    let k = k.clamp(2, 4);
    let hadamard = match bytes.take(1)[0] & 1 {
        0 => 1 << cols.ilog2(),
        _ => 1,
    };
    let signs = bytes.take(usize::div_ceil(hadamard, 8)).into();
    let prime_indices = bytes.take(rows).into();
    let size = strip_bytes(cols, k).expect("sizes of an input");
    let parts = TrellisParts {
        codes: bytes.take(strips::count(rows) * size).into(),
        prime_indices,
        scales,
        rotation: Rotation::new(cols, hadamard, signs)?,
    };
    TrellisMatrix::new(rows, cols, k, parts)
}

/// Compares rows and products of all kernels with those of the reference.
fn check(matrix: &Matrix) {
    let Some(expected) = check_rows(matrix) else {
        return;
    };
    if expected.iter().any(|w| w.abs() >= LARGEST_WEIGHT) {
        return run_products(matrix);
    }
    let cols = matrix.cols();
    let x = vectors(9 * cols);
    for cpu in devices() {
        for n in [1, 9] {
            check_product(matrix, cpu, &expected, &x[..n * cols], n);
        }
    }
}

/// Compares rows of all kernels with the reference,
/// and computes products without comparing them.
///
/// For files of many matrices.
pub(super) fn read(matrix: &Matrix) {
    if check_rows(matrix).is_some() {
        run_products(matrix);
    }
}

/// Returns a CPU device for each instruction set of this machine, with one thread.
///
/// Threads have their own tests.
fn devices() -> &'static [Cpu] {
    static DEVICES: LazyLock<Vec<Cpu>> = LazyLock::new(|| {
        let all = Kernels::available().into_iter();
        all.map(|kernels| Cpu::new(kernels, 1)).collect()
    });
    &DEVICES
}

/// Returns vectors of moderate size, including small elements.
fn vectors(len: usize) -> Vec<f32> {
    let value = |i: usize| (i * 7919 % 1009) as f32 / 504.5 - 1.0;
    let size = |i: usize| [1.0, 1e-4][i / 100 % 2];
    (0..len).map(|i| value(i) * size(i)).collect()
}

fn run_products(matrix: &Matrix) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let (x, mut out) = (vectors(9 * cols), vec![f32::NAN; 9 * rows]);
    for cpu in devices() {
        for n in [1, 9] {
            let product = matrix.spmm_on(cpu, &x[..n * cols], n, &mut out[..n * rows]);
            product.expect("vectors as long as rows");
        }
    }
}

/// Returns the weights, which must be bit-identical with all kernels; `None` if there are
/// none or too many.
fn check_rows(matrix: &Matrix) -> Option<Vec<f32>> {
    let weights = matrix.rows().checked_mul(matrix.cols());
    let weights = weights.filter(|n| (1..=2 * super::MOST_WEIGHTS).contains(n))?;
    let mut expected = vec![f32::NAN; weights];
    let decoded = matrix.rows_into_with(Kernels::scalar(), 0, &mut expected);
    decoded.expect("whole rows of the matrix");
    for kernels in Kernels::available() {
        let mut found = vec![f32::NAN; weights];
        let decoded = matrix.rows_into_with(kernels, 0, &mut found);
        decoded.expect("whole rows of the matrix");
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let is_same = found.to_bits() == expected.to_bits();
            let name = kernels.name();
            assert!(is_same, "{name}: weight {i} is {found}, not {expected}");
        }
    }
    Some(expected)
}

fn check_product(matrix: &Matrix, cpu: &Cpu, weights: &[f32], x: &[f32], n: usize) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut out = vec![f32::NAN; n * rows];
    let product = matrix.spmm_on(cpu, x, n, &mut out);
    product.expect("vectors as long as rows");
    // A rotated input has other groups. The largest element overall is at least as large,
    // up to the root.
    let is_rotated = matches!(matrix, Matrix::Trellis(_));
    for (v, (x, out)) in x.chunks(cols).zip(out.chunks(rows)).enumerate() {
        let length = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        for (row, (weights, &out)) in weights.chunks(cols).zip(out).enumerate() {
            let (mut exact, mut size, mut steps) = (0.0, 0.0, 0.0);
            for (weights, x) in weights.chunks(64).zip(x.chunks(64)) {
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (w, x) in weights.iter().zip(x) {
                    let product = f64::from(*w) * f64::from(*x);
                    exact += product;
                    size += product.abs();
                    steps += f64::from(w.abs()) * f64::from(largest);
                }
            }
            if is_rotated {
                // Cauchy-Schwarz in the rotated basis, where lengths are the same.
                let of_weights = weights
                    .iter()
                    .map(|w| f64::from(*w).powi(2))
                    .sum::<f64>()
                    .sqrt();
                size = size.max(of_weights * length);
                steps = of_weights * length * (cols as f64).sqrt();
            }
            let error = (f64::from(out) - exact).abs();
            let name = cpu.kernels().name();
            assert!(
                error <= TOLERANCE * size + STEP * steps + f64::from(f32::MIN_POSITIVE),
                "{name}: row {row} times vector {v} of {n} is {out}, not {exact}"
            );
        }
    }
}

//! Products of matrices that share their input, with one or several vectors.
#![forbid(unsafe_code)]

use super::Cpu;
use super::team::{Region, Tile, Tiles};
use crate::codec::stored::StoredMatrix;
use crate::codec::strips::STRIP_ROWS;
use crate::device::Write;
use crate::error::{Error, ErrorKind, Result};
use crate::kernels::activations::Activations;
use crate::kernels::views::Strip;
use crate::kernels::{Kernels, Panel, gemm, scalar};
use crate::matrix::Matrix;
use crate::matrix::decode::{Decode, Rows};
use std::cell::RefCell;
use std::ops::Range;

/// Minimum vectors for decoding levels once for all of them.
///
/// With SmolLM2 on two cores with AVX-512 the break-even was at 3 vectors for t3, and above 6 for
/// q4 and q8 (`upg eval FILE --text emma.txt --windows 1 --chunk N` with this constant at 2 and at
/// 1000, November 2026).
const MANY: usize = 8;

/// Minimum vectors for the blocked product instead of separate dot products.
const BLOCKED_VECTORS: usize = 4;

/// Tasks per thread with few strips and many vectors, so that others can take over the share
/// of a late thread.
const TASKS_PER_THREAD: usize = 8;

/// Minimum vectors of a task that decodes its own tile.
const SMALLEST_BAND: usize = 96;

/// Memory for the prepared input of a product, reused between products.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    rotated: Vec<f32>,
    vectors: Vec<Activations>,
}

impl Matrix {
    /// Returns `W x [rows]` for one vector `x [cols]`, accumulated in f32.
    ///
    /// Errors (`Argument`): `x` has another length.
    #[doc(alias = "matvec")]
    pub fn spmv(&self, x: &[f32]) -> Result<Vec<f32>> {
        self.spmm(x, 1)
    }

    /// Returns the products `[n, rows]` with `n` vectors `x [n, cols]`, accumulated in f32.
    ///
    /// Errors (`Argument`): `x` has another length.
    #[doc(alias = "matmul")]
    pub fn spmm(&self, x: &[f32], n: usize) -> Result<Vec<f32>> {
        let len = n.checked_mul(self.rows()).ok_or_else(|| {
            Error::new(
                ErrorKind::TooLarge,
                format!("{n} outputs of {} rows", self.rows()),
            )
        })?;
        let mut out = vec![0.0; len];
        self.spmm_into(x, n, &mut out)?;
        Ok(out)
    }

    /// Like [`Matrix::spmm`], into the caller's `out [n, rows]`; every element is overwritten.
    ///
    /// For few vectors, and with kernels for it ([`Kernels`]), packed weights are multiplied
    /// directly, with activations rounded to 14 bits, and `mdcsr` entry by entry in f32. Otherwise
    /// rows are decoded 64 at a time, once for all `n` vectors. `docs/numerics.md` has the error of
    /// each way. Works in parallel; the result does not depend on the number of threads. Scratch: 3
    /// bytes a column and vector, or 256 bytes a column and thread; 4 more a column and vector
    /// where the input is rotated.
    ///
    /// Errors: `Argument` if `x` or `out` has another length; those of [`Cpu::shared`].
    pub fn spmm_into(&self, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        self.spmm_on(Cpu::shared()?, x, n, out)
    }

    /// Like [`Matrix::spmm_into`], on a chosen device.
    ///
    /// `docs/numerics.md` says how far the results of kernels differ.
    pub fn spmm_on(&self, cpu: &Cpu, x: &[f32], n: usize, out: &mut [f32]) -> Result<()> {
        let scratch = &mut Scratch::default();
        multiply(cpu, [Some(self)], x, n, Write::Set, scratch, out)
    }
}

/// Memory of one thread for its current tile.
#[derive(Default)]
struct TileScratch {
    panel: Panel,
    weights: Vec<f32>,
    products: Vec<f32>,
}

thread_local! {
    static TILE: RefCell<TileScratch> = RefCell::default();
}

/// Multiplies all parts by `n` vectors `x [n, cols]`, side by side:
/// `out [n, rows of all parts]`.
///
/// `N` is the maximum number of parts. Tiles of up to 64 rows run in parallel. No sum is split, so
/// the result does not depend on the number of threads. Allocates only if `scratch` and the scratch
/// of the threads (260 bytes per column and 260 per vector) are too small. Errors: `Argument` if a
/// length does not match.
pub(crate) fn multiply<const N: usize>(
    cpu: &Cpu,
    parts: [Option<&Matrix>; N],
    x: &[f32],
    n: usize,
    write: Write,
    scratch: &mut Scratch,
    out: &mut [f32],
) -> Result<()> {
    let stored = parts.map(|part| part.map(Matrix::stored));
    let rows = stored.map(|part| part.map_or(0, StoredMatrix::rows));
    let Some(cols) = stored.iter().flatten().next().map(|part| part.cols()) else {
        return Ok(());
    };
    check(&stored, &rows, cols, x, n, out)?;
    if n == 0 || out.is_empty() {
        return Ok(());
    }
    if cols == 0 {
        if write == Write::Set {
            out.fill(0.0);
        }
        return Ok(());
    }
    let mut first = 0;
    while let Some(Some(part)) = stored.get(first) {
        let alike = stored[first..].iter().map_while(|p| *p);
        let count = alike.take_while(|other| same_input(*part, *other)).count();
        let parts = Parts {
            stored: &stored,
            rows: &rows,
            range: first..first + count,
        };
        parts.multiply(cpu, x, n, write, scratch, out);
        first += count;
    }
    Ok(())
}

fn check(
    stored: &[Option<&dyn StoredMatrix>],
    rows: &[usize],
    cols: usize,
    x: &[f32],
    n: usize,
    out: &[f32],
) -> Result<()> {
    let all = rows
        .iter()
        .try_fold(0usize, |sum, &rows| sum.checked_add(rows));
    let fits = Some(x.len()) == n.checked_mul(cols)
        && Some(out.len()) == all.and_then(|rows| rows.checked_mul(n))
        && stored.iter().flatten().all(|part| part.cols() == cols);
    if fits {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Argument,
        format!(
            "input of {} and output of {} values do not fit {n} products with {rows:?} rows of {cols}",
            x.len(),
            out.len()
        ),
    ))
}

/// Returns whether two matrices need their input prepared in the same way.
fn same_input(a: &dyn StoredMatrix, b: &dyn StoredMatrix) -> bool {
    is_packed(a) == is_packed(b) && a.rotation() == b.rotation()
}

/// Returns whether there are kernels for the packed weights.
fn is_packed(matrix: &dyn StoredMatrix) -> bool {
    matrix.strip(0).is_some()
}

/// Parts of a product that need the same input.
struct Parts<'a> {
    stored: &'a [Option<&'a dyn StoredMatrix>],
    rows: &'a [usize],
    range: Range<usize>,
}

impl Parts<'_> {
    fn multiply(
        &self,
        cpu: &Cpu,
        x: &[f32],
        n: usize,
        write: Write,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let kernels = cpu.kernels();
        let first = self.part(self.range.start);
        let Scratch { rotated, vectors } = scratch;
        let x = match first.rotation() {
            None => x,
            Some(rotation) => {
                rotated.clear();
                rotated.extend_from_slice(x);
                cpu.team().chunks(rotated, first.cols(), |_, x| {
                    kernels.rotate(rotation, x);
                });
                &*rotated
            }
        };
        let (is_packed, cols) = (is_packed(first), first.cols());
        if is_packed && kernels.is_integer() {
            quantize(cpu, x, cols, n, vectors);
            match n < MANY {
                true => self.multiply_packed(cpu, &vectors[..n], write, out),
                false => self.multiply_many(cpu, &vectors[..n], write, out),
            }
        } else {
            self.multiply_decoded(cpu, x, n, write, out);
        }
    }

    fn part(&self, index: usize) -> &dyn StoredMatrix {
        self.stored[index].expect("a part for every index of the range")
    }

    fn tiles(&self) -> Tiles<'_> {
        Tiles::new(self.rows, self.range.clone(), STRIP_ROWS)
    }

    fn strip(&self, tile: Tile) -> Strip<'_> {
        let strip = self.part(tile.part).strip(tile.first / STRIP_ROWS);
        strip.expect("a strip for all rows of a packed matrix")
    }

    /// Multiplies few vectors with kernels for packed weights.
    fn multiply_packed(&self, cpu: &Cpu, vectors: &[Activations], write: Write, out: &mut [f32]) {
        let (kernels, team) = (cpu.kernels(), cpu.team());
        team.tiles(out, vectors.len(), &self.tiles(), |tile, mut out| {
            let strip = self.strip(tile);
            let mut products = [0.0; STRIP_ROWS];
            let products = &mut products[..tile.rows];
            for (i, x) in vectors.iter().enumerate() {
                kernels.multiply(strip, x, products);
                put(products, write, out.row(i));
            }
        });
    }

    /// Multiplies many vectors with levels decoded once for all of them.
    fn multiply_many(&self, cpu: &Cpu, vectors: &[Activations], write: Write, out: &mut [f32]) {
        let (kernels, team) = (cpu.kernels(), cpu.team());
        let tiles = self.tiles();
        // With few tiles, the load is balanced better if a task is one tile with some
        // of the vectors.
        let wanted = (team.threads() * TASKS_PER_THREAD).div_ceil(tiles.count().max(1));
        let height = vectors.len().div_ceil(wanted).max(SMALLEST_BAND);
        team.tiles(out, height, &tiles, |tile, mut out| {
            let strip = self.strip(tile);
            let vectors = &vectors[out.rows()];
            TILE.with_borrow_mut(|scratch| {
                let products = kernels.multiply_many(strip, vectors, &mut scratch.panel);
                for (i, products) in out.rows().zip(products) {
                    put(&products[..tile.rows], write, out.row(i));
                }
            });
        });
    }

    /// Multiplies with weights decoded once for all vectors, or entry by entry for sparse tiles.
    fn multiply_decoded(&self, cpu: &Cpu, x: &[f32], n: usize, write: Write, out: &mut [f32]) {
        let kernels = cpu.kernels();
        let tiles = self.tiles();
        let multiply_tile = |tile: Tile, out: &mut Region<'_>, scratch: &mut TileScratch| {
            let part = self.part(tile.part);
            let cols = part.cols();
            scratch.products.resize(tile.rows * n, 0.0);
            if kernels.is_integer() && is_sparse(kernels, part, &tile, n) {
                multiply_entries(kernels, part, &tile, x, &mut scratch.products);
            } else {
                scratch.weights.resize(tile.rows * cols, 0.0);
                let rows = Rows {
                    stored: part,
                    // The input is already rotated.
                    rotation: None,
                    kernels,
                    first: tile.first,
                    streamed: false,
                    scratch: &mut Vec::new(),
                };
                f32::decode(rows, &mut scratch.weights);
                let multiply = match n < BLOCKED_VECTORS {
                    true => scalar::multiply,
                    false => gemm::multiply,
                };
                multiply(&scratch.weights, x, cols, &mut scratch.products);
            }
            for (i, products) in scratch.products.chunks_exact(tile.rows).enumerate() {
                put(products, write, out.row(i));
            }
        };
        cpu.team().tiles(out, n, &tiles, |tile, mut out| {
            TILE.with_borrow_mut(|scratch| multiply_tile(tile, &mut out, scratch));
        });
    }
}

/// Returns whether a tile times `n` vectors is faster entry by entry than with decoded rows.
///
/// The break-even was at as many multiplied entries as the tile has weights (with all, half and a
/// tenth of them stored at 1, 2 and 8 to 10 vectors), and without gathers at a fourth of that
/// (strips of 5,120 columns, AVX-512 and AVX2 on one Xeon, November 2026).
fn is_sparse(kernels: Kernels, part: &dyn StoredMatrix, tile: &Tile, n: usize) -> bool {
    // The kernels gather with i32 indices.
    if i32::try_from(part.cols()).is_err() {
        return false;
    }
    let entries = |row| part.entries(row).map(|entries| entries.values.len());
    let stored: Option<usize> = (tile.first..tile.first + tile.rows).map(entries).sum();
    let cost = if kernels.gathers_entries() { 1 } else { 4 };
    stored.is_some_and(|stored| stored.saturating_mul(n * cost) <= tile.rows * part.cols())
}

/// Multiplies the rows of a sparse tile by every vector, entry by entry: `out [n, rows]`.
fn multiply_entries(
    kernels: Kernels,
    part: &dyn StoredMatrix,
    tile: &Tile,
    x: &[f32],
    out: &mut [f32],
) {
    for row in 0..tile.rows {
        let entries = part.entries(tile.first + row);
        let entries = entries.expect("entries of every row where one has some");
        let vectors = x.chunks_exact(part.cols());
        for (x, out) in vectors.zip(out.chunks_exact_mut(tile.rows)) {
            out[row] = kernels.dot_entries(entries, x);
        }
    }
}

fn quantize(cpu: &Cpu, x: &[f32], cols: usize, n: usize, vectors: &mut Vec<Activations>) {
    if vectors.len() < n {
        vectors.resize_with(n, Activations::default);
    }
    let kernels = cpu.kernels();
    cpu.team().chunks(&mut vectors[..n], 1, |i, vector| {
        kernels.quantize(&x[i * cols..(i + 1) * cols], &mut vector[0]);
    });
}

fn put(products: &[f32], write: Write, out: &mut [f32]) {
    match write {
        Write::Set => out.copy_from_slice(products),
        Write::Add => {
            for (out, product) in out.iter_mut().zip(products) {
                *out += product;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{DenseMatrix, DenseValues, TrellisMatrix, TrellisParts};
    use crate::rotation::Rotation;
    use crate::sparse::MdCSRMatrix;
    use crate::test_data::{grouped, noise, trellis};

    /// Tolerance relative to the sum of the magnitudes of all products.
    ///
    /// Covers half a step of activations (1/16,254 of the largest of 64 neighbours) and f32 sums.
    const TOLERANCE: f64 = 1e-4;

    fn dense(rows: usize, cols: usize) -> Matrix {
        let value = |i: usize| (i * 7919 % 1009) as f32 / 504.5 - 1.0;
        let values = DenseValues::F32((0..rows * cols).map(value).collect::<Vec<_>>().into());
        Matrix::Dense(DenseMatrix::new(rows, cols, values).unwrap())
    }

    fn q8(rows: usize, cols: usize) -> Matrix {
        let matrix = Matrix::Grouped(grouped(rows, cols, 64, false));
        matrix.with_scales(vec![1e-5; rows]).unwrap()
    }

    /// Creates a `t3` matrix; `seed` is the seed of the signs.
    fn t3(rows: usize, cols: usize, seed: u64) -> Matrix {
        let size = 1 << cols.ilog2();
        let signs = noise(usize::div_ceil(size, 8), seed).into();
        let parts = TrellisParts {
            scales: vec![1e-5; rows].into(),
            rotation: Rotation::new(cols, size, signs).unwrap(),
            ..trellis(rows, cols, 3, size).parts().clone()
        };
        Matrix::Trellis(TrellisMatrix::new(rows, cols, 3, parts).unwrap())
    }

    /// Creates a matrix with weights in every `step`-th column.
    fn mdcsr(rows: usize, cols: usize, step: usize) -> Matrix {
        let value = |i: usize| match i % cols % step {
            0 => (i * 7919 % 1009) as f32 / 504.5 - 1.0,
            _ => 0.0,
        };
        let weights: Vec<f32> = (0..rows * cols).map(value).collect();
        Matrix::MdCsr(MdCSRMatrix::from_dense(&weights, rows, cols).unwrap())
    }

    /// Parts with equal and with different input preparation, in every way of multiplying.
    #[test]
    fn parts_of_any_encoding_stand_side_by_side() {
        let cols = 200;
        let joints = [
            [Some(q8(70, cols)), Some(q8(3, cols)), Some(q8(64, cols))],
            [
                Some(t3(70, cols, 7)),
                Some(t3(65, cols, 7)),
                Some(t3(1, cols, 8)),
            ],
            [
                Some(dense(5, cols)),
                Some(q8(130, cols)),
                Some(t3(66, cols, 7)),
            ],
            [Some(t3(66, cols, 7)), None, None],
            [
                Some(mdcsr(66, cols, 1)),
                Some(dense(5, cols)),
                Some(mdcsr(70, cols, 40)),
            ],
        ];
        let cpu = Cpu::shared().unwrap();
        let mut scratch = Scratch::default();
        for parts in &joints {
            let width: usize = parts.iter().flatten().map(Matrix::rows).sum();
            let weights: Vec<f32> = parts.iter().flatten().flat_map(Matrix::to_dense).collect();
            for n in [1, 2, MANY, 41, 2 * SMALLEST_BAND + 7] {
                let x: Vec<f32> = (0..n * cols).map(|i| (i as f32 * 0.7).sin()).collect();
                let mut out = vec![0.5; n * width];
                let parts: [_; 3] = std::array::from_fn(|i| parts[i].as_ref());
                multiply(cpu, parts, &x, n, Write::Set, &mut scratch, &mut out).unwrap();
                let set = out.clone();
                multiply(cpu, parts, &x, n, Write::Add, &mut scratch, &mut out).unwrap();
                for (i, (x, out)) in x.chunks(cols).zip(set.chunks(width)).enumerate() {
                    for (row, found) in weights.chunks(cols).zip(out) {
                        let products = || {
                            let pairs = row.iter().zip(x);
                            pairs.map(|(&w, &x)| f64::from(w) * f64::from(x))
                        };
                        let size: f64 = products().map(f64::abs).sum();
                        let error = (f64::from(*found) - products().sum::<f64>()).abs();
                        assert!(error <= TOLERANCE * size, "vector {i} of {n}: {found}");
                    }
                }
                assert!(
                    out.iter()
                        .zip(&set)
                        .all(|(twice, once)| *twice == once + once)
                );
            }
        }
    }

    /// A sequence in a batch gets the same result as alone.
    #[test]
    fn packed_products_with_many_vectors_are_those_with_one() {
        let (cpu, cols) = (Cpu::shared().unwrap(), 200);
        for matrix in [q8(130, cols), t3(130, cols, 7)] {
            let rows = matrix.rows();
            let mut scratch = Scratch::default();
            let mut product = |x: &[f32], n: usize| {
                let mut out = vec![0.0; n * rows];
                let parts = [Some(&matrix)];
                multiply(cpu, parts, x, n, Write::Set, &mut scratch, &mut out).unwrap();
                out
            };
            let n = 39;
            let x: Vec<f32> = (0..n * cols).map(|i| (i as f32 * 0.7).sin()).collect();
            let one_by_one: Vec<f32> = x.chunks(cols).flat_map(|x| product(x, 1)).collect();
            for n in [2, MANY - 1, MANY, n] {
                let found = product(&x[..n * cols], n);
                assert!(found == one_by_one[..n * rows], "{n} vectors");
            }
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let cpu = Cpu::shared().unwrap();
        let (a, b) = (q8(2, 3), q8(1, 4));
        let mut scratch = Scratch::default();
        let mut refused = |parts: [Option<&Matrix>; 2], x: usize, n: usize, out: usize| {
            let (x, mut out) = (vec![0.0; x], vec![0.0; out]);
            let result = multiply(cpu, parts, &x, n, Write::Set, &mut scratch, &mut out);
            result.is_err_and(|e| e.kind() == ErrorKind::Argument)
        };
        assert!(!refused([Some(&a), None], 3, 1, 2));
        assert!(refused([Some(&a), Some(&b)], 3, 1, 3));
        assert!(refused([Some(&a), None], 4, 1, 2));
        assert!(refused([Some(&a), None], 3, 1, 3));
        assert!(refused([Some(&a), None], 3, usize::MAX, 2));
        // No vectors, and no columns.
        assert!(!refused([Some(&a), None], 0, 0, 0));
        assert!(!refused([Some(&dense(2, 0)), None], 0, 3, 6));
    }
}

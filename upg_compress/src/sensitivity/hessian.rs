//! Hessian `X^T X` of the inputs of a matrix, and the error feedback that follows from it.
//!
//! A layer multiplies `W` by inputs `x`. Rounding to `Q` changes its outputs by `(Q - W) x`, whose
//! squares add up to `tr((Q - W) H (Q - W)^T)` with `H = X^T X`. Columns are rounded one at a time,
//! and later ones compensate the errors of earlier ones. Sources: GPTQ (arXiv 2210.17323), and LDLQ
//! of QuIP (arXiv 2307.13304), which is equivalent. With `H = (A + 1) D (A + 1)^T`, `A` strictly
//! upper triangular and `D` diagonal, the best target of column `k` is
//! `w_k + sum over j < k of (w_j - q_j) A[j][k]`, and the remaining cost is
//! `D[k][k] * (target - q_k)^2`.
#![forbid(unsafe_code)]

use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::solvers::Llt;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use rayon::prelude::*;
use std::ops::Range;
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::rotation::Rotation;
use upg_kernel::{Error, ErrorKind, Result};

/// Damping relative to the average of the diagonal, as in GPTQ.
///
/// Without it the directions that no input had would cost nothing,
/// and errors would be pushed there.
const DAMPING: f64 = 0.01;

/// Number of attempts, each with ten times the damping, to get a positive definite matrix.
const ATTEMPTS: i32 = 4;

/// `X^T X` of the added inputs, symmetric `[cols, cols]`.
#[derive(Debug, Clone)]
pub struct Hessian {
    /// Lower triangle including the diagonal; the rest is undefined.
    sums: Mat<f32>,
    /// Number of inputs added.
    count: usize,
}

impl Hessian {
    /// Creates the Hessian of no inputs of `cols` values. Memory: `4 * cols * cols` bytes.
    pub fn new(cols: usize) -> Self {
        Self {
            sums: Mat::zeros(cols, cols),
            count: 0,
        }
    }

    /// Returns the number of values of an input.
    pub fn cols(&self) -> usize {
        self.sums.nrows()
    }

    /// Returns the number of inputs added so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Adds inputs `x [n, cols]`. Cost: `n * cols * cols / 2` multiplications, on all threads.
    ///
    /// Errors: `Shape` if `x` is not whole inputs; `Invalid` for values that are not finite.
    pub fn add(&mut self, x: &[f32]) -> Result<()> {
        let cols = self.cols();
        if cols == 0 || !x.len().is_multiple_of(cols) {
            let message = format!("{} values as inputs of {cols}", x.len());
            return Err(Error::new(ErrorKind::Shape, message));
        }
        if let Some(i) = x.iter().position(|x| !x.is_finite()) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("an input of the layer is {} in column {}", x[i], i % cols),
            )
            .hint("the weights of the model give no finite numbers for the calibration text"));
        }
        let n = x.len() / cols;
        let x = MatRef::from_row_major_slice(x, n, cols);
        triangular::matmul(
            self.sums.as_mut(),
            BlockStructure::TriangularLower,
            Accum::Add,
            x.transpose(),
            BlockStructure::Rectangular,
            x,
            BlockStructure::Rectangular,
            1.0,
            Par::rayon(0),
        );
        self.count += n;
        Ok(())
    }

    /// Returns the Hessian of the rotated inputs `R x`: `R H R^T`.
    pub fn rotated(&self, rotation: &Rotation) -> Self {
        let mut sums = self.symmetric();
        for _ in 0..2 {
            let columns = sums.par_col_iter_mut();
            columns.for_each(|column| {
                let column = column.try_as_col_major_mut().expect("columns of a matrix");
                rotation.apply(column.as_slice_mut());
            });
            sums = sums.transpose().to_owned();
        }
        Self {
            sums,
            count: self.count,
        }
    }

    /// Checks that its inputs have `cols` values.
    ///
    /// Errors (`Shape`): they have another number.
    pub fn check(&self, cols: usize) -> Result<()> {
        if self.cols() == cols {
            return Ok(());
        }
        let message = format!(
            "a Hessian of {} columns, the matrix has {cols}",
            self.cols()
        );
        Err(Error::new(ErrorKind::Shape, message))
    }

    /// Returns the columns ordered by the squares of their inputs, largest first.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.cols()).collect();
        order.sort_by(|&a, &b| self.sums[(b, b)].total_cmp(&self.sums[(a, a)]));
        order
    }

    /// Returns the Hessian with its columns in another order: column `k` is the old `order[k]`.
    pub fn reordered(&self, order: &[usize]) -> Self {
        let at = |i: usize, j: usize| self.sums[(i.max(j), i.min(j))];
        Self {
            sums: Mat::from_fn(order.len(), order.len(), |i, j| at(order[i], order[j])),
            count: self.count,
        }
    }

    /// Returns `tr(E H E^T)` for errors `E [rows, cols]`.
    ///
    /// Cost: `rows * cols * cols / 2` multiplications, on all threads. Panics for a length that is
    /// not whole rows.
    pub fn cost(&self, errors: &[f32]) -> f64 {
        let strips = errors.par_chunks(STRIP_ROWS * self.cols().max(1));
        // Summed in order, so that the number of threads does not change the result.
        let costs: Vec<f64> = strips.map(|strip| self.cost_of_strip(strip)).collect();
        costs.iter().sum()
    }

    fn cost_of_strip(&self, errors: &[f32]) -> f64 {
        let cols = self.cols();
        let errors = MatRef::from_row_major_slice(errors, errors.len() / cols.max(1), cols);
        let mut product = Mat::<f32>::zeros(errors.nrows(), cols);
        triangular::matmul(
            product.as_mut(),
            BlockStructure::Rectangular,
            Accum::Replace,
            errors,
            BlockStructure::Rectangular,
            self.sums.as_ref(),
            BlockStructure::TriangularLower,
            1.0,
            Par::Seq,
        );
        let pairs = (0..errors.nrows()).flat_map(|i| (0..cols).map(move |j| (i, j)));
        pairs
            .map(|(i, j)| {
                let (error, below) = (f64::from(errors[(i, j)]), f64::from(product[(i, j)]));
                // The upper triangle mirrors the lower one.
                error * (2.0 * below - f64::from(self.sums[(j, j)]) * error)
            })
            .sum()
    }

    /// Returns `tr(O E H E^T)` for errors `E [rows, cols]`,
    /// where `O` is this Hessian of the outputs.
    ///
    /// `inputs` is `H`, symmetric. Panics for another length.
    pub(crate) fn product(&self, inputs: &Mat<f32>, errors: &[f32]) -> f64 {
        let errors = MatRef::from_row_major_slice(errors, self.cols(), inputs.ncols());
        let weighed = self.symmetric() * (errors * inputs);
        sum_of_products(&weighed, errors)
    }

    /// Returns the sum of the diagonal.
    pub(crate) fn trace(&self) -> f64 {
        (0..self.cols()).map(|i| f64::from(self.sums[(i, i)])).sum()
    }

    pub(crate) fn symmetric(&self) -> Mat<f32> {
        Mat::from_fn(self.cols(), self.cols(), |i, j| {
            self.sums[(i.max(j), i.min(j))]
        })
    }
}

/// Returns the sum of products of the elements of two matrices of the same size.
fn sum_of_products(a: &Mat<f32>, b: MatRef<'_, f32>) -> f64 {
    let pairs = (0..a.nrows()).flat_map(|i| (0..a.ncols()).map(move |j| (i, j)));
    pairs
        .map(|(i, j)| f64::from(a[(i, j)]) * f64::from(b[(i, j)]))
        .sum()
}

/// Error feedback: the effect of earlier errors on the targets of later columns, `block`
/// columns at a time.
#[derive(Debug, Clone)]
pub struct Feedback {
    /// Shares `[j][k]` for a column `j` in a block before that of `k`; elsewhere 0.
    shares: Mat<f32>,
    /// Cost of a squared error of each column if all later ones compensate it; 1 on average.
    ///
    /// Columns of the same block do not compensate, but counting them as if they did measured
    /// better than the cost of an error within the block.
    costs: Vec<f32>,
    /// Average cost that was scaled to 1.
    average_cost: f64,
    /// Symmetric and damped Hessian.
    ///
    /// Without damping one column of large inputs would set the scale of a whole row.
    hessian: Mat<f32>,
}

impl Feedback {
    /// Computes the feedback for blocks of `block` columns; the last one may have fewer.
    ///
    /// Cost: `cols^3 / 6` multiplications in f64. Memory: `8 * cols * cols` bytes, and
    /// `16 * cols * cols` more during the call.
    ///
    /// Errors: `Argument` for a block of 0; `Invalid` if the Hessian is not positive definite with
    /// any damping.
    pub fn new(hessian: &Hessian, block: usize) -> Result<Self> {
        Self::with_damping(hessian, block, DAMPING)
    }

    /// Computes the feedback like [`Feedback::new`], with another damping.
    pub(crate) fn with_damping(hessian: &Hessian, block: usize, damping: f64) -> Result<Self> {
        if block == 0 {
            return Err(Error::new(ErrorKind::Argument, "blocks of 0 columns"));
        }
        let cols = hessian.cols();
        let (upper, damping) = cholesky(hessian, damping)?;
        let diagonal = |k: usize| upper[(k, k)];
        // Unit upper triangular: `H = U D U^T`.
        let unit = |j: usize, k: usize| match j <= k {
            true => upper[(j, k)] / diagonal(k),
            false => 0.0,
        };
        let mut shares = Mat::zeros(cols, cols);
        let mut costs = vec![0.0; cols];
        for start in (0..cols).step_by(block) {
            let columns = start..cols.min(start + block);
            for k in columns.clone() {
                costs[k] = diagonal(k).powi(2);
            }
            // Rows of `U` before the block, times the inverse of its square on the diagonal, column
            // by column.
            for j in 0..start {
                let mut row: Vec<f64> = columns.clone().map(|k| unit(j, k)).collect();
                for k in columns.clone() {
                    let value = row[k - start];
                    shares[(j, k)] = value as f32;
                    for later in k + 1..columns.end {
                        row[later - start] -= value * unit(k, later);
                    }
                }
            }
        }
        let mut damped = hessian.symmetric();
        for i in 0..cols {
            damped[(i, i)] += damping as f32;
        }
        let average = costs.iter().sum::<f64>() / cols.max(1) as f64;
        let costs = costs.iter().map(|cost| (cost / average) as f32).collect();
        Ok(Self {
            shares,
            costs,
            average_cost: average,
            hessian: damped,
        })
    }

    /// Adds the feedback of the errors of the columns `from` to the targets
    /// of the later columns `to`.
    ///
    /// Both are [`STRIP_ROWS`] rows, column by column.
    pub(crate) fn spread(
        &self,
        errors: &[f32],
        from: Range<usize>,
        wanted: &mut [f32],
        to: Range<usize>,
    ) {
        if from.is_empty() || to.is_empty() {
            return;
        }
        let values = |columns: &Range<usize>| columns.start * STRIP_ROWS..columns.end * STRIP_ROWS;
        matmul(
            MatMut::from_column_major_slice_mut(&mut wanted[values(&to)], STRIP_ROWS, to.len()),
            Accum::Add,
            MatRef::from_column_major_slice(&errors[values(&from)], STRIP_ROWS, from.len()),
            self.shares
                .submatrix(from.start, to.start, from.len(), to.len()),
            1.0,
            Par::Seq,
        );
    }

    /// Returns the share of the error of column `j` that is added to the target of column `k`.
    pub(crate) fn share(&self, j: usize, k: usize) -> f32 {
        self.shares[(j, k)]
    }

    /// Adds the feedback of the errors `[first, cols]` of all earlier rows to the targets
    /// `wanted [n, cols]` of rows.
    ///
    /// Here the Hessian is that of outputs. The layout is row by row.
    pub(crate) fn carry(&self, errors: &[f32], cols: usize, wanted: &mut [f32]) {
        let (first, n) = (errors.len() / cols, wanted.len() / cols);
        if first == 0 {
            return;
        }
        matmul(
            MatMut::from_row_major_slice_mut(wanted, n, cols),
            Accum::Add,
            self.shares.submatrix(0, first, first, n).transpose(),
            MatRef::from_row_major_slice(errors, first, cols),
            1.0,
            Par::Seq,
        );
    }

    /// Returns for each of [`STRIP_ROWS`] rows the scale of `values` that approximates `weights`
    /// at the least cost.
    ///
    /// Both are column by column. `None` if any scale is equally good.
    pub(crate) fn scales_of_rows(
        &self,
        weights: &[f32],
        values: &[f32],
    ) -> [Option<f64>; STRIP_ROWS] {
        let cols = self.costs.len();
        let mut weighed = vec![0.0f32; values.len()];
        matmul(
            MatMut::from_column_major_slice_mut(&mut weighed, STRIP_ROWS, cols),
            Accum::Replace,
            MatRef::from_column_major_slice(values, STRIP_ROWS, cols),
            self.hessian.as_ref(),
            1.0,
            Par::Seq,
        );
        std::array::from_fn(|row| {
            let (mut along, mut squares) = (0.0, 0.0);
            for i in (row..values.len()).step_by(STRIP_ROWS) {
                let weighed = f64::from(weighed[i]);
                along += f64::from(weights[i]) * weighed;
                squares += f64::from(values[i]) * weighed;
            }
            // NaN stays NaN, for the checks of the file.
            match squares > 0.0 || squares.is_nan() {
                true if along < 0.0 => Some(0.0),
                true => Some(along / squares),
                false => None,
            }
        })
    }

    /// Returns the costs of a squared error of each column, in units of the average.
    pub(crate) fn costs(&self) -> &[f32] {
        &self.costs
    }

    /// Returns the average cost of a squared error.
    pub(crate) fn average_cost(&self) -> f64 {
        self.average_cost
    }
}

/// Returns the upper triangular `U` of the damped `H = U U^T`, and the damping that was added
/// to the diagonal.
///
/// The damping is `part` of the average of the diagonal, or more.
fn cholesky(hessian: &Hessian, part: f64) -> Result<(Mat<f64>, f64)> {
    let cols = hessian.cols();
    let diagonal = (0..cols).map(|i| f64::from(hessian.sums[(i, i)]));
    let average = diagonal.sum::<f64>() / cols.max(1) as f64;
    // All-zero inputs determine nothing: every column then counts the same.
    let average = if average > 0.0 { average } else { 1.0 };
    for attempt in 0..ATTEMPTS {
        let damping = part * 10f64.powi(attempt) * average;
        // Columns are reversed: a lower triangular factor
        // of the reversed matrix is an upper one in order.
        let reversed = Mat::from_fn(cols, cols, |i, j| {
            let (i, j) = (cols - 1 - i, cols - 1 - j);
            let value = f64::from(hessian.sums[(i.max(j), i.min(j))]);
            value + if i == j { damping } else { 0.0 }
        });
        let found = Llt::new(reversed.as_ref(), Side::Lower);
        drop(reversed);
        if let Ok(lower) = found {
            let lower = lower.L();
            let upper = Mat::from_fn(cols, cols, |i, j| match i <= j {
                true => lower[(cols - 1 - i, cols - 1 - j)],
                false => 0.0,
            });
            return Ok((upper, damping));
        }
    }
    Err(Error::new(
        ErrorKind::Invalid,
        "the inputs of the layer have no usable Hessian",
    ))
}

#[cfg(test)]
mod tests;

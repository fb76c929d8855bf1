//! What rounding errors of a matrix cost: the Hessian `X^T X` of its inputs, and feedback of errors from it.
//!
//! A layer multiplies `W` with inputs `x`; rounding to `Q` changes its outputs by `(Q - W) x`, whose squares add up to
//! `tr((Q - W) H (Q - W)^T)` with `H = X^T X`. Where columns are rounded one after the other, later ones can make up
//! for the errors of earlier ones. Sources: GPTQ (arXiv 2210.17323), and LDLQ of QuIP (arXiv 2307.13304), which is the
//! same: with `H = (A + 1) D (A + 1)^T`, `A` strictly upper triangular and `D` diagonal, the best target of column `k` is
//! `w_k + sum over j < k of (w_j - q_j) A[j][k]`, and what is left costs `D[k][k] * (target - q_k)^2`.
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

/// What is added to the diagonal, as a part of its average: without it the directions that no input had would be
/// free, and errors would be pushed there. That of GPTQ.
const DAMPING: f64 = 0.01;

/// How often the damping is made ten times larger where a matrix is still not positive definite.
const ATTEMPTS: i32 = 4;

/// `X^T X` of the inputs that were added, symmetric `[cols, cols]`.
#[derive(Debug, Clone)]
pub struct Hessian {
    /// The lower triangle, diagonal included; the rest is not defined.
    sums: Mat<f32>,
    /// Inputs added.
    count: usize,
}

impl Hessian {
    /// Of no inputs of `cols` values. Memory: `4 * cols * cols` bytes.
    pub fn new(cols: usize) -> Self {
        Self {
            sums: Mat::zeros(cols, cols),
            count: 0,
        }
    }

    /// Values of an input.
    pub fn cols(&self) -> usize {
        self.sums.nrows()
    }

    /// Inputs added so far.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Adds inputs `x [n, cols]`. Cost: `n * cols * cols / 2` multiplications, on all threads.
    ///
    /// Errors: `Shape` if these are not whole inputs; `Invalid` for values that are not finite.
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

    /// That of the rotated inputs `R x`: `R H R^T`.
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

    /// Errors (`Shape`): it is of inputs of other than `cols` values.
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

    /// The columns from the one that counts most to the one that counts least: that with the largest squares of
    /// inputs first.
    pub fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.cols()).collect();
        order.sort_by(|&a, &b| self.sums[(b, b)].total_cmp(&self.sums[(a, a)]));
        order
    }

    /// That of the inputs with their values in another order: value `k` is what was value `order[k]`.
    pub fn reordered(&self, order: &[usize]) -> Self {
        let at = |i: usize, j: usize| self.sums[(i.max(j), i.min(j))];
        Self {
            sums: Mat::from_fn(order.len(), order.len(), |i, j| at(order[i], order[j])),
            count: self.count,
        }
    }

    /// `tr(E H E^T)` for errors `E [rows, cols]`. Cost: `rows * cols * cols / 2` multiplications, on all threads.
    /// Panics for a length that is not whole rows.
    pub fn cost(&self, errors: &[f32]) -> f64 {
        let strips = errors.par_chunks(STRIP_ROWS * self.cols().max(1));
        // Added up in their order: the same for any number of threads.
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
                // The upper triangle is that below over again, but for the diagonal.
                error * (2.0 * below - f64::from(self.sums[(j, j)]) * error)
            })
            .sum()
    }

    /// `tr(O E H E^T)` for errors `E [rows, cols]` of a matrix with inputs of `H`, symmetric, and outputs of this, `O`. Panics for another
    /// length.
    pub(crate) fn product(&self, inputs: &Mat<f32>, errors: &[f32]) -> f64 {
        let errors = MatRef::from_row_major_slice(errors, self.cols(), inputs.ncols());
        let weighed = self.symmetric() * (errors * inputs);
        sum_of_products(&weighed, errors)
    }

    /// The sum of the diagonal.
    pub(crate) fn trace(&self) -> f64 {
        (0..self.cols()).map(|i| f64::from(self.sums[(i, i)])).sum()
    }

    pub(crate) fn symmetric(&self) -> Mat<f32> {
        Mat::from_fn(self.cols(), self.cols(), |i, j| {
            self.sums[(i.max(j), i.min(j))]
        })
    }
}

/// Of the elements of two matrices of the same size.
fn sum_of_products(a: &Mat<f32>, b: MatRef<'_, f32>) -> f64 {
    let pairs = (0..a.nrows()).flat_map(|i| (0..a.ncols()).map(move |j| (i, j)));
    pairs
        .map(|(i, j)| f64::from(a[(i, j)]) * f64::from(b[(i, j)]))
        .sum()
}

/// How errors of the columns before change the targets of the columns that are rounded next, `block` columns at a time.
#[derive(Debug, Clone)]
pub struct Feedback {
    /// `[j][k]` for a column `j` of a block before that of `k`; elsewhere 0.
    shares: Mat<f32>,
    /// What a squared error of each column costs if all later ones make up for it; 1 on average. Columns of the same
    /// block do not, but counting them as if they did measured better than what an error costs within the block.
    costs: Vec<f32>,
    /// What was 1 there.
    average_cost: f64,
    /// Symmetric and damped: without damping one column of large inputs would set the scale of a whole row.
    hessian: Mat<f32>,
}

impl Feedback {
    /// For blocks of `block` columns; the last one may have fewer. Cost: `cols^3 / 6` multiplications in f64;
    /// memory: `8 * cols * cols` bytes, and `16 * cols * cols` more meanwhile.
    ///
    /// Errors: `Argument` for a block of 0; `Invalid` if the Hessian is not positive definite, however it is damped.
    pub fn new(hessian: &Hessian, block: usize) -> Result<Self> {
        Self::with_damping(hessian, block, DAMPING)
    }

    /// [`Feedback::new`] with another part of the average of the diagonal added to it.
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
            // Rows of `U` before the block, times the inverse of its square on the diagonal, column by column.
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

    /// Adds to what is wanted of the columns `to` what the errors of the columns `from` before them ask for: both are
    /// [`STRIP_ROWS`] rows, column by column.
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

    /// What the error of column `j` adds to the target of column `k`.
    pub(crate) fn share(&self, j: usize, k: usize) -> f32 {
        self.shares[(j, k)]
    }

    /// Adds to what is `wanted [n, cols]` of rows what the errors `[first, cols]` of all rows before them ask for: here the
    /// values of the Hessian are those of outputs. Row by row.
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

    /// For each of [`STRIP_ROWS`] rows the scale of `values` with which they cost least in the place of `weights`;
    /// both are column by column. `None` where any scale would do.
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
            // What is not a number stays that, for the checks of the file.
            match squares > 0.0 || squares.is_nan() {
                true if along < 0.0 => Some(0.0),
                true => Some(along / squares),
                false => None,
            }
        })
    }

    /// What a squared error of each column costs, in units of the average.
    pub(crate) fn costs(&self) -> &[f32] {
        &self.costs
    }

    /// That average.
    pub(crate) fn average_cost(&self) -> f64 {
        self.average_cost
    }
}

/// The upper triangular `U` of `H = U U^T` with `H` damped by this part of the average of its diagonal or more, and what was
/// added to that.
fn cholesky(hessian: &Hessian, part: f64) -> Result<(Mat<f64>, f64)> {
    let cols = hessian.cols();
    let diagonal = (0..cols).map(|i| f64::from(hessian.sums[(i, i)]));
    let average = diagonal.sum::<f64>() / cols.max(1) as f64;
    // Inputs that are all zero say nothing: every column counts the same then.
    let average = if average > 0.0 { average } else { 1.0 };
    for attempt in 0..ATTEMPTS {
        let damping = part * 10f64.powi(attempt) * average;
        // From the last column to the first: a lower triangular factor of it is an upper one in order.
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

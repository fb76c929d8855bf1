//! Curvature of the loss in the weights of a matrix: the sensitivity of the predictions to
//! its errors.
//!
//! An error `E` of a matrix changes its outputs by `E x`, and the loss by `g^T E x` if `g` are the
//! gradients of the outputs. The squares of this, summed over all positions, are the Fisher
//! information of `E`. Half of it is, to second order, the Kullback-Leibler divergence. It is
//! approximated by two factors, `F = outputs x inputs / trace` (a Kronecker product):
//! `tr(outputs E inputs E^T) / trace`, with `inputs = sum of |g|^2 x x^T` and
//! `outputs = sum of |x|^2 g g^T`, both with the trace `sum of |g|^2 |x|^2`. Sources: K-FAC (arXiv
//! 1503.05671); for rounding YAQA (arXiv 2505.22988), from which the feedback between rows and
//! columns is taken.
#![forbid(unsafe_code)]

use crate::sensitivity::hessian::{Feedback, Hessian};
use rayon::prelude::*;
use std::ops::Range;
use upg_kernel::matrix::strips::{STRIP_ROWS, TILE_COLS};
use upg_kernel::rotation::Rotation;
use upg_kernel::{Error, ErrorKind, Result};

/// Rows of a panel, whose outputs are considered together.
///
/// Cost and memory grow with it, and panels are encoded in parallel. docs/quality.md has the gain.
pub(crate) const PANEL_ROWS: usize = 9 * STRIP_ROWS;

/// Damping of the factor of the outputs, relative to the average of its diagonal.
///
/// It is larger than that of the inputs: fewer positions determine the outputs, and their chance
/// correlations would be taken for real ones.
const DAMPING_OF_OUTPUTS: f64 = 0.1;

/// Returns the bytes of the [`Curvature`] of a matrix `[rows, cols]`.
pub(crate) fn curvature_bytes(rows: u64, cols: u64) -> u64 {
    4 * (cols * cols + rows * rows.min(PANEL_ROWS as u64))
}

/// Factors of the curvature of one matrix.
#[derive(Debug, Clone)]
pub struct Curvature {
    inputs: Hessian,
    /// Blocks on the diagonal, of [`PANEL_ROWS`] rows each; the last one may have fewer.
    ///
    /// `None`: all rows count equally.
    outputs: Option<Vec<Hessian>>,
}

impl From<Hessian> for Curvature {
    /// Creates the curvature of a matrix of which only the inputs are known.
    fn from(inputs: Hessian) -> Self {
        Self {
            inputs,
            outputs: None,
        }
    }
}

impl Curvature {
    /// Creates the curvature of a matrix `[rows, cols]` without inputs.
    ///
    /// Memory: `4 * cols^2` bytes, and up to 2,304 bytes per row.
    pub fn new(rows: usize, cols: usize) -> Self {
        let panels = (0..rows).step_by(PANEL_ROWS);
        let panels = panels.map(|first| Hessian::new(PANEL_ROWS.min(rows - first)));
        Self {
            inputs: Hessian::new(cols),
            outputs: Some(panels.collect()),
        }
    }

    /// Adds inputs `x [n, cols]` and the gradients `[n, rows]` of the outputs of the matrix.
    ///
    /// Errors: `Shape` if the sizes do not match; `Invalid` for values that are not finite.
    pub fn add(&mut self, x: &[f32], gradients: &[f32]) -> Result<()> {
        let cols = self.inputs.cols();
        let Some(panels) = &mut self.outputs else {
            return self.inputs.add(x);
        };
        let rows = panels.iter().map(Hessian::cols).sum::<usize>();
        let n = x.len() / cols.max(1);
        if x.len() != n * cols || gradients.len() != n * rows {
            let message = format!(
                "{} inputs and {} gradients for a matrix [{rows}, {cols}]",
                x.len(),
                gradients.len()
            );
            return Err(Error::new(ErrorKind::Shape, message));
        }
        let (of_x, of_gradients) = (sizes(x, cols), sizes(gradients, rows));
        let all = 0..cols;
        let inputs = &mut self.inputs;
        let (of_inputs, of_outputs) = rayon::join(
            || inputs.add(&weighed(x, cols, all, &of_gradients)),
            || {
                let panels = panels.par_iter_mut().enumerate();
                panels.try_for_each(|(number, panel)| {
                    let first = number * PANEL_ROWS;
                    let columns = first..first + panel.cols();
                    panel.add(&weighed(gradients, rows, columns, &of_x))
                })
            },
        );
        of_inputs.and(of_outputs)
    }

    /// Returns the factor of the inputs.
    pub fn inputs(&self) -> &Hessian {
        &self.inputs
    }

    /// Returns the cost of errors `[rows, cols]`: their Fisher information.
    ///
    /// It is `tr(outputs E inputs E^T)` divided by the trace of the inputs. Half of it is the
    /// Kullback-Leibler divergence, in nats, of all positions together. If only the inputs are
    /// known, it is `tr(E inputs E^T)`. Cost: `rows * cols^2 + rows * 576 * cols` multiplications;
    /// `4 * cols^2 + 4,608 * cols` bytes.
    ///
    /// Errors (`Shape`): the errors belong to another matrix.
    pub fn cost(&self, errors: &[f32]) -> Result<f64> {
        let cols = self.inputs.cols();
        self.check(errors.len() / cols.max(1), cols)?;
        let Some(panels) = &self.outputs else {
            return Ok(self.inputs.cost(errors));
        };
        let trace = self.inputs.trace();
        let inputs = self.inputs.symmetric();
        let panels = panels.iter().zip(errors.chunks(PANEL_ROWS * cols.max(1)));
        let cost: f64 = panels
            .map(|(panel, errors)| panel.product(&inputs, errors))
            .sum();
        Ok(if trace > 0.0 { cost / trace } else { 0.0 })
    }

    /// Returns the divergence that errors `[rows, cols]` alone cause, in nats per position, to
    /// second order.
    ///
    /// `None` if only the inputs are known, or no position was added. Cost and errors: those of
    /// [`Curvature::cost`].
    pub fn divergence(&self, errors: &[f32]) -> Result<Option<f64>> {
        let positions = self.inputs.count();
        if self.outputs.is_none() || positions == 0 {
            return Ok(None);
        }
        Ok(Some(0.5 * self.cost(errors)? / positions as f64))
    }

    /// Returns the divergence for a relative error of 1 in each row,
    /// in nats of all positions together.
    ///
    /// The rows of `weights [rows, cols]`, rotated by `rotation`, have independent errors as large
    /// as themselves, which later rows and columns compensate.
    ///
    /// Cost: that of [`Feedback::new`]. Errors: those of it;
    /// `Shape` for the weights of another matrix.
    pub(crate) fn sensitivity(&self, weights: &[f32], rotation: &Rotation) -> Result<f64> {
        let cols = self.inputs.cols();
        self.check(weights.len() / cols.max(1), cols)?;
        let rotated = self.inputs.rotated(rotation);
        let of_columns = Feedback::new(&rotated, TILE_COLS)?.average_cost();
        let size = |row: &[f32]| row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
        let mut sum = 0.0;
        for (panel, weights) in weights.chunks(self.panel_rows() * cols).enumerate() {
            let sizes = weights.chunks_exact(cols).map(size);
            sum += match self.feedback_of_rows(panel, 1)? {
                None => sizes.sum::<f64>(),
                Some(rows) => {
                    let costs = rows.costs().iter().map(|&cost| f64::from(cost));
                    rows.average_cost()
                        * sizes
                            .zip(costs)
                            .map(|(size, cost)| size * cost)
                            .sum::<f64>()
                }
            };
        }
        let trace = match self.outputs {
            Some(_) => self.inputs.trace(),
            None => 1.0,
        };
        Ok(if trace > 0.0 {
            0.5 * of_columns * sum / trace
        } else {
            0.0
        })
    }

    /// Returns the number of rows that are encoded in sequence,
    /// because each compensates those before.
    ///
    /// It is a multiple of the rows of a strip.
    pub(crate) fn panel_rows(&self) -> usize {
        match self.outputs {
            Some(_) => PANEL_ROWS,
            None => STRIP_ROWS,
        }
    }

    /// Returns the feedback between the rows of a panel, `together` rows at a time; `None` if
    /// there is none.
    ///
    /// Errors: those of [`Feedback::new`].
    pub(crate) fn feedback_of_rows(
        &self,
        panel: usize,
        together: usize,
    ) -> Result<Option<Feedback>> {
        let panel = self.outputs.as_ref().map(|panels| &panels[panel]);
        panel
            .map(|panel| Feedback::with_damping(panel, together, DAMPING_OF_OUTPUTS))
            .transpose()
    }

    /// Checks that it belongs to a matrix `[rows, cols]`.
    ///
    /// Errors (`Shape`): it belongs to another one.
    pub(crate) fn check(&self, rows: usize, cols: usize) -> Result<()> {
        let Some(panels) = &self.outputs else {
            return self.inputs.check(cols);
        };
        let found = panels.iter().map(Hessian::cols).sum::<usize>();
        if found == rows {
            return self.inputs.check(cols);
        }
        let message = format!("gradients of {found} outputs, the matrix has {rows}");
        Err(Error::new(ErrorKind::Shape, message))
    }
}

/// Returns the norms of rows of `len` values.
fn sizes(values: &[f32], len: usize) -> Vec<f32> {
    let size = |row: &[f32]| {
        row.iter()
            .map(|&v| f64::from(v).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let rows = values.par_chunks_exact(len);
    rows.map(|row| size(row) as f32).collect()
}

/// Returns some columns of rows of `len` values, each row times its factor.
fn weighed(values: &[f32], len: usize, columns: Range<usize>, factors: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; factors.len() * columns.len()];
    out.par_chunks_mut(columns.len().max(1))
        .zip(values.par_chunks_exact(len))
        .zip(factors)
        .for_each(|((out, row), factor)| {
            let pairs = out.iter_mut().zip(&row[columns.clone()]);
            pairs.for_each(|(out, value)| *out = value * factor);
        });
    out
}

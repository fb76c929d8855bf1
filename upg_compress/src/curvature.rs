//! What errors of a matrix change the predictions of its model by.
//!
//! An error `E` of a matrix changes its outputs by `E x`, and the loss by `g^T E x` if `g` are the gradients of the outputs.
//! The squares of that, added up over all positions, are the Fisher information of `E`: half of it is, to second order, the
//! Kullback-Leibler divergence. It is approximated by two factors, `F = outputs x inputs / trace` (a Kronecker product):
//! `tr(outputs E inputs E^T) / trace`, with `inputs = sum of |g|^2 x x^T` and `outputs = sum of |x|^2 g g^T`, both with
//! the trace `sum of |g|^2 |x|^2`. Sources: K-FAC (arXiv 1503.05671); for rounding YAQA (arXiv 2505.22988), whose
//! feedback between rows and columns this is.
#![forbid(unsafe_code)]

use crate::hessian::{Feedback, Hessian};
use upg_kernel::matrix::strips::STRIP_ROWS;
use upg_kernel::{Error, ErrorKind, Result};

/// Rows whose outputs are looked at together: the cost grows with it, memory too, and panels are encoded side by side.
/// What it gives is in docs/quality.md.
pub(crate) const PANEL_ROWS: usize = 9 * STRIP_ROWS;

/// The two factors for one matrix.
#[derive(Debug, Clone)]
pub struct Curvature {
    inputs: Hessian,
    /// Blocks on the diagonal, of [`PANEL_ROWS`] rows each, the last one maybe of fewer. `None`: every row counts the same.
    outputs: Option<Vec<Hessian>>,
}

impl From<Hessian> for Curvature {
    /// Of a matrix of which only the inputs are known.
    fn from(inputs: Hessian) -> Self {
        Self {
            inputs,
            outputs: None,
        }
    }
}

impl Curvature {
    /// Of a matrix `[rows, cols]` without any inputs yet. Memory: `4 * cols^2` bytes, and up to 2,304 a row.
    pub fn new(rows: usize, cols: usize) -> Self {
        let panels = (0..rows).step_by(PANEL_ROWS);
        let panels = panels.map(|first| Hessian::new(PANEL_ROWS.min(rows - first)));
        Self {
            inputs: Hessian::new(cols),
            outputs: Some(panels.collect()),
        }
    }

    /// Adds inputs `x [n, cols]` and the gradients `[n, rows]` of what the matrix makes of them.
    ///
    /// Errors: `Shape` if these do not fit; `Invalid` for values that are not finite.
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
        let sizes = |values: &[f32], len: usize| -> Vec<f32> {
            let rows = values.chunks_exact(len);
            let size = |row: &[f32]| {
                row.iter()
                    .map(|&v| f64::from(v).powi(2))
                    .sum::<f64>()
                    .sqrt()
            };
            rows.map(|row| size(row) as f32).collect()
        };
        let (of_x, of_gradients) = (sizes(x, cols), sizes(gradients, rows));
        let weighed = |values: &[f32], len: usize, first: usize, end: usize, sizes: &[f32]| {
            let rows = values.chunks_exact(len).zip(sizes);
            let rows = rows.flat_map(|(row, size)| row[first..end].iter().map(move |v| v * size));
            rows.collect::<Vec<f32>>()
        };
        self.inputs.add(&weighed(x, cols, 0, cols, &of_gradients))?;
        let mut first = 0;
        for panel in panels {
            let end = first + panel.cols();
            panel.add(&weighed(gradients, rows, first, end, &of_x))?;
            first = end;
        }
        Ok(())
    }

    /// That of the inputs.
    pub fn inputs(&self) -> &Hessian {
        &self.inputs
    }

    /// What errors `[rows, cols]` cost: `tr(outputs E inputs E^T)` over the trace of the inputs, that is their Fisher
    /// information. Half of it is the Kullback-Leibler divergence, in nats, of all positions together. Where only the
    /// inputs are known: `tr(E inputs E^T)`. Cost: `rows * cols^2` multiplications.
    ///
    /// Errors (`Shape`): they are of another matrix.
    pub fn cost(&self, errors: &[f32]) -> Result<f64> {
        let cols = self.inputs.cols();
        self.check(errors.len() / cols.max(1), cols)?;
        let Some(panels) = &self.outputs else {
            return Ok(self.inputs.cost(errors));
        };
        let trace = self.inputs.trace();
        let panels = panels.iter().zip(errors.chunks(PANEL_ROWS * cols.max(1)));
        let cost: f64 = panels
            .map(|(panel, errors)| panel.product(&self.inputs, errors))
            .sum();
        Ok(if trace > 0.0 { cost / trace } else { 0.0 })
    }

    /// Rows that are encoded one after the other, as each makes up for those before: a multiple of those of a strip.
    pub(crate) fn panel_rows(&self) -> usize {
        match self.outputs {
            Some(_) => PANEL_ROWS,
            None => STRIP_ROWS,
        }
    }

    /// How the errors of strips of a panel change the targets of later ones; `None` if they do not.
    ///
    /// Errors: those of [`Feedback::new`].
    pub(crate) fn feedback_of_rows(&self, panel: usize) -> Result<Option<Feedback>> {
        let panel = self.outputs.as_ref().map(|panels| &panels[panel]);
        panel
            .map(|panel| Feedback::new(panel, STRIP_ROWS))
            .transpose()
    }

    /// Errors (`Shape`): it is of another matrix than `[rows, cols]`.
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

/// The errors of the strips of a panel, and what they ask of the next one.
pub(crate) struct Panel {
    cols: usize,
    feedback: Option<Feedback>,
    /// Of the strips so far, row by row.
    errors: Vec<f32>,
}

impl Panel {
    pub(crate) fn new(cols: usize, feedback: Option<Feedback>) -> Self {
        Self {
            cols,
            feedback,
            errors: Vec::new(),
        }
    }

    /// What is wanted of the next strip, whose weights are `[n, cols]`; and what an error in each of its rows costs, if
    /// that is known.
    pub(crate) fn next(&self, weights: &[f32]) -> (Vec<f32>, Option<&[f32]>) {
        let mut wanted = weights.to_vec();
        let Some(feedback) = &self.feedback else {
            return (wanted, None);
        };
        let first = self.errors.len() / self.cols;
        feedback.carry(&self.errors, self.cols, &mut wanted);
        let rows = first..first + weights.len() / self.cols;
        (wanted, Some(&feedback.costs()[rows]))
    }

    /// Takes the errors of that strip, `weights - decoded`.
    pub(crate) fn add(&mut self, weights: &[f32], decoded: impl Iterator<Item = f32>) {
        if self.feedback.is_some() {
            let pairs = weights.iter().zip(decoded);
            self.errors.extend(pairs.map(|(w, decoded)| w - decoded));
        }
    }
}

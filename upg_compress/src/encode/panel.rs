//! Panels: strips of rows that are encoded one after the other, each for the errors of the strips before.
#![forbid(unsafe_code)]

use crate::sensitivity::curvature::PANEL_ROWS;
use crate::sensitivity::hessian::Feedback;
use std::ops::Range;
use upg_kernel::matrix::strips::STRIP_ROWS;

/// Rows that are encoded one after the other.
pub(crate) fn sequential_rows(is_calibrated: bool) -> usize {
    match is_calibrated {
        true => PANEL_ROWS,
        false => STRIP_ROWS,
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

    /// What is wanted of the next strip, whose weights are `[n, cols]`, after the errors of the strips before.
    pub(crate) fn next(&self, weights: &[f32]) -> (Vec<f32>, Option<StripRows<'_>>) {
        let mut wanted = weights.to_vec();
        let Some(feedback) = &self.feedback else {
            return (wanted, None);
        };
        let first = self.errors.len() / self.cols;
        feedback.carry(&self.errors, self.cols, &mut wanted);
        let rows = first..first + weights.len() / self.cols;
        (wanted, Some(StripRows { feedback, rows }))
    }

    /// Takes the errors of that strip, `weights - decoded`.
    pub(crate) fn add(&mut self, weights: &[f32], decoded: impl Iterator<Item = f32>) {
        if self.feedback.is_some() {
            let pairs = weights.iter().zip(decoded);
            self.errors.extend(pairs.map(|(w, decoded)| w - decoded));
        }
    }
}

/// How the rows of a strip act together.
pub(crate) struct StripRows<'a> {
    feedback: &'a Feedback,
    /// In their panel.
    rows: Range<usize>,
}

impl StripRows<'_> {
    /// What an error in each of the rows costs, 1 on average over the panel.
    pub(crate) fn costs(&self) -> &[f32] {
        &self.feedback.costs()[self.rows.clone()]
    }

    /// What the error of row `i` of the strip adds to the target of its row `k`: 0 if `k` is not later, or of those rounded
    /// together with `i`.
    pub(crate) fn share(&self, i: usize, k: usize) -> f32 {
        self.feedback
            .share(self.rows.start + i, self.rows.start + k)
    }
}

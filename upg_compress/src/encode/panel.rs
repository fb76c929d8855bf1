//! Panels: strips of rows that are encoded in sequence, each compensating the strips before.
#![forbid(unsafe_code)]

use crate::sensitivity::curvature::PANEL_ROWS;
use crate::sensitivity::hessian::Feedback;
use std::ops::Range;
use upg_kernel::matrix::strips::STRIP_ROWS;

/// Returns the number of rows that are encoded in sequence.
pub(crate) fn sequential_rows(is_calibrated: bool) -> usize {
    match is_calibrated {
        true => PANEL_ROWS,
        false => STRIP_ROWS,
    }
}

/// Errors of the strips of a panel, and the targets of the next strip that follow.
pub(crate) struct Panel {
    cols: usize,
    feedback: Option<Feedback>,
    /// Errors of the strips so far, row by row.
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

    /// Returns the targets of the next strip of weights `[n, cols]` after the errors of the strips
    /// before.
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

    /// Adds the errors of that strip, `weights - decoded`.
    pub(crate) fn add(&mut self, weights: &[f32], decoded: impl Iterator<Item = f32>) {
        if self.feedback.is_some() {
            let pairs = weights.iter().zip(decoded);
            self.errors.extend(pairs.map(|(w, decoded)| w - decoded));
        }
    }
}

/// Feedback between the rows of a strip.
pub(crate) struct StripRows<'a> {
    feedback: &'a Feedback,
    /// Rows of the strip within their panel.
    rows: Range<usize>,
}

impl StripRows<'_> {
    /// Returns the cost of an error in each of the rows, 1 on average over the panel.
    pub(crate) fn costs(&self) -> &[f32] {
        &self.feedback.costs()[self.rows.clone()]
    }

    /// Returns the share of the error of row `i` that is added to the target of row `k` of the
    /// strip.
    ///
    /// 0 if `k` is not later, or is rounded together with `i`.
    pub(crate) fn share(&self, i: usize, k: usize) -> f32 {
        self.feedback
            .share(self.rows.start + i, self.rows.start + k)
    }
}

//! Blocked matrix product by the `gemm` crate, which selects the instruction set at run time.

use std::ops::Range;

/// Matrix view of a slice: element `[i, j]` is at `i * row_stride + j * col_stride`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Creates a row-major view `[rows, cols]`, whose rows start every `stride` elements.
    ///
    /// Panics if `values` ends before the matrix does, or if rows overlap (`stride < cols`).
    pub fn new(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        if rows == 0 || cols == 0 {
            return Self {
                values: &[],
                rows,
                cols,
                row_stride: 0,
                col_stride: 0,
            };
        }
        // Overlapping rows would allow a small slice to have sizes whose product wraps.
        assert!(rows == 1 || stride >= cols, "rows of {cols} every {stride}");
        let stride = if rows == 1 { cols } else { stride };
        let end = (rows - 1)
            .checked_mul(stride)
            .and_then(|last| last.checked_add(cols));
        assert!(
            end.is_some_and(|end| end <= values.len()),
            "[{rows}, {cols}] every {stride} is in {} values",
            values.len()
        );
        Self {
            values,
            rows,
            cols,
            row_stride: stride,
            col_stride: 1,
        }
    }

    /// Returns the number of columns.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Returns some of its rows. Panics if there are fewer.
    pub fn rows_of(self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {}",
            self.rows
        );
        // Cannot wrap if there is a row, because its elements are in the slice.
        let start = rows.start.saturating_mul(self.row_stride);
        Self {
            values: self.values.get(start..).unwrap_or(&[]),
            rows: rows.len(),
            ..self
        }
    }

    /// Returns the transposed view.
    pub fn transposed(self) -> Self {
        Self {
            values: self.values,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// Computes `out [n, rows] = x [n, cols] * weights [rows, cols]^T`
/// in f32 on the calling thread.
///
/// `rows` is `weights.len() / cols`, `n` is `x.len() / cols`. Panics if the lengths do not match.
pub fn multiply(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    let (rows, n) = (weights.len() / cols, x.len() / cols);
    assert!(
        weights.len() == rows * cols && x.len() == n * cols,
        "whole rows of {cols}"
    );
    let weights = View::new(weights, rows, cols, cols);
    product(
        View::new(x, n, cols, cols),
        weights.transposed(),
        false,
        out,
    );
}

/// Computes `out = a b`, or `out += a b` with `add`, on the calling thread.
///
/// `out` is `[rows of a, columns of b]`. Panics if the sizes do not match.
pub fn product(a: View<'_>, b: View<'_>, add: bool, out: &mut [f32]) {
    assert!(
        a.cols == b.rows && a.rows.checked_mul(b.cols) == Some(out.len()),
        "[{}, {}] x [{}, {}] gives {} values",
        a.rows,
        a.cols,
        b.rows,
        b.cols,
        out.len()
    );
    if out.is_empty() {
        return;
    }
    if a.cols == 0 {
        if !add {
            out.fill(0.0);
        }
        return;
    }
    // SAFETY: all three matrices have elements. The largest index touched in `a` and `b` is in its
    // slice, as `View::new` has checked without wrapping, so strides are below `isize::MAX`.
    // Transposing does not change that, and `rows_of` only leaves rows out. The largest index of
    // the row-major `out` is its last one, by the assertion above. Borrows keep `out` apart from
    // the inputs. All three are passed transposed.
    unsafe {
        gemm::gemm(
            b.cols,
            a.rows,
            a.cols,
            out.as_mut_ptr(),
            b.cols as isize,
            1,
            add,
            b.values.as_ptr(),
            b.row_stride as isize,
            b.col_stride as isize,
            a.values.as_ptr(),
            a.row_stride as isize,
            a.col_stride as isize,
            1.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::scalar;
    use super::{View, product};

    /// Tolerance for sums of up to 67 products of values up to 1: the order of addition changes a
    /// few units in the last place.
    const TOLERANCE: f32 = 1e-5;

    #[test]
    fn equals_the_plain_loop_at_ragged_sizes() {
        for (rows, cols, n) in [(1, 1, 1), (3, 5, 4), (64, 67, 9), (17, 64, 33)] {
            let value = |i: usize| ((i * 7919 % 1009) as f32 / 504.5) - 1.0;
            let w: Vec<f32> = (0..rows * cols).map(value).collect();
            let x: Vec<f32> = (0..n * cols).map(|i| value(i + 31)).collect();
            let (mut plain, mut blocked) = (vec![0.0; rows * n], vec![f32::NAN; rows * n]);
            scalar::multiply(&w, &x, cols, &mut plain);
            super::multiply(&w, &x, cols, &mut blocked);
            for (a, b) in plain.iter().zip(&blocked) {
                assert!((a - b).abs() <= TOLERANCE, "{rows}x{cols}x{n}: {a} {b}");
            }
        }
    }

    #[test]
    fn strided_and_transposed_views_equal_the_plain_loop() {
        let (m, n, k) = (5, 7, 6);
        let value = |i: usize| ((i * 7919 % 1009) as f32 / 504.5) - 1.0;
        let a: Vec<f32> = (0..m * 11).map(value).collect();
        let b: Vec<f32> = (0..n * 9).map(|i| value(i + 5)).collect();
        let before: Vec<f32> = (0..m * n).map(|i| value(i + 77)).collect();
        for add in [false, true] {
            let mut out = before.clone();
            let (of_a, of_b) = (View::new(&a, m, k, 11), View::new(&b, n, k, 9));
            product(of_a, of_b.transposed(), add, &mut out);
            for (i, &out) in out.iter().enumerate() {
                let (row, col) = (i / n, i % n);
                let sum: f32 = (0..k).map(|j| a[row * 11 + j] * b[col * 9 + j]).sum();
                let expected = sum + if add { before[i] } else { 0.0 };
                assert!((out - expected).abs() <= TOLERANCE, "{out} {expected}");
            }
        }
    }

    /// Sizes whose product wraps to 0, or to the size of a small slice.
    #[test]
    fn sizes_that_wrap_are_refused() {
        let panics = |run: &dyn Fn()| {
            let run = std::panic::AssertUnwindSafe(run);
            std::panic::catch_unwind(run).is_err()
        };
        let one = [1.0; 4];
        let huge = 1 << (usize::BITS - 2);
        // Rows that all refer to the same element.
        assert!(panics(&|| _ = View::new(&one, huge, 1, 0)));
        assert!(panics(&|| _ = View::new(&one, 2, 2, 1)));
        assert!(panics(&|| _ = View::new(&one, huge, 1, 1)));
        assert!(panics(&|| _ = View::new(&one, 3, 1, usize::MAX / 2 + 1)));
        // A matrix without elements may have any other dimension, so the output alone determines
        // the number of elements.
        let [tall, wide] = [
            View::new(&[], huge, 0, 0),
            View::new(&[], 4, 0, 0).transposed(),
        ];
        assert!(panics(&|| product(tall, wide, false, &mut [])));
        // A single row: its stride is never used as an offset.
        let row = View::new(&one, 1, 4, usize::MAX);
        let mut out = [f32::NAN];
        product(row, row.transposed(), false, &mut out);
        assert_eq!(out, [4.0]);
        assert!(panics(&|| _ = row.rows_of(1..2)));
        let reversed = std::ops::Range { start: 1, end: 0 };
        assert!(panics(&|| _ = row.rows_of(reversed.clone())));
        assert_eq!(row.rows_of(1..1).cols(), 4);
    }

    #[test]
    fn a_product_over_no_columns_is_zero() {
        let (a, b) = (View::new(&[], 2, 0, 0), View::new(&[], 0, 3, 3));
        let mut out = [7.0; 6];
        product(a, b, true, &mut out);
        assert_eq!(out, [7.0; 6]);
        product(a, b, false, &mut out);
        assert_eq!(out, [0.0; 6]);
    }

    #[test]
    #[should_panic(expected = "is in 10 values")]
    fn a_view_ends_where_its_slice_does() {
        View::new(&[0.0; 10], 3, 3, 4);
    }
}

//! Blocked matrix product by the `gemm` crate (run-time choice of instruction set).

/// `out [n, rows] = x [n, cols] * weights [rows, cols]^T` in f32, on the calling thread.
///
/// `rows` is `weights.len() / cols`, `n` is `x.len() / cols`. Panics if the lengths do not fit.
pub fn multiply(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    let (rows, n) = (weights.len() / cols, x.len() / cols);
    assert!(
        weights.len() == rows * cols && x.len() == n * cols && out.len() == rows * n,
        "lengths fit [{rows}, {cols}] x [{cols}, {n}]"
    );
    // SAFETY: with the strides given (row-major weights, x and out, of which the last two are transposed) the largest
    // element touched is the last one of each slice, by the assertion above; `read_dst` is false,
    // so `out` is only written, and the borrows keep it apart from the inputs.
    unsafe {
        gemm::gemm(
            rows,
            n,
            cols,
            out.as_mut_ptr(),
            rows as isize,
            1,
            false,
            weights.as_ptr(),
            1,
            cols as isize,
            x.as_ptr(),
            cols as isize,
            1,
            0.0f32,
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

    /// Sums of up to 67 products of values up to 1: orders differ by a few units in the last place.
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
}

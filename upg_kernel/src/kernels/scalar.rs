//! Plain loops: the reference that one can check by eye.
#![forbid(unsafe_code)]

/// Partial sums of a dot product: enough for a compiler to use its widest registers.
const LANES: usize = 16;

/// `sum(a[i] * b[i])` over the shorter length, in f32, as 16 interleaved partial sums.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut sums = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for (sum, (a, b)) in sums.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *sum += a * b;
    }
    sums.iter().sum()
}

/// `out [rows, n] = weights [rows, cols] * x [n, cols]^T`; `cols` and `n` are not 0.
pub fn multiply(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    let n = x.len() / cols;
    for (weights, out) in weights.chunks_exact(cols).zip(out.chunks_exact_mut(n)) {
        for (x, out) in x.chunks_exact(cols).zip(out) {
            *out = dot(weights, x);
        }
    }
}

/// The unscaled Walsh-Hadamard transform in natural order, from spans of `span` on; `x.len()` is a power
/// of two.
///
/// The order of the additions is part of the format: spans 1, 2, 4, ... and `(a + b, a - b)`.
#[inline]
pub fn hadamard(x: &mut [f32], mut span: usize) {
    while span < x.len() {
        for pair in x.chunks_exact_mut(2 * span) {
            let (low, high) = pair.split_at_mut(span);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        span *= 2;
    }
}

/// `out [cols, rows] = a [rows, cols]^T`.
pub fn transpose(a: &[f32], rows: usize, cols: usize, out: &mut [f32]) {
    for (c, out) in out.chunks_exact_mut(rows).take(cols).enumerate() {
        for (r, out) in out.iter_mut().enumerate() {
            *out = a[r * cols + c];
        }
    }
}

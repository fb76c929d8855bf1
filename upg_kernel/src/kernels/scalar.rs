//! Reference kernels: plain loops that can be checked by eye.
#![forbid(unsafe_code)]

/// Partial sums of a dot product: enough for a compiler to use its widest registers.
const LANES: usize = 16;

/// Computes `sum(a[i] * b[i])` over the shorter length, in f32,
/// as 16 interleaved partial sums.
#[inline(always)]
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

/// Computes `out [n, rows] = x [n, cols] * weights [rows, cols]^T`;
/// `cols` and `rows` are not 0.
pub fn multiply(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    let rows = weights.len() / cols;
    for (row, weights) in weights.chunks_exact(cols).enumerate() {
        for (i, x) in x.chunks_exact(cols).enumerate() {
            out[i * rows + row] = dot(weights, x);
        }
    }
}

/// Flips the signs of the elements whose bit is set;
/// bits are in order, least significant first.
#[inline(always)]
pub fn flip(x: &mut [f32], signs: &[u8]) {
    for (x, &signs) in x.chunks_mut(8).zip(signs) {
        for (bit, x) in x.iter_mut().enumerate() {
            let sign = u32::from(signs >> bit & 1) << 31;
            *x = f32::from_bits(x.to_bits() ^ sign);
        }
    }
}

/// Sign flips of a [`transform`], for the elements whose bit is set.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Signs<'a> {
    /// Flips before the transform.
    FlippedBefore(&'a [u8]),
    /// Flips after the transform.
    FlippedAfter(&'a [u8]),
}

/// Runs [`hadamard`] from span 1 on, times `factor`, with sign flips as in [`flip`].
pub(crate) fn transform(x: &mut [f32], factor: f32, signs: Signs<'_>) {
    if let Signs::FlippedBefore(signs) = signs {
        flip(x, signs);
    }
    hadamard(x, 1);
    scale(x, factor);
    if let Signs::FlippedAfter(signs) = signs {
        flip(x, signs);
    }
}

/// Multiplies every element by `factor`.
#[inline(always)]
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

/// Computes `gain * x / sqrt(mean(x^2) + eps)` in place, element by element.
#[inline(always)]
pub fn rms_norm(x: &mut [f32], gain: &[f32], eps: f32) {
    let mean_square = dot(x, x) / x.len() as f32;
    let scale = 1.0 / (mean_square + eps).sqrt();
    for (x, gain) in x.iter_mut().zip(gain) {
        *x = gain * (*x * scale);
    }
}

/// Computes `out = silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
#[inline(always)]
pub fn gated_silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// Computes `exp(x)` with operations that every vector unit has; `x` is clamped to -87 to 88.
///
/// The error is at most 2e-7 of the result. Method: `x = n ln 2 + r` with `|r| <= ln(2) / 2`, and
/// the Taylor series of `exp(r)` up to the seventh power.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    /// 1.5 * 2^23: a sum with it has no bits for a fraction, and its low bits are the integer.
    const NO_FRACTION: f32 = 12_582_912.0;
    /// `ln 2` in two parts. The first has so few bits that its product with `n` is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Not `clamp`, whose comparisons have another order: here a NaN stays a NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + NO_FRACTION;
    let n = shifted - NO_FRACTION;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut sum = 1.0 / 5040.0;
    for factor in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        sum = sum * r + factor;
    }
    let power_of_two = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    sum * power_of_two
}

/// Computes the unscaled Walsh-Hadamard transform in natural order, from spans of `span` on.
///
/// `x.len()` is a power of two. The order of the additions is part of the format: spans 1, 2, 4,
/// ... and `(a + b, a - b)`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library() {
        for i in -8_700..=8_800 {
            let x = i as f32 / 100.0 + 0.003;
            let x = x.clamp(-87.0, 88.0);
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - expected).abs() <= 2e-7 * expected, "{x}: {found}");
        }
        assert_eq!(
            (exp(0.0), exp(-1e9), exp(1e9)),
            (1.0, exp(-87.0), exp(88.0))
        );
        assert!(exp(f32::NAN).is_nan());
    }
}

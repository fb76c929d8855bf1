//! The sets of levels that a weight can be rounded to.
#![forbid(unsafe_code)]

use pulp::{Arch, Simd, WithSimd};

/// Partial sums of an error: enough for a compiler to use vector registers.
const LANES: usize = 8;

/// Levels with codes; `t` is a weight divided by the step of its group.
pub trait LevelSet: Sync {
    /// The range of steps worth a try, as factors of the step that just reaches the largest weight.
    const SEARCH: (f32, f32);
    /// Primes of that range that are tried before the neighbours of the best one.
    const COARSE_STEPS: usize;
    /// Code of the level nearest to `t`.
    fn code(&self, t: f32) -> u8;
    /// The level of a code.
    fn level(&self, code: u8) -> i8;
    /// The largest magnitude that a weight of either sign can reach.
    fn largest(&self) -> f32;

    /// The level nearest to `t`, as a number.
    fn nearest(&self, t: f32) -> f32;

    /// Squared error of a group of weights at this step.
    fn error(&self, weights: &[f32], step: f32) -> f32 {
        Arch::new().dispatch(SquaredError {
            levels: self,
            weights,
            step,
        })
    }
}

/// [`LevelSet::error`], compiled for some instruction sets, of which the best is taken: the same
/// to the bit.
struct SquaredError<'a, L: ?Sized> {
    levels: &'a L,
    weights: &'a [f32],
    step: f32,
}

impl<L: LevelSet + ?Sized> SquaredError<'_, L> {
    #[inline(always)]
    fn of(&self, weight: f32, inverse: f32) -> f32 {
        let difference = weight - self.step * self.levels.nearest(weight * inverse);
        difference * difference
    }
}

impl<L: LevelSet + ?Sized> WithSimd for SquaredError<'_, L> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f32 {
        let inverse = 1.0 / self.step;
        let mut sums = [0.0; LANES];
        let (whole, rest) = self.weights.as_chunks::<LANES>();
        for weights in whole {
            for lane in 0..LANES {
                sums[lane] += self.of(weights[lane], inverse);
            }
        }
        for (sum, &w) in sums.iter_mut().zip(rest) {
            *sum += self.of(w, inverse);
        }
        sums.iter().sum()
    }
}

/// The int8 levels -127 to 127 of `q8` and `s8`.
#[derive(Debug, Clone, Copy)]
pub struct Linear8;

impl LevelSet for Linear8 {
    /// Weights that were quantized before lie on a grid: some larger steps hit it almost exactly.
    const SEARCH: (f32, f32) = (0.95, 1.9);
    const COARSE_STEPS: usize = 256;

    #[inline]
    fn code(&self, t: f32) -> u8 {
        self.nearest(t) as i8 as u8
    }

    #[inline(always)]
    fn nearest(&self, t: f32) -> f32 {
        // Adding 1.5 * 2^23 leaves no bits for a fraction. Unlike `round` this compiles to two
        // additions that every vector unit has; ties go to even.
        const NO_FRACTION: f32 = 12_582_912.0;
        (t.clamp(-127.0, 127.0) + NO_FRACTION) - NO_FRACTION
    }

    #[inline]
    fn level(&self, code: u8) -> i8 {
        code as i8
    }

    fn largest(&self) -> f32 {
        127.0
    }
}

/// The levels of [`Linear8`] but 0, for weights that are not zero.
#[derive(Debug, Clone, Copy)]
pub struct Kept8;

impl LevelSet for Kept8 {
    const SEARCH: (f32, f32) = Linear8::SEARCH;
    const COARSE_STEPS: usize = Linear8::COARSE_STEPS;

    #[inline]
    fn code(&self, t: f32) -> u8 {
        self.nearest(t) as i8 as u8
    }

    #[inline(always)]
    fn nearest(&self, t: f32) -> f32 {
        let nearest = Linear8.nearest(t);
        if nearest == 0.0 {
            1f32.copysign(t)
        } else {
            nearest
        }
    }

    #[inline]
    fn level(&self, code: u8) -> i8 {
        code as i8
    }

    fn largest(&self) -> f32 {
        Linear8.largest()
    }
}

/// The 16 ascending levels of `q4`, one of which is 0, and of `s4`, none of which is.
#[derive(Debug, Clone, PartialEq)]
pub struct Codebook {
    levels: [i8; 16],
    /// `t` above `thresholds[i]` is nearer to level `i + 1` than to level `i`.
    thresholds: [f32; 15],
    /// Distances from level `i` to level `i + 1`.
    gaps: [f32; 15],
}

impl Codebook {
    /// The starting point: levels fitted to groups of 32 Gaussian weights.
    pub fn gaussian() -> Self {
        Self::new([
            -127, -95, -73, -55, -40, -26, -13, 0, 12, 25, 37, 51, 66, 83, 103, 127,
        ])
    }

    /// The same without a 0, in groups of 64.
    pub fn without_zero() -> Self {
        Self::new([
            -127, -98, -77, -60, -45, -31, -18, -6, 6, 18, 31, 45, 60, 77, 98, 127,
        ])
    }

    fn new(levels: [i8; 16]) -> Self {
        let (mut thresholds, mut gaps) = ([0.0; 15], [0.0; 15]);
        for (i, pair) in levels.windows(2).enumerate() {
            let (low, high) = (f32::from(pair[0]), f32::from(pair[1]));
            thresholds[i] = (low + high) / 2.0;
            gaps[i] = high - low;
        }
        Self {
            levels,
            thresholds,
            gaps,
        }
    }

    /// The levels, ascending.
    pub fn levels(&self) -> &[i8; 16] {
        &self.levels
    }

    /// Moves every level to the mean of the weights that chose it (`sums`: of weight times step,
    /// and of squared steps); 0 stays and no other becomes 0, the largest becomes 127 in
    /// magnitude, and the order is kept.
    pub(super) fn moved_to(&self, sums: &[(f64, f64); 16]) -> Self {
        let mut means = [0.0f64; 16];
        for (i, mean) in means.iter_mut().enumerate() {
            let (weighted, norm) = sums[i];
            *mean = match self.levels[i] {
                0 => 0.0,
                _ if norm > 0.0 => weighted / norm,
                level => f64::from(level),
            };
        }
        let largest = means.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        if largest <= 0.0 {
            return self.clone();
        }
        let mut levels = means.map(|mean| (mean * 127.0 / largest).round() as i8);
        levels.sort_unstable();
        if levels.contains(&0) == self.levels.contains(&0) {
            Self::new(levels)
        } else {
            self.clone()
        }
    }
}

impl LevelSet for Codebook {
    const SEARCH: (f32, f32) = (0.6, 1.12);
    const COARSE_STEPS: usize = 24;

    #[inline]
    fn code(&self, t: f32) -> u8 {
        self.thresholds
            .iter()
            .map(|&threshold| u8::from(t > threshold))
            .sum()
    }

    #[inline(always)]
    fn nearest(&self, t: f32) -> f32 {
        // No look-up: a chain of selections that compiles to vector code.
        let steps = self.thresholds.iter().zip(&self.gaps);
        steps.fold(f32::from(self.levels[0]), |level, (&threshold, &gap)| {
            level + if t > threshold { gap } else { 0.0 }
        })
    }

    #[inline]
    fn level(&self, code: u8) -> i8 {
        self.levels[usize::from(code & 15)]
    }

    fn largest(&self) -> f32 {
        f32::from(self.levels[15]).min(-f32::from(self.levels[0]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_levels() {
        let codebook = Codebook::gaussian();
        for i in -1400..=1400 {
            let t = i as f32 / 10.0 + 0.03;
            let nearest = codebook
                .levels()
                .iter()
                .map(|&l| (f32::from(l) - t).abs())
                .fold(f32::MAX, f32::min);
            assert_eq!(
                (f32::from(codebook.level(codebook.code(t))) - t).abs(),
                nearest
            );
            let int8 = f32::from(Linear8.level(Linear8.code(t)));
            assert_eq!(int8, t.round().clamp(-127.0, 127.0));
        }
    }

    #[test]
    fn zero_has_a_level_of_its_own() {
        assert_eq!(Linear8.level(Linear8.code(0.0)), 0);
        let codebook = Codebook::gaussian();
        assert_eq!(codebook.level(codebook.code(0.0)), 0);
        let moved = codebook.moved_to(&[(3.0, 1.0); 16]);
        assert!(moved.levels().contains(&0));
    }

    #[test]
    fn what_is_kept_has_no_level_of_zero() {
        for i in -50..=50 {
            let t = i as f32 / 20.0 + 0.01;
            let expected = match t.round() {
                0.0 => 1f32.copysign(t),
                other => other,
            };
            assert_eq!(f32::from(Kept8.level(Kept8.code(t))), expected, "{t}");
        }
        let codebook = Codebook::without_zero();
        let mut sums = [(1.0, 1.0); 16];
        sums[8] = (1e-9, 1.0);
        for levels in [codebook.levels(), codebook.moved_to(&sums).levels()] {
            assert!(!levels.contains(&0), "{levels:?}");
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_error() {
        fn check(levels: &impl LevelSet, weights: &[f32]) {
            let plain = SquaredError {
                levels,
                weights,
                step: 0.017,
            };
            let plain = plain.with_simd(pulp::Scalar::new());
            let best = levels.error(weights, 0.017);
            assert_eq!(plain.to_bits(), best.to_bits(), "{weights:?}");
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                let error = SquaredError {
                    levels,
                    weights,
                    step: 0.017,
                };
                let avx2 = Simd::vectorize(simd, error);
                assert_eq!(avx2.to_bits(), best.to_bits(), "{weights:?}");
            }
        }
        let weights: Vec<f32> = (0..64)
            .map(|i| (i * 37 % 101) as f32 * 0.03 - 1.5)
            .collect();
        for n in [0, 1, 7, 8, 9, 31, 32, 64] {
            check(&Linear8, &weights[..n]);
            check(&Kept8, &weights[..n]);
            check(&Codebook::gaussian(), &weights[..n]);
        }
    }
}

//! Medians of repeated measurements.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};
use upg_kernel::Result;

/// Minimum total time of a measurement; shorter work is repeated.
const LEAST_TIME: Duration = Duration::from_millis(500);

/// Maximum number of repetitions, for work that takes almost no time.
const MOST_REPETITIONS: usize = 1000;

/// Median and spread of several values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Figure {
    /// Computes the median and spread of `values`; NaN if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let count = values.len();
        Self {
            median: (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0,
            least: at(0),
            most: at(count.saturating_sub(1)),
        }
    }

    /// Converts seconds into a rate: `amount` per second.
    pub fn rate(self, amount: f64) -> Self {
        Self {
            median: amount / self.median,
            least: amount / self.most,
            most: amount / self.least,
        }
    }
}

/// Measures the seconds that `work` takes.
///
/// Runs it once to warm up, then `repetitions` times, or more often until half a second has passed.
pub fn repeat(repetitions: NonZeroUsize, mut work: impl FnMut() -> Result<()>) -> Result<Figure> {
    work()?;
    let mut times = Vec::new();
    let started = Instant::now();
    while goes_on(times.len(), repetitions, started.elapsed()) {
        times.push(seconds(&mut work)?);
    }
    Ok(Figure::of(times))
}

/// Returns whether another repetition is needed.
pub fn goes_on(done: usize, wanted: NonZeroUsize, elapsed: Duration) -> bool {
    done < wanted.get() || (elapsed < LEAST_TIME && done < MOST_REPETITIONS)
}

/// Measures the seconds that one run of `work` takes.
pub fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    // A clock that stands still would make rates infinite.
    Ok(started.elapsed().as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        let of = |values: &[f64]| Figure::of(values.to_vec());
        let figure = |median, least, most| Figure {
            median,
            least,
            most,
        };
        assert_eq!(of(&[4.0]), figure(4.0, 4.0, 4.0));
        assert_eq!(of(&[4.0, 1.0]), figure(2.5, 1.0, 4.0));
        assert_eq!(of(&[9.0, 1.0, 2.0]), figure(2.0, 1.0, 9.0));
        assert_eq!(of(&[9.0, 1.0, 2.0, 4.0]), figure(3.0, 1.0, 9.0));
        assert_eq!(of(&[2.0, 1.0, 4.0]).rate(8.0), figure(4.0, 2.0, 8.0));
    }

    #[test]
    fn work_is_repeated_as_often_as_wanted() {
        let wanted = NonZeroUsize::new(3).unwrap();
        assert!(goes_on(2, wanted, 2 * LEAST_TIME));
        assert!(!goes_on(3, wanted, LEAST_TIME));
        assert!(goes_on(3, wanted, Duration::ZERO));
        assert!(!goes_on(MOST_REPETITIONS, wanted, Duration::ZERO));
        let mut count = 0;
        let work = || {
            count += 1;
            Ok(())
        };
        repeat(wanted, work).unwrap();
        // One run warms up.
        assert!(count >= 4);
    }
}

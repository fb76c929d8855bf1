//! Memory use of this process and memory bandwidth of this machine.
#![forbid(unsafe_code)]

use rayon::prelude::*;

/// Returns the peak resident size of this process in bytes, including touched mapped pages.
///
/// `None` where the system does not report it (Windows).
pub fn peak_memory() -> Option<u64> {
    #[cfg(unix)]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let peak = getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss();
        // Apple counts bytes, all others KiB.
        let unit = if cfg!(target_vendor = "apple") {
            1
        } else {
            1024
        };
        u64::try_from(peak).ok()?.checked_mul(unit)
    }
    #[cfg(not(unix))]
    None
}

/// Words that one thread sums at a time: 1 MiB.
const PART: usize = 1 << 17;

/// Returns the wrapping sum of `words`, computed by all threads.
///
/// For far more words than the caches hold, its time is that of reading memory. The time of a
/// product with packed weights is compared with it.
pub fn sum_words(words: &[u64]) -> u64 {
    let sum = |part: &[u64]| part.iter().fold(0, |sum: u64, w| sum.wrapping_add(*w));
    words
        .par_chunks(PART)
        .map(sum)
        .reduce(|| 0, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    /// Bytes that are written, so that they become resident.
    #[cfg(unix)]
    const TOUCHED: usize = 64 << 20;

    #[test]
    fn every_word_is_added_once() {
        for len in [0, 1, super::PART - 1, super::PART, 3 * super::PART + 7] {
            let words: Vec<u64> = (0..len as u64).map(|i| i * i + (1 << 63)).collect();
            let one_by_one = words.iter().fold(0u64, |sum, w| sum.wrapping_add(*w));
            assert_eq!(super::sum_words(&words), one_by_one, "{len}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn touched_memory_counts() {
        let block = vec![1u8; TOUCHED];
        let peak = super::peak_memory().unwrap();
        assert!(peak > TOUCHED as u64, "{peak}");
        // A wrong unit would be far off.
        assert!(peak < (64 << 30) + block.len() as u64, "{peak}");
    }
}

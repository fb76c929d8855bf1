//! How much memory this process takes.
#![forbid(unsafe_code)]

/// The largest resident size of this process so far, in bytes; mapped pages that were touched count.
///
/// `None` where the system does not say (Windows).
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

#[cfg(all(test, unix))]
mod tests {
    /// Bytes that are written, so that they become resident.
    const TOUCHED: usize = 64 << 20;

    #[test]
    fn touched_memory_counts() {
        let block = vec![1u8; TOUCHED];
        let peak = super::peak_memory().unwrap();
        assert!(peak > TOUCHED as u64, "{peak}");
        // A unit mistaken for another would be far off.
        assert!(peak < (64 << 30) + block.len() as u64, "{peak}");
    }
}

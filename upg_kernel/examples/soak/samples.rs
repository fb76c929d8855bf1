//! Measurements taken every ten seconds, and their limits at the end.
#![forbid(unsafe_code)]

use crate::counting::live_bytes;
use std::fmt;
use std::time::Duration;

pub const HEADER: &str =
    "  seconds     pieces  resident MB   of it heap MB   allocated bytes  threads";

/// Memory and threads while nothing is computed.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    at: Duration,
    done: u64,
    live: i64,
    /// Resident bytes, resident bytes without files, and threads; only on Linux.
    process: Option<[u64; 3]>,
}

impl Sample {
    pub fn take(at: Duration, done: u64) -> Self {
        Self {
            at,
            done,
            // Before the text below exists.
            live: live_bytes(),
            process: process(),
        }
    }
}

fn process() -> Option<[u64; 3]> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let number = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some([
        1024 * number("VmRSS:")?,
        1024 * number("RssAnon:")?,
        number("Threads:")?,
    ])
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.0} {:>10}", self.at.as_secs_f64(), self.done)?;
        match self.process {
            Some([resident, heap, threads]) => {
                let [resident, heap] = [resident, heap].map(|bytes| bytes as f64 / 1e6);
                let live = self.live;
                write!(f, " {resident:>12.1} {heap:>15.1} {live:>17} {threads:>8}")
            }
            None => write!(f, " {:>12} {:>15} {:>17} {:>8}", "?", "?", self.live, "?"),
        }
    }
}

/// Limits on growth.
///
/// They compare the median of the last fifth of the time after the warm-up with the median of the
/// first fifth.
pub struct Limits {
    /// Fraction of the time that is ignored.
    warm_up: f64,
    /// Allowed growth of the resident size: a fraction of it, and bytes that are always allowed.
    ///
    /// glibc gives short-lived threads up to eight arenas per processor,
    /// each of which keeps freed memory.
    resident: (f64, i64),
    /// Allowed growth of the allocated bytes, likewise.
    ///
    /// Buffers and caches of regular expressions reach their size late, once per
    /// thread. An hour has a hundred thousand pieces of work or more: a leak of two
    /// bytes in each exceeds the limit.
    live: (f64, i64),
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            warm_up: 0.1,
            resident: (0.02, 4 << 20),
            live: (0.01, 64 << 10),
        }
    }
}

/// Prints the changes; returns whether all of them are within the limits.
pub fn judge(samples: &[Sample], limits: &Limits) -> bool {
    let warm_up = (samples.len() as f64 * limits.warm_up).ceil() as usize;
    let judged = samples.get(warm_up..).unwrap_or(&[]);
    let fifth = judged.len() / 5;
    if fifth == 0 {
        println!("FAILED: {} samples are too few to judge by", samples.len());
        return false;
    }
    let (first, last) = (&judged[..fifth], &judged[judged.len() - fifth..]);
    let mut is_good = true;
    let mut report = |what: &str, before: i64, after: i64, (part, bytes): (f64, i64)| {
        let allowed = bytes.max((before as f64 * part) as i64);
        let is_within = after - before <= allowed;
        is_good &= is_within;
        let verdict = if is_within { "ok" } else { "FAILED" };
        println!("{what:<16} {before:>12} -> {after:>12}  (at most {allowed:+})  {verdict}");
    };
    let live = |part: &[Sample]| median(part.iter().map(|s| s.live));
    report("allocated bytes", live(first), live(last), limits.live);
    let of_process = |part: &[Sample], which: usize| -> Option<i64> {
        let numbers: Option<Vec<i64>> = part
            .iter()
            .map(|s| Some(s.process?[which] as i64))
            .collect();
        numbers.map(|numbers| median(numbers.into_iter()))
    };
    let checks = [
        ("resident bytes", 0, limits.resident),
        // The median too, because a thread that has ended remains visible for a moment.
        ("threads", 2, (0.0, 0)),
    ];
    for (what, which, allowed) in checks {
        match (of_process(first, which), of_process(last, which)) {
            (Some(before), Some(after)) => report(what, before, after, allowed),
            _ => println!("{what:<16} NOT CHECKED: no /proc/self/status"),
        }
    }
    is_good
}

fn median(numbers: impl Iterator<Item = i64>) -> i64 {
    let mut numbers: Vec<i64> = numbers.collect();
    numbers.sort_unstable();
    numbers[numbers.len() / 2]
}

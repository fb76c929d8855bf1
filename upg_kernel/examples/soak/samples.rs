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
    /// Resident bytes, those of them that are no file, and threads; only on Linux.
    process: Option<[u64; 3]>,
}

impl Sample {
    pub fn take(at: Duration, done: u64) -> Self {
        Self {
            at,
            done,
            // Before the text below is.
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

/// How much the medians of the last fifth of the time after the warm-up may be above those of the first fifth.
pub struct Limits {
    /// Part of the time that is not judged.
    warm_up: f64,
    /// Growth of the resident size: a part of it, and the bytes that are always allowed. Threads that come and go are given up
    /// to eight arenas a processor by glibc, each of which keeps what was freed in it.
    resident: (f64, i64),
    /// Growth of what is allocated, likewise: buffers and caches of regular expressions come to their size late, each once a
    /// thread. An hour is a hundred thousand pieces of work and more: a leak of two bytes in each is above it.
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

/// Prints what has changed, and returns whether all of it is within the limits.
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
        // In the median too: a thread that has ended is there for a moment more.
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

//! The machine: what it is, how fast it reads memory, and its page cache.
#![forbid(unsafe_code)]

use super::figure::seconds;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use upg_kernel::kernels::Kernels;
use upg_kernel::{Error, ErrorKind, Result, sum_words};

/// Bytes that are read for the bandwidth, where there is room: far more than most caches hold.
const READ_BYTES: u64 = 1 << 30;

/// What is measured on. `None`: the system does not say.
pub struct Machine {
    pub cpu: Option<String>,
    pub threads: usize,
    pub kernels: &'static str,
    /// Of the minute before.
    pub load_average: Option<f64>,
}

impl Machine {
    /// Errors: those of [`Kernels::active`].
    pub fn here() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            threads: rayon::current_num_threads(),
            kernels: Kernels::active()?.name(),
            load_average: load.split(' ').next().and_then(|n| n.parse().ok()),
        })
    }
}

/// The value of `key: value` or `key : value` in a text of such lines.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = pairs.find(|(found, _)| found.trim() == key)?;
    Some(value.trim())
}

/// The bytes of `123 kB`.
fn kib(text: &str) -> Option<u64> {
    let number = text.trim().trim_end_matches(|c: char| !c.is_ascii_digit());
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory to measure the bandwidth with.
pub struct Memory(Vec<u64>);

impl Memory {
    /// 1 GiB, or a quarter of what is free. Errors (`TooLarge`): not even that is to be had.
    pub fn new() -> Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = field(&meminfo, "MemAvailable").and_then(kib);
        let bytes = free.map_or(READ_BYTES, |free| READ_BYTES.min(free / 4));
        let words = bytes / size_of::<u64>() as u64;
        let mut memory: Vec<u64> = Vec::new();
        memory.try_reserve_exact(words as usize).map_err(|e| {
            let message = format!("no memory of {bytes} bytes to read: {e}");
            Error::new(ErrorKind::TooLarge, message)
        })?;
        // Written, each word another: pages that were never written are all one page of zeros.
        memory.extend(0..words);
        Ok(Self(memory))
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.0[..]) as u64
    }

    /// The seconds that all threads take to read it once; caches hold nothing else after that.
    pub fn read(&self) -> Result<f64> {
        seconds(|| {
            black_box(sum_words(black_box(&self.0)));
            Ok(())
        })
    }
}

/// Takes the pages of a file out of the page cache. Errors: why it cannot be done.
pub fn drop_page_cache(path: &Path) -> std::result::Result<(), String> {
    #[cfg(target_os = "linux")]
    {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        let file = fs::File::open(path).map_err(|e| e.to_string())?;
        // Only pages that are on disk leave it.
        file.sync_all().map_err(|e| e.to_string())?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|e| e.to_string())
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        Err("only Linux has a way to do it".into())
    }
}

/// How many pages this process had to wait for until they came from a disk. `None`: unknown.
pub fn pages_from_disk() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let usage = getrusage(UsageWho::RUSAGE_SELF).ok()?;
        u64::try_from(usage.major_page_faults()).ok()
    }
    #[cfg(not(target_os = "linux"))]
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_sizes_are_found() {
        let text = "processor\t: 0\nmodel name\t: A CPU: fast\nMemAvailable:    123 kB\n";
        assert_eq!(field(text, "model name"), Some("A CPU: fast"));
        assert_eq!(field(text, "model"), None);
        assert_eq!(field(text, "MemAvailable").and_then(kib), Some(123 << 10));
        assert_eq!(kib("none"), None);
    }
}

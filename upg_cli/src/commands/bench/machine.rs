//! Properties of the machine: processor, memory bandwidth and page cache.
#![forbid(unsafe_code)]

use super::figure::seconds;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};
use upg_kernel::Cpu;
use upg_kernel::support::sum_words;
use upg_kernel::{Error, ErrorKind, Result};

/// Bytes to read for the bandwidth, if there is room: far more than most caches hold.
const READ_BYTES: u64 = 1 << 30;

/// Machine that is measured; `None` where the system does not report a value.
pub struct Machine {
    pub cpu: Option<String>,
    pub threads: usize,
    pub kernels: &'static str,
    /// Load average of the last minute.
    pub load_average: Option<f64>,
}

impl Machine {
    /// Describes this machine.
    ///
    /// Errors: those of [`Cpu::shared`].
    pub fn here() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Ok(Self {
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            threads: rayon::current_num_threads(),
            kernels: Cpu::shared()?.kernels().name(),
            load_average: load.split(' ').next().and_then(|n| n.parse().ok()),
        })
    }
}

/// Returns the value of `key: value` or `key : value` in a text of such lines.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = pairs.find(|(found, _)| found.trim() == key)?;
    Some(value.trim())
}

/// Parses `123 kB` into bytes.
fn kib(text: &str) -> Option<u64> {
    let number = text.trim().trim_end_matches(|c: char| !c.is_ascii_digit());
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// Monitor of the processor time that other processes use.
pub struct Others {
    started: Instant,
    own: Duration,
    all: Ticks,
}

/// Clock ticks of all processors since the system started.
struct Ticks {
    processors: usize,
    total: u64,
    busy: u64,
}

impl Others {
    /// Starts to monitor; `None` if the system does not report ticks.
    pub fn watch() -> Option<Self> {
        Some(Self {
            started: Instant::now(),
            own: own_time()?,
            all: Ticks::of(&fs::read_to_string("/proc/stat").ok()?)?,
        })
    }

    /// Returns the processor time used by others since the start, in percent of all processors.
    ///
    /// Excludes this process and its children; includes time that the hypervisor gave
    /// to other machines.
    pub fn percent(&self) -> Option<f64> {
        let now = Ticks::of(&fs::read_to_string("/proc/stat").ok()?)?;
        let total = now.total.checked_sub(self.all.total).filter(|&n| n > 0)? as f64;
        let busy = now.busy.checked_sub(self.all.busy)? as f64 / total;
        let elapsed = self.started.elapsed().as_secs_f64() * now.processors as f64;
        let own = own_time()?.checked_sub(self.own)?.as_secs_f64() / elapsed;
        Some(100.0 * (busy - own).max(0.0))
    }
}

impl Ticks {
    /// Parses `/proc/stat` and sums over all processors.
    ///
    /// Sums user, nice, system, idle, I/O wait, two kinds of interrupts, and stolen time. The
    /// fields after these are already included in the first two.
    fn of(stat: &str) -> Option<Self> {
        let sum = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = sum
            .split_whitespace()
            .take(8)
            .map(|n| n.parse().ok())
            .collect::<Option<_>>()?;
        let idle = ticks.get(3)? + ticks.get(4)?;
        let total = ticks.iter().sum();
        let is_processor = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
        Some(Self {
            processors: stat.lines().filter(is_processor).count(),
            total,
            busy: total - idle,
        })
    }
}

/// Returns the processor time of this process and of its children that have ended.
fn own_time() -> Option<Duration> {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let whose = [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN];
        let times = whose.map(|who| {
            let usage = getrusage(who).ok()?;
            Some([usage.user_time(), usage.system_time()])
        });
        let mut sum = Duration::ZERO;
        for time in times
            .into_iter()
            .collect::<Option<Vec<_>>>()?
            .as_flattened()
        {
            sum += Duration::from_secs(u64::try_from(time.tv_sec()).ok()?);
            sum += Duration::from_micros(u64::try_from(time.tv_usec()).ok()?);
        }
        Some(sum)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// Memory to measure the bandwidth with.
pub struct Memory(Vec<u64>);

impl Memory {
    /// Allocates 1 GiB, or a quarter of the free memory if that is less.
    ///
    /// Errors (`TooLarge`): the memory cannot be allocated.
    pub fn new() -> Result<Self> {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = field(&meminfo, "MemAvailable").and_then(kib);
        let bytes = free.map_or(READ_BYTES, |free| READ_BYTES.min(free / 4));
        let words = bytes / size_of::<u64>() as u64;
        let mut memory: Vec<u64> = Vec::new();
        memory.try_reserve_exact(words as usize).map_err(|e| {
            let message = format!("cannot allocate {bytes} bytes to read: {e}");
            Error::new(ErrorKind::TooLarge, message)
        })?;
        // Each word is written with a different value: pages that were never written all map to one
        // page of zeros.
        memory.extend(0..words);
        Ok(Self(memory))
    }

    pub fn bytes(&self) -> u64 {
        size_of_val(&self.0[..]) as u64
    }

    /// Returns the seconds that all threads take to read the memory once; afterwards caches hold
    /// nothing else.
    pub fn read(&self) -> Result<f64> {
        seconds(|| {
            black_box(sum_words(black_box(&self.0)));
            Ok(())
        })
    }
}

/// Drops the pages of a file from the page cache. Errors: why this is impossible.
pub fn drop_page_cache(path: &Path) -> std::result::Result<(), String> {
    #[cfg(target_os = "linux")]
    {
        use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
        let file = fs::File::open(path).map_err(|e| e.to_string())?;
        // Only clean pages can be dropped.
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

/// Returns how many page faults of this process had to wait for a disk; `None` if unknown.
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

    #[test]
    fn ticks_are_summed_without_those_of_guests() {
        let stat = "cpu  100 20 30 1000 50 1 2 7 99 99\ncpu0 1 1\ncpu1 1 1\nintr 5\n";
        let ticks = Ticks::of(stat).unwrap();
        assert_eq!(ticks.processors, 2);
        assert_eq!((ticks.total, ticks.busy), (1210, 160));
        assert!(Ticks::of("cpu 1 2 3").is_none() && Ticks::of("").is_none());
    }
}

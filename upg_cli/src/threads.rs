//! Number of threads.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum number of threads, more than is useful anywhere.
const MOST_THREADS: usize = 1024;

/// Environment variable of rayon for the number of threads.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// Starts the threads of the process.
///
/// Their number is the first of: `asked`, the environment variable, one per core if a model is run,
/// one per hardware thread.
///
/// Errors: `Argument` (0, or above 1,024), `Io` (threads cannot be started).
pub fn start(asked: Option<usize>, runs_a_model: bool) -> Result<()> {
    let from_env = || {
        let threads: usize = std::env::var(VARIABLE).ok()?.parse().ok()?;
        // 0 counts as unset, as in rayon.
        (threads > 0).then_some((threads, format!("{VARIABLE}={threads}")))
    };
    let asked = asked.map(|threads| (threads, format!("--threads {threads}")));
    let threads = match asked.or_else(from_env) {
        Some((threads, name)) if !(1..=MOST_THREADS).contains(&threads) => {
            let message = format!("{name}: use 1 to {MOST_THREADS}");
            return Err(Error::new(ErrorKind::Argument, message));
        }
        Some((threads, _)) => threads,
        None if runs_a_model => available_cores(),
        None => offered(),
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| {
            let message = format!("cannot start {threads} threads: {e}");
            Error::new(ErrorKind::Io, message).with_source(e)
        })
}

fn offered() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the number of cores that this process may use.
///
/// Counts the cores of its CPU affinity (two hardware threads of a core count once), capped by the
/// quota of its control group. Falls back to the number of available hardware threads.
///
/// Decoding is limited by memory bandwidth: a second thread on a core adds nothing to that.
pub fn available_cores() -> usize {
    let offered = offered();
    let cores = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| distinct_cores(&status, Path::new("/sys/devices/system/cpu")));
    cores.map_or(offered, |cores| cores.min(offered))
}

/// Counts the cores among the processors that `status` allows,
/// by the sibling lists below `topology`.
fn distinct_cores(status: &str, topology: &Path) -> Option<usize> {
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let siblings = |cpu: usize| {
        let file = topology.join(format!("cpu{cpu}/topology/thread_siblings_list"));
        fs::read_to_string(file).ok()
    };
    let cores: Option<HashSet<String>> = cpu_numbers(list)?.into_iter().map(siblings).collect();
    cores.map(|cores| cores.len()).filter(|&cores| cores > 0)
}

/// Parses a list such as `0-2,8`.
fn cpu_numbers(list: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        numbers.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(cpu_numbers("\t0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(cpu_numbers("5"), Some(vec![5]));
        assert_eq!(cpu_numbers("0-x"), None);
        assert_eq!(cpu_numbers(""), None);
    }

    #[test]
    fn two_threads_of_a_core_count_once() {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, siblings) in [(0, "0,2\n"), (1, "1,3\n"), (2, "0,2\n"), (3, "1,3\n")] {
            let path = folder.path().join(format!("cpu{cpu}/topology"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("thread_siblings_list"), siblings).unwrap();
        }
        let cores = |list: &str| {
            let status = format!("Name:\tupg\nCpus_allowed_list:\t{list}\nMems_allowed:\t1\n");
            distinct_cores(&status, folder.path())
        };
        assert_eq!(cores("0-3"), Some(2));
        assert_eq!(cores("0,2"), Some(1));
        assert_eq!(cores("1"), Some(1));
        // A processor that the folder does not describe.
        assert_eq!(cores("0-4"), None);
        assert_eq!(distinct_cores("Name:\tupg\n", folder.path()), None);
    }
}

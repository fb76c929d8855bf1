//! How many threads to use.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use upg_kernel::{Error, ErrorKind, Result};

/// Most threads that can be asked for: more than help anywhere.
const MOST_THREADS: usize = 1024;

/// The environment variable of rayon for the number of threads.
const VARIABLE: &str = "RAYON_NUM_THREADS";

/// Starts the threads of the process: `asked` of them, else as many as the environment says, else one for each core if a
/// model is run, else as many as the system offers.
///
/// Errors: `Argument` (0, or above 1,024), `Io` (the system gives no threads).
pub fn start(asked: Option<usize>, runs_a_model: bool) -> Result<()> {
    let from_env = || {
        let threads: usize = std::env::var(VARIABLE).ok()?.parse().ok()?;
        // As rayon reads it, 0 is no number of threads.
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

/// Cores that this process may use: those of its affinity, a core with two hardware threads counted once,
/// but no more than the quota of its control group. Where that cannot be found out, the threads that
/// the system offers.
///
/// Weights are read at the speed of memory: a second thread on a core adds nothing to that.
pub fn available_cores() -> usize {
    let offered = offered();
    let cores = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| distinct_cores(&status, Path::new("/sys/devices/system/cpu")));
    cores.map_or(offered, |cores| cores.min(offered))
}

/// Cores of the processors that `status` allows, by the sibling lists below `topology`.
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

/// `0-2,8` as numbers.
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
        // A processor that the folder says nothing of.
        assert_eq!(cores("0-4"), None);
        assert_eq!(distinct_cores("Name:\tupg\n", folder.path()), None);
    }
}

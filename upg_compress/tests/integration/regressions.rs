//! All stored inputs of the fuzz targets (`fuzz/seeds`), without a fuzzer: none panics.

#[path = "../../../fuzz/src/targets/mod.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Maximum total bytes of all inputs in the repository.
const MOST_BYTES: u64 = 2 << 20;

/// Far above the time of an input, even where every other processor is busy: only a hang
/// takes longer. Nothing but a clock shows it: the targets run code of many kinds.
const LONGEST: Duration = Duration::from_secs(60);

fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds")
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn stored_inputs_are_of_the_targets_that_there_are() {
    let folders = entries(&seeds());
    let folders = folders.iter().map(|path| path.file_name().unwrap());
    assert!(folders.eq(targets::ALL.map(|(name, _)| name)));
    let size = |path: &PathBuf| fs::metadata(path).unwrap().len();
    let all = targets::ALL
        .iter()
        .flat_map(|(name, _)| entries(&seeds().join(name)));
    let all: u64 = all.map(|path| size(&path)).sum();
    assert!(all <= MOST_BYTES, "{all} bytes of inputs");
}

/// Runs the inputs of one target and prints each name first,
/// so that a crash can be attributed.
fn run(name: &str) {
    let (_, target) = targets::ALL.into_iter().find(|(n, _)| *n == name).unwrap();
    let inputs = entries(&seeds().join(name));
    assert!(!inputs.is_empty(), "no inputs for {name}");
    for path in inputs {
        println!("{}", path.display());
        let input = fs::read(&path).unwrap();
        let started = Instant::now();
        target(&input);
        assert!(started.elapsed() < LONGEST, "{}: it hangs", path.display());
    }
}

macro_rules! targets {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            run(stringify!($name));
        }
    )*};
}
targets! {
    compressed_tensors config decoders gguf header hf_directory journal pickle resealed template tokenizer
}

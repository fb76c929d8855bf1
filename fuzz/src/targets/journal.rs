//! Target: the lines as those of a journal, with valid checksums, and after a separator the
//! partial file.
//!
//! The resumed run must end with the bytes of an uninterrupted one, or with an error.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use upg_compress::source::SyntheticSource;
use upg_compress::{Choice, CompressOptions, Progress, compress, partial_files};
use upg_kernel::format::{Encoding, checksum_of};
use upg_kernel::{ErrorKind, Result};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "vocab_size": 16, "hidden_act": "silu",
    "tie_word_embeddings": true}"#;

/// Header and records of a run's journal, its partial file, and its final file.
struct Run {
    start: String,
    records: Vec<String>,
    partial: Vec<u8>,
    whole: Vec<u8>,
}

static RUN: LazyLock<Run> = LazyLock::new(Run::stopped);

pub fn run(data: &[u8]) {
    let [lines, partial] = super::parts(data);
    let run = &*RUN;
    let folder = super::folder();
    let out = folder.path().join("out.safetensors");
    let [data_path, journal_path] = partial_files(&out).expect("a folder to write to");
    let mut journal = run.start.clone();
    let chain = |journal: &str| last_sum(journal).to_owned();
    for line in super::text(lines).lines() {
        // A number stands for a record of the real run.
        let record = line.parse::<usize>().ok();
        let line = record.and_then(|n| run.records.get(n)).map_or(line, |r| r);
        let sum = checksum_of(format!("{}{line}", chain(&journal)).as_bytes());
        journal += &format!("{sum} {line}\n");
    }
    std::fs::write(&journal_path, journal).expect("room for temporary files");
    // Edits of the real partial file: a position and a byte, three bytes each.
    let mut bytes = run.partial.clone();
    for edit in partial.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]])) % bytes.len();
        bytes[at] = edit[2];
    }
    std::fs::write(&data_path, bytes).expect("room for temporary files");
    match compress_tiny(&out, &()) {
        Ok(()) => {
            let found = std::fs::read(&out).expect("the file of a run that ended well");
            assert!(found == run.whole, "other bytes than without a stop");
        }
        Err(e) => super::one_line(&e),
    }
}

/// Returns the checksum of the last line; empty before the first.
fn last_sum(journal: &str) -> &str {
    let last = journal.lines().skip(1).last().unwrap_or_default();
    last.split_once(' ').map_or("", |(sum, _)| sum)
}

fn compress_tiny(out: &Path, progress: &dyn Progress) -> Result<()> {
    let source = SyntheticSource::new(CONFIG, 1)?;
    let mut options = CompressOptions::new(Choice::Encode(Encoding::Q8));
    options.resume = true;
    compress(&source, out, &options, progress).map(|_| ())
}

impl Run {
    fn stopped() -> Self {
        let folder = super::folder();
        let out = folder.path().join("out.safetensors");
        compress_tiny(&out, &()).expect("a tiny model");
        let whole = std::fs::read(&out).expect("the file of a tiny model");
        let out: PathBuf = folder.path().join("stopped.safetensors");
        let e = compress_tiny(&out, &Stop::default()).expect_err("a run that is stopped");
        assert_eq!(e.kind(), ErrorKind::Interrupted);
        let [data, journal] = partial_files(&out).expect("a folder to write to");
        let journal = std::fs::read_to_string(journal).expect("a journal");
        let mut lines = journal.lines();
        let start = lines.by_ref().take(2).map(|line| format!("{line}\n"));
        let start = start.collect();
        let record = |line: &str| line.split_once(' ').map(|(_, json)| json.to_owned());
        Self {
            start,
            records: lines.filter_map(record).collect(),
            partial: std::fs::read(data).expect("a partial file"),
            whole,
        }
    }
}

/// Stops a run near its end.
#[derive(Default)]
struct Stop(std::sync::atomic::AtomicU64);

impl Progress for Stop {
    fn advance(&self, weights: u64) {
        self.0
            .fetch_add(weights, std::sync::atomic::Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed) >= 500
    }
}

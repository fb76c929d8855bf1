//! Stopped runs resume and give the same bytes, for any state that the stop has left.

use crate::common::copy_model;
use std::cmp::Reverse;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use tempfile::TempDir;
use upg_compress::source::{self, SyntheticSource};
use upg_compress::{
    Calibration, Choice, CompressOptions, CompressReport, Progress, Source, TensorReport, Zeros,
    compress, partial_files,
};
use upg_kernel::format::Encoding;
use upg_kernel::inference::LayerInput;
use upg_kernel::{Error, ErrorKind};

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 96, "intermediate_size": 80,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 48,
    "max_position_embeddings": 64, "vocab_size": 256, "hidden_act": "silu",
    "tie_word_embeddings": false}"#;

/// Tensors of that model: two embeddings, a norm, and seven matrices and two norms per layer.
const TENSORS: usize = 21;

/// Stops the work as soon as this many weights are done.
struct Stop {
    weights: u64,
    done: AtomicU64,
}

impl Stop {
    /// Stops before `tensor`. With a calibration layers are processed from the last to the first,
    /// after all other tensors.
    fn before(source: &dyn Source, tensor: usize, calibrated: bool) -> Self {
        let mut tensors: Vec<_> = source.tensors().iter().collect();
        if calibrated {
            tensors.sort_by_key(|t| LayerInput::of(&t.name).map(|(layer, _)| Reverse(layer)));
        }
        let finished = tensors[..tensor].iter();
        Self {
            weights: finished.map(|t| t.weights() as u64).sum(),
            done: AtomicU64::new(0),
        }
    }
}

impl Progress for Stop {
    fn advance(&self, weights: u64) {
        self.done.fetch_add(weights, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.done.load(Ordering::Relaxed) >= self.weights
    }
}

/// Runs on a number of threads.
///
/// On one thread tensors are processed one after the other; on more some are processed together,
/// and unwritten ones are lost.
fn on_threads<T: Send>(threads: usize, f: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(f)
}

struct Case {
    folder: TempDir,
    /// Name of the output.
    name: String,
    source: Box<dyn Source>,
    options: CompressOptions,
    /// Output of an uninterrupted run, and its report.
    expected: Vec<u8>,
    reported: Reported,
}

/// Report of a run, except for its times.
type Reported = (Vec<TensorReport>, Option<Zeros>);

fn reported(report: CompressReport) -> Reported {
    let mut tensors = report.tensors;
    tensors.iter_mut().for_each(|t| t.seconds = 0.0);
    (tensors, report.zeros)
}

impl Case {
    fn new(encoding: Encoding, calibrated: bool) -> Self {
        let source = Box::new(SyntheticSource::new(CONFIG, 3).unwrap());
        let mut options = CompressOptions::new(Choice::Encode(encoding));
        if calibrated {
            let tokens = (0..128).map(|i| i * 31 % 256).collect();
            options.calibration = Some(Calibration::new(tokens, 32).unwrap());
        }
        let folder = tempfile::tempdir().unwrap();
        let whole = folder.path().join("whole");
        let report = compress(source.as_ref(), &whole, &options, &()).unwrap();
        assert_eq!(report.tensors.len(), TENSORS);
        assert_eq!(report.zeros.is_some(), encoding == Encoding::S4);
        let expected = fs::read(&whole).unwrap();
        fs::remove_file(whole).unwrap();
        options.resume = true;
        Self {
            folder,
            name: "out".into(),
            source,
            options,
            expected,
            reported: reported(report),
        }
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    fn partial(&self) -> [PathBuf; 2] {
        partial_files(self.out()).unwrap()
    }

    fn run_on(&self, threads: usize, progress: &dyn Progress) -> Result<usize, Error> {
        let run = || compress(self.source.as_ref(), self.out(), &self.options, progress);
        let report = on_threads(threads, run)?;
        let restored = report.restored;
        assert_eq!(reported(report), self.reported);
        Ok(restored)
    }

    fn run(&self, progress: &dyn Progress) -> Result<usize, Error> {
        self.run_on(1, progress)
    }

    /// Stops before `tensor`; the partial files exist then, but no output.
    fn stop(&self, tensor: usize) {
        assert!(self.stop_on(1, tensor));
    }

    /// Stops on several threads; `false` if the rest was already under way and finished.
    fn stop_on(&self, threads: usize, tensor: usize) -> bool {
        let calibrated = self.options.calibration.is_some();
        let stop = Stop::before(self.source.as_ref(), tensor, calibrated);
        let Err(e) = self.run_on(threads, &stop) else {
            assert!(fs::read(self.out()).unwrap() == self.expected);
            fs::remove_file(self.out()).unwrap();
            return false;
        };
        assert_eq!(e.kind(), ErrorKind::Interrupted);
        assert!(!self.out().exists());
        assert!(self.partial().iter().all(|path| path.exists()));
        true
    }

    /// Resumes to the end; returns how many tensors were reused. Only the output remains.
    fn finish(&self) -> usize {
        let restored = self.run(&()).unwrap();
        assert!(fs::read(self.out()).unwrap() == self.expected);
        fs::remove_file(self.out()).unwrap();
        assert_eq!(fs::read_dir(self.folder.path()).unwrap().count(), 0);
        restored
    }
}

#[test]
fn a_run_goes_on_wherever_it_stopped() {
    for (encoding, calibrated) in [
        (Encoding::MdCsr, false),
        (Encoding::S4, false),
        (Encoding::T3, false),
        (Encoding::Q4, true),
    ] {
        let case = Case::new(encoding, calibrated);
        for tensor in (0..TENSORS).step_by(4) {
            case.stop(tensor);
            assert_eq!(case.finish(), tensor, "{encoding}");
        }
        // Stopped repeatedly.
        for tensor in (0..TENSORS).step_by(6) {
            case.stop(tensor);
        }
        assert_eq!(case.finish(), 18, "{encoding}");
    }
}

/// Also resumed with another number of threads than before.
#[test]
fn matrices_side_by_side_are_done_again_or_not_at_all() {
    for (encoding, calibrated) in [(Encoding::T3, false), (Encoding::T2, true)] {
        let case = Case::new(encoding, calibrated);
        for tensor in (0..TENSORS).step_by(5) {
            case.stop_on(3, tensor);
            case.finish();
        }
        // More is done than the first of several batches, which was written then.
        assert!(case.stop_on(2, TENSORS - 7), "{encoding}");
        assert!(case.finish() >= 2, "{encoding}");
        case.stop(5);
        case.stop_on(2, 12);
        let restored = case.run_on(4, &()).unwrap();
        assert!(restored >= 5, "{restored}");
        assert!(fs::read(case.out()).unwrap() == case.expected);
    }
}

/// After a power cut, files may be shorter than they were, and hold other bytes at their end.
#[test]
fn torn_and_damaged_files_cost_work_only() {
    let case = Case::new(Encoding::Q4, true);
    case.stop(15);
    let [data, journal] = case.partial();
    let whole = [&data, &journal].map(|path| fs::read(path).unwrap());
    let put = |data_bytes: &[u8], journal_bytes: &[u8]| {
        fs::write(&data, data_bytes).unwrap();
        fs::write(&journal, journal_bytes).unwrap();
    };
    for part in 0..=8 {
        let len = whole[0].len() * part / 8;
        put(&whole[0][..len], &whole[1]);
        let restored = case.finish();
        assert!(restored <= 15 && (part < 8 || restored == 15), "{part}");

        let place = (whole[0].len() - 1) * part / 8;
        let mut damaged = whole[0].clone();
        damaged[place] ^= 1;
        put(&damaged, &whole[1]);
        assert!(case.finish() <= 15, "{part}");

        let mut longer = whole[0].clone();
        longer.resize(case.expected.len() + 1000 * part, 7);
        put(&longer, &whole[1]);
        assert_eq!(case.finish(), 15, "{part}");
    }
    // From the fingerprint on; tests of the journal cut it everywhere.
    let second = whole[1].iter().position(|&b| b == b'\n').unwrap() + 1;
    let third = second + whole[1][second..].iter().position(|&b| b == b'\n').unwrap() + 1;
    for part in 0..=8 {
        let len = third + (whole[1].len() - third) * part / 8;
        put(&whole[0], &whole[1][..len]);
        assert!(case.finish() <= 15, "{part}");
    }
    // The file with the data is gone.
    fs::write(&journal, &whole[1]).unwrap();
    assert_eq!(case.finish(), 0);
}

#[test]
fn nothing_else_is_continued() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("phi3");
    copy_model("phi3", "phi3", &model);
    let out = folder.path().join("out");
    let mut options = CompressOptions::new(Choice::Encode(Encoding::T3));
    options.resume = true;
    options.calibration = Calibration::new(vec![1; 64], 32).ok();
    let run = |options: &CompressOptions, tensors: Option<usize>| {
        let source = source::open(&model).unwrap();
        let calibrated = options.calibration.is_some();
        let stop = tensors.map(|n| Stop::before(source.as_ref(), n, calibrated));
        let progress = stop.as_ref().map_or(&() as &dyn Progress, |stop| stop);
        on_threads(1, || compress(source.as_ref(), &out, options, progress))
    };
    run(&options, Some(5)).unwrap_err();
    let refused = |options: &CompressOptions, what: &str| {
        let e = run(options, None).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
        assert!(e.to_string().contains(&format!("another {what}")), "{e}");
        assert!(!out.exists());
    };
    for (what, change) in [
        ("options", (|o| o.seed = 1) as fn(&mut CompressOptions)),
        ("options", |o| o.encoding = Choice::Encode(Encoding::T4)),
        ("options", |o| {
            o.overrides = vec!["*.down_proj.weight=q8".parse().unwrap()]
        }),
        ("options", |o| o.calibration = None),
        ("calibration text", |o| {
            o.calibration = Calibration::new(vec![2; 64], 32).ok()
        }),
    ] {
        let mut changed = options.clone();
        change(&mut changed);
        refused(&changed, what);
    }
    // Measuring outputs does not change the file.
    let mut same = options.clone();
    same.output_errors = true;
    let e = run(&same, Some(6)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Interrupted);

    // Rewritten files count as different, even with the same bytes.
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, bytes).unwrap();
    let file = fs::File::options().append(true).open(&weights).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    refused(&options, "source");
}

#[test]
fn files_that_are_no_partial_ones_are_left_alone() {
    let case = Case::new(Encoding::Q8, false);
    let [data, journal] = case.partial();
    fs::write(&data, "mine").unwrap();
    let e = case.run(&()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
    assert_eq!(fs::read_to_string(&data).unwrap(), "mine");
    assert!(!journal.exists() && !case.out().exists());

    fs::remove_file(&data).unwrap();
    fs::write(&journal, "mine").unwrap();
    let e = case.run(&()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Malformed, "{e}");
    assert_eq!(fs::read_to_string(&journal).unwrap(), "mine");
    assert!(!data.exists() && !case.out().exists());
}

/// Opens the same output from within a run.
struct Again<'a>(&'a Case);

impl Progress for Again<'_> {
    fn tensor(&self, _: &str) {
        let e = self.0.run(&()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
        assert!(e.to_string().contains("another run"), "{e}");
    }
}

#[test]
fn two_runs_do_not_mix() {
    let case = Case::new(Encoding::Q8, false);
    case.stop(4);
    assert_eq!(case.run(&Again(&case)).unwrap(), 4);
    assert!(fs::read(case.out()).unwrap() == case.expected);
}

#[test]
fn errors_of_outputs_are_measured_if_asked_for() {
    let source = SyntheticSource::new(CONFIG, 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut options = CompressOptions::new(Choice::Encode(Encoding::Q4));
    let tokens = (0..128).map(|i| i * 31 % 256).collect();
    options.calibration = Some(Calibration::new(tokens, 32).unwrap());
    options.output_errors = true;
    let report = compress(&source, &out, &options, &()).unwrap();
    for tensor in &report.tensors {
        let in_layer = tensor.name.contains("_proj");
        assert_eq!(tensor.output_error.is_some(), in_layer, "{}", tensor.name);
        // 4 bits: a few percent.
        assert!(
            tensor.output_error.is_none_or(|e| 0.001 < e && e < 0.2),
            "{tensor:?}"
        );
        assert_eq!(tensor.divergence.is_some(), in_layer, "{}", tensor.name);
        assert!(tensor.divergence.is_none_or(|d| 0.0 < d && d < 1.0));
    }
    let calibration = report.calibration.unwrap();
    assert_eq!((calibration.tokens, calibration.layers), (128, (2, 2)));
    let file = upg_kernel::format::UpgFile::open(&out).unwrap();
    let (found, stated) = (
        file.bits_per_weight_blocks(),
        report.bits_per_weight_blocks(),
    );
    assert!((found - stated).abs() < 1e-9, "{found} {stated}");
}

/// A name has at most 255 bytes; the files beside the output have longer ones.
#[test]
fn outputs_with_long_names_go_on_too() {
    let mut case = Case::new(Encoding::Q4, false);
    for (name, bytes) in [
        ("a".repeat(240), 240),
        ("b".repeat(255), 255),
        ("語".repeat(85), 255),
    ] {
        assert_eq!(name.len(), bytes);
        case.name = name;
        case.stop(7);
        assert_eq!(case.finish(), 7);
    }
}

#[cfg(unix)]
#[test]
fn neither_of_the_two_files_is_opened_through_a_link() {
    let case = Case::new(Encoding::Q4, false);
    let [data, journal] = case.partial();
    for path in [&data, &journal] {
        // A stopped run, one of whose files was moved and replaced by a link.
        case.stop(3);
        let moved = case.folder.path().join("moved");
        fs::rename(path, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, path).unwrap();
        let before = fs::read(&moved).unwrap();
        let e = case.run(&()).unwrap_err();
        assert!(e.to_string().contains("not a regular file"), "{e}");
        assert!(fs::read(&moved).unwrap() == before);
        for left in [&moved, &data, &journal] {
            fs::remove_file(left).unwrap();
        }
    }
}

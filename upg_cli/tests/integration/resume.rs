//! Long compression runs: killed and resumed, estimated beforehand, reported afterwards.

use crate::common::{
    catches_interrupts, compress, compress_tiny, kill_when, names, output, succeed_json, success,
    tiny_model,
};
#[cfg(unix)]
use crate::common::{send, wait_until};
#[cfg(unix)]
use nix::sys::signal::Signal;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use upg_compress::Source;
use upg_compress::source::SyntheticSource;

/// Model with 57 tensors, slow enough to be interrupted between any two matrices.
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 192, "intermediate_size": 256,
    "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "vocab_size": 512, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "tie_word_embeddings": false}"#;

/// Number of tensors after which the process is killed.
const KILLS: [usize; 20] = [
    0, 1, 2, 3, 5, 8, 11, 12, 15, 18, 21, 25, 29, 33, 37, 40, 44, 48, 52, 55,
];

/// Creates a random model as a Hugging Face directory.
fn directory(folder: &Path) -> PathBuf {
    let source = SyntheticSource::new(CONFIG, 1).unwrap();
    let path = folder.join("model");
    fs::create_dir(&path).unwrap();
    fs::write(
        path.join("config.json"),
        source.files().config_json.as_ref().unwrap(),
    )
    .unwrap();
    let raw: Vec<_> = (0..source.tensors().len())
        .map(|index| source.read_raw(index).unwrap())
        .collect();
    let views = source.tensors().iter().zip(&raw).map(|(tensor, raw)| {
        let view = TensorView::new(raw.dtype.into(), tensor.shape.clone(), &raw.bytes);
        (tensor.name.clone(), view.unwrap())
    });
    safetensors::serialize_to_file(views, None, &path.join("model.safetensors")).unwrap();
    path
}

/// Counts the tensors in a journal by its lines; the first two lines are a header.
fn journaled(path: &Path) -> usize {
    let text = fs::read(path).unwrap_or_default();
    let lines = text.iter().filter(|&&b| b == b'\n').count();
    lines.saturating_sub(2)
}

/// Returns a folder, a random model in it, and the path of an output in a folder of its own.
fn workplace() -> (TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    (folder, model, work.join("out"))
}

#[test]
fn a_process_killed_at_any_point_goes_on_to_the_same_bytes() {
    let (folder, model, out) = workplace();
    let whole = folder.path().join("whole");
    let options = ["-e", "t4", "--threads", "1"];
    success(&mut compress(&model, &whole, &options));

    let journal = out.with_file_name("out.partial.journal");
    let resume = || {
        let mut command = compress(&model, &out, &options);
        command.arg("--resume");
        command
    };
    let mut killed = 0;
    for tensors in KILLS {
        let is_due = |_: &Child| journal.exists() && journaled(&journal) >= tensors;
        if !kill_when(&mut resume(), is_due) {
            break;
        }
        killed += 1;
        assert!(!out.exists(), "after {tensors} tensors");
        assert!(journaled(&journal) >= tensors);
    }
    // A process may die slowly and finish the last tensors first.
    assert!(killed >= KILLS.len() - 2, "killed {killed} times");
    let last = success(&mut resume());
    assert!(last.contains("were there from an earlier run"), "{last}");
    assert!(fs::read(&out).unwrap() == fs::read(&whole).unwrap());
    assert_eq!(names(out.parent().unwrap()), ["out"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done_if_asked_to() {
    let (_folder, model, out) = workplace();
    let work = out.parent().unwrap();
    let journal = work.join("out.partial.journal");
    let mut command = compress(&model, &out, &["-e", "t4", "--threads", "1", "--resume"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_until("journal", || {
        assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
        journaled(&journal) >= 5
    });
    send(&child, Signal::SIGINT);
    let ended = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("same command again to resume"), "{stderr}");
    assert_eq!(names(work), ["out.partial", "out.partial.journal"]);

    // A different encoding is not mixed in; without --resume the partial files stay untouched.
    let (code, _, stderr) = output(&mut compress(&model, &out, &["-e", "q8", "--resume"]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("another options"), "{stderr}");
    let (code, _, stderr) = output(&mut compress(&model, &out, &["-e", "q8"]));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("--resume continues it"), "{stderr}");
    assert_eq!(names(work), ["out", "out.partial", "out.partial.journal"]);
}

#[test]
fn a_dry_run_says_what_would_be_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = tiny_model("phi3").canonicalize().unwrap();
    let options = ["-e", "t3", "--dry-run", "--report", "report"];
    let mut command = compress(&source, "out".as_ref(), &options);
    let (code, text, stderr) = output(command.current_dir(folder.path()));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        text.contains("model.layers.*.mlp.down_proj.weight"),
        "{text}"
    );
    assert!(text.contains("t3") && text.contains("will write"), "{text}");
    assert_eq!(names(folder.path()), [""; 0]);
}

/// The model's texts are checked once: loading a large tokenizer takes seconds.
#[test]
fn the_texts_of_a_model_are_checked_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    fs::write(model.join("chat_template.jinja"), "{% if").unwrap();
    let out = folder.path().join("out");
    let (code, _, stderr) = output(&mut compress(&model, &out, &["-e", "q8"]));
    assert_eq!(code, Some(0), "{stderr}");
    let warnings = stderr.matches("its chat template cannot be read").count();
    assert_eq!(warnings, 1, "{stderr}");
}

#[test]
fn a_report_has_every_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let more = ["--report", report.to_str().unwrap()];
    let out = compress_tiny(folder.path(), "out", "t3", &more);
    let json: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(
        json["totals"]["file_bytes"],
        fs::metadata(&out).unwrap().len()
    );
    assert_eq!(json["stated"]["file_bytes"], json["totals"]["file_bytes"]);
    let inspected = succeed_json(["inspect", out.to_str().unwrap(), "--json"]);
    for layer in inspected["layers"].as_array().unwrap() {
        let mut tensors = json["tensors"].as_array().unwrap().iter();
        let tensor = tensors.find(|t| t["name"] == layer["name"]).unwrap();
        assert_eq!(tensor["encoding"], layer["encoding"]);
        assert_eq!(tensor["weight_error"], layer["error"]);
        assert!(tensor["bits_per_weight"].as_f64().unwrap() > 2.0);
    }
    assert_eq!(json["totals"]["calibration"], Value::Null);
}

/// Returns whether the file system of `folder` has unnamed files, as far as `/proc` shows.
fn has_unnamed_files(folder: &Path) -> bool {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = fs::File::options();
        let flags = nix::fcntl::OFlag::O_TMPFILE.bits();
        let opened = options.write(true).custom_flags(flags).open(folder);
        opened.is_ok() && Path::new("/proc/self/fd").is_dir()
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = folder;
        false
    }
}

/// A process killed without --resume leaves nothing.
///
/// On Linux this holds at once, except for the moment when a file replaces another; elsewhere it
/// holds after the next run.
#[test]
fn a_process_that_is_killed_leaves_no_hidden_file() {
    let (_folder, model, out) = workplace();
    let work = out.parent().unwrap();
    let run = || compress(&model, &out, &["-e", "t4", "--threads", "1"]);
    let is_unnamed = has_unnamed_files(work);
    if !is_unnamed {
        eprintln!("NOT RUN: nothing hidden at once: no O_TMPFILE where temporary files are");
    }
    for old in [None, Some("old")] {
        if let Some(old) = old {
            fs::write(&out, old).unwrap();
        }
        for wait in [0, 30, 100, 200] {
            // Any time during the run will do.
            let wait = Duration::from_millis(wait);
            assert!(kill_when(&mut run(), |child| {
                catches_interrupts(child) && {
                    std::thread::sleep(wait);
                    true
                }
            }));
            let left = names(work);
            let is_out = |name: &String| name == "out";
            assert_eq!(
                left.iter().filter(|name| is_out(name)).count(),
                old.iter().count()
            );
            let hidden: Vec<_> = left.iter().filter(|name| !is_out(name)).collect();
            let is_temporary =
                |name: &&String| name.starts_with(".upg-") && name.ends_with(".partial");
            assert!(hidden.iter().all(is_temporary), "{left:?}");
            // The next run removes it, so there is never more than one.
            let most = if is_unnamed { old.iter().count() } else { 1 };
            assert!(hidden.len() <= most, "{left:?}");
            assert_eq!(fs::read_to_string(&out).ok().as_deref(), old);
        }
        success(&mut run());
        assert_eq!(names(work), ["out"]);
    }
}

#[test]
fn several_that_write_the_same_output_all_succeed() {
    let (_folder, model, out) = workplace();
    let run = || compress(&model, &out, &["-e", "q4"]);
    success(&mut run());
    let expected = fs::read(&out).unwrap();
    for _ in 0..3 {
        let children = [(); 4].map(|()| run().stdout(Stdio::null()).spawn().unwrap());
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert!(fs::read(&out).unwrap() == expected);
        assert_eq!(names(out.parent().unwrap()), ["out"]);
        fs::remove_file(&out).unwrap();
    }
}

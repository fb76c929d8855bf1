//! Long compression runs: killed and resumed, estimated beforehand, reported afterwards.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{catches_interrupts, names, output, succeed, tiny_model, upg};
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
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

/// Waits until this many tensors are journaled; `false` if the process ended before.
fn wait_for(child: &mut Child, journal: &Path, tensors: usize) -> bool {
    for _ in 0..120_000 {
        if journal.exists() && journaled(journal) >= tensors {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("two minutes and nothing happened");
}

#[test]
fn a_process_killed_at_any_point_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    let (model, whole) = (model.to_str().unwrap(), folder.path().join("whole"));
    let args = |out: &Path| {
        [
            "compress",
            model,
            "-o",
            out.to_str().unwrap(),
            "-e",
            "t4",
            "--threads",
            "1",
        ]
        .map(str::to_owned)
    };
    succeed(args(&whole));

    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let out = work.join("out");
    let journal = work.join("out.partial.journal");
    let resume = args(&out).into_iter().chain(["--resume".to_owned()]);
    let mut killed = 0;
    for tensors in KILLS {
        let mut command = upg(resume.clone());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let running = wait_for(&mut child, &journal, tensors);
        // SIGKILL, or its equivalent on Windows.
        child.kill().unwrap();
        child.wait().unwrap();
        if !running {
            break;
        }
        killed += 1;
        assert!(!out.exists(), "after {tensors} tensors");
        assert!(journaled(&journal) >= tensors);
    }
    // A process may die slowly and finish the last tensors first.
    assert!(killed >= KILLS.len() - 2, "killed {killed} times");
    let last = succeed(resume);
    assert!(last.contains("were there from an earlier run"), "{last}");
    assert!(fs::read(&out).unwrap() == fs::read(&whole).unwrap());
    assert_eq!(names(&work), ["out"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done_if_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let out = work.join("out");
    let args = [
        "compress",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "-e",
        "t4",
    ];
    let resume = args.iter().copied().chain(["--threads", "1", "--resume"]);
    let mut command = upg(resume);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_for(&mut child, &work.join("out.partial.journal"), 5));
    let pid = child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args(["-INT", &pid])
        .status();
    assert!(sent.unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("same command again to resume"), "{stderr}");
    assert_eq!(names(&work), ["out.partial", "out.partial.journal"]);

    // A different encoding is not mixed in; without --resume the partial files stay untouched.
    let other = args.map(|arg| if arg == "t4" { "q8" } else { arg });
    let (code, _, stderr) = output(&mut upg(other.iter().copied().chain(["--resume"])));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("another options"), "{stderr}");
    let (code, _, stderr) = output(&mut upg(other));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("--resume continues it"), "{stderr}");
    assert_eq!(names(&work), ["out", "out.partial", "out.partial.journal"]);
}

#[test]
fn a_dry_run_says_what_would_be_and_writes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = tiny_model("phi3").canonicalize().unwrap();
    let args = [
        "compress",
        source.to_str().unwrap(),
        "-o",
        "out",
        "-e",
        "t3",
        "--dry-run",
        "--report",
        "report",
    ];
    let (code, text, stderr) = output(upg(args).current_dir(folder.path()));
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
    let args = [
        "compress",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "-e",
        "q8",
    ];
    let (code, _, stderr) = output(&mut upg(args));
    assert_eq!(code, Some(0), "{stderr}");
    let warnings = stderr.matches("its chat template cannot be read").count();
    assert_eq!(warnings, 1, "{stderr}");
}

#[test]
fn a_report_has_every_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let (source, out) = (tiny_model("phi3"), folder.path().join("out"));
    let report = folder.path().join("report.json");
    let args = [
        "compress",
        source.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "-e",
        "t3",
        "--report",
        report.to_str().unwrap(),
    ];
    succeed(args);
    let json: Value = serde_json::from_slice(&fs::read(&report).unwrap()).unwrap();
    assert_eq!(
        json["totals"]["file_bytes"],
        fs::metadata(&out).unwrap().len()
    );
    assert_eq!(json["stated"]["file_bytes"], json["totals"]["file_bytes"]);
    let inspected: Value =
        serde_json::from_str(&succeed(["inspect", out.to_str().unwrap(), "--json"])).unwrap();
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
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let out = work.join("out");
    let args = [
        "compress",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "-e",
        "t4",
    ];
    let args = args.into_iter().chain(["--threads", "1"]);
    let is_unnamed = has_unnamed_files(&work);
    if !is_unnamed {
        eprintln!("NOT RUN: nothing hidden at once: no O_TMPFILE where temporary files are");
    }
    for old in [None, Some("old")] {
        if let Some(old) = old {
            fs::write(&out, old).unwrap();
        }
        for wait in [0, 30, 100, 200] {
            let mut child = upg(args.clone()).stderr(Stdio::piped()).spawn().unwrap();
            while !catches_interrupts(&child) && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(wait));
            child.kill().unwrap();
            assert!(!child.wait().unwrap().success());
            let left = names(&work);
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
        succeed(args.clone());
        assert_eq!(names(&work), ["out"]);
    }
}

#[test]
fn several_that_write_the_same_output_all_succeed() {
    let folder = tempfile::tempdir().unwrap();
    let model = directory(folder.path());
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let out = work.join("out");
    let args = [
        "compress",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "-e",
        "q4",
    ];
    succeed(args);
    let expected = fs::read(&out).unwrap();
    for _ in 0..3 {
        let children = [(); 4].map(|()| upg(args).stdout(Stdio::null()).spawn().unwrap());
        for mut child in children {
            assert!(child.wait().unwrap().success());
        }
        assert!(fs::read(&out).unwrap() == expected);
        assert_eq!(names(&work), ["out"]);
        fs::remove_file(&out).unwrap();
    }
}

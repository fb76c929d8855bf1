//! Helpers that run the real `upg` command.

#[path = "../../../upg_kernel/tests/common/data.rs"]
mod data;
#[path = "../../../upg_kernel/tests/common/models.rs"]
mod models;

pub(crate) use data::data;
pub(crate) use models::{copy_model, smollm2_gguf};

use safetensors::SafeTensors;
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Time after which a test gives up to wait for a process. Only one that hangs takes longer.
const HANG: Duration = Duration::from_secs(120);

/// Makes commands start with the default actions of signals, independent of the test runner.
///
/// An ignored signal, as in a background job of a shell, stays ignored in a child process. A caught
/// signal is reset to its default action there. The tests themselves still end as before.
fn default_signals() {
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        use std::sync::atomic::AtomicBool;
        use std::sync::{Arc, Once};
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            for signal in [SIGHUP, SIGINT, SIGTERM] {
                let always = Arc::new(AtomicBool::new(true));
                signal_hook::flag::register_conditional_default(signal, always).unwrap();
            }
        });
    }
}

pub(crate) fn upg<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    default_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_upg"));
    command.args(args).stdin(Stdio::null());
    command
}

pub(crate) fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Runs a command that must succeed; returns its standard output.
pub(crate) fn success(command: &mut Command) -> String {
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{command:?}: {stderr}");
    stdout
}

/// Runs `upg`, which must succeed; returns its standard output.
pub(crate) fn succeed<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    success(&mut upg(args))
}

/// Runs `upg`, which must succeed and print JSON.
pub(crate) fn succeed_json<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Value {
    serde_json::from_str(&succeed(args)).unwrap()
}

pub(crate) fn tiny_model(name: &str) -> PathBuf {
    data("tiny-models").join(name)
}

/// Options of `upg compress` that calibrate, or say that it must not.
const ABOUT_CALIBRATION: [&str; 6] = [
    "--calibrate",
    "--no-calibrate",
    "--calibration-tokens",
    "--bpw",
    "--ratio",
    "--size",
];

/// Returns `upg compress`, from `source` to `out`; without calibration unless asked.
pub(crate) fn compress(source: &Path, out: &Path, more: &[&str]) -> Command {
    let mut command = upg([OsStr::new("compress"), source.as_ref()]);
    command.arg("-o").arg(out).args(more);
    if !more.iter().any(|option| ABOUT_CALIBRATION.contains(option)) {
        command.arg("--no-calibrate");
    }
    command
}

/// Compresses the tiny phi3 with this encoding to `folder/NAME`.
pub(crate) fn compress_tiny(folder: &Path, name: &str, encoding: &str, more: &[&str]) -> PathBuf {
    let out = folder.join(name);
    let options = [&["--encoding", encoding], more].concat();
    success(&mut compress(&tiny_model("phi3"), &out, &options));
    out
}

/// Returns SmolLM2 as q8, compressed once for all tests.
pub(crate) fn smollm2() -> &'static str {
    static MODEL: LazyLock<(TempDir, String)> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("smollm2.safetensors");
        success(&mut compress(&smollm2_gguf(), &path, &["-e", "q8"]));
        (folder, path.to_str().unwrap().to_owned())
    });
    &MODEL.1
}

/// Reads the logits that `upg run --logits` wrote.
pub(crate) fn logits(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = tensors.tensor("logits").unwrap().data().as_chunks::<4>().0;
    values.iter().map(|v| f32::from_le_bytes(*v)).collect()
}

/// Returns the names of all files in a folder, including hidden ones.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Waits until `condition` holds. Fails after two minutes.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < HANG, "two minutes and no {what}");
        sleep(Duration::from_millis(1));
    }
}

/// Starts a command and kills it once it is `ready`; returns `false` if it succeeded before.
pub(crate) fn kill_when(command: &mut Command, mut ready: impl FnMut(&Child) -> bool) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut ended = None;
    wait_until("progress", || {
        ended = child.try_wait().unwrap();
        ended.is_some() || ready(&child)
    });
    // SIGKILL, or its equivalent on Windows.
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(ended.is_none() || status.success(), "{command:?}: {status}");
    !status.success()
}

#[cfg(unix)]
pub(crate) fn send(child: &Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Returns whether a process is ready to handle Ctrl-C.
///
/// If this cannot be observed, waits a second and returns `true`.
pub(crate) fn catches_interrupts(child: &Child) -> bool {
    const SIGINT: u32 = 2;
    let Ok(status) = fs::read_to_string(format!("/proc/{}/status", child.id())) else {
        sleep(Duration::from_secs(1));
        return true;
    };
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    caught.is_some_and(|mask| mask >> (SIGINT - 1) & 1 == 1)
}

/// Starts `upg run MODEL -p -`; returns once it has the model and waits for more input.
#[cfg(unix)]
pub(crate) fn waiting_for_its_prompt(command: &mut Command) -> (Child, std::process::ChildStdin) {
    use std::io::Write;
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // More than a pipe holds: once it is written, most of it has been read.
    input.write_all("x ".repeat(1 << 16).as_bytes()).unwrap();
    (child, input)
}

/// Returns a tokenizer of two letters, which ignores all others, for the tiny phi3.
pub(crate) fn tokenizer_of_two_letters() -> String {
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1, "</s>": 2, "b": 3}, "merges": []}});
    tokenizer.to_string()
}

/// Compresses the tiny phi3 to q8, with the tokenizer of two letters.
#[cfg(unix)]
pub(crate) fn model_of_two_letters(folder: &Path) -> PathBuf {
    let (source, out) = (folder.join("source"), folder.join("model.safetensors"));
    copy_model("phi3", "phi3", &source);
    fs::write(source.join("tokenizer.json"), tokenizer_of_two_letters()).unwrap();
    success(&mut compress(&source, &out, &["-e", "q8"]));
    fs::remove_dir_all(source).unwrap();
    out
}

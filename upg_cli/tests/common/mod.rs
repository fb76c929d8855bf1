//! Helpers that run the real `upg` command.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "helpers of tests, not all of them of each"
)]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

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

pub fn upg<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    default_signals();
    let mut command = Command::new(env!("CARGO_BIN_EXE_upg"));
    command.args(args).stdin(Stdio::null());
    command
}

pub fn output(command: &mut Command) -> (Option<i32>, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// Runs a command that must succeed; returns its standard output.
pub fn succeed<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let mut command = upg(args);
    let (code, stdout, stderr) = output(&mut command);
    assert_eq!(code, Some(0), "{command:?}: {stderr}");
    stdout
}

pub fn tiny_model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../upg_kernel/tests/data/tiny-models")
        .join(name)
}

/// Compresses the tiny phi3 with this encoding to `folder/NAME`.
pub fn compress_tiny(folder: &Path, name: &str, encoding: &str, more: &[&str]) -> PathBuf {
    let out = folder.join(name);
    let source = tiny_model("phi3");
    let args: [&OsStr; 6] = [
        "compress".as_ref(),
        source.as_ref(),
        "-o".as_ref(),
        out.as_ref(),
        "--encoding".as_ref(),
        encoding.as_ref(),
    ];
    succeed(args.into_iter().chain(more.iter().map(OsStr::new)));
    out
}

/// Returns the names of all files in a folder, including hidden ones.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Returns whether a process is ready to handle Ctrl-C.
///
/// If this cannot be observed, waits a second and returns `true`.
pub fn catches_interrupts(child: &Child) -> bool {
    const SIGINT: u32 = 2;
    let Ok(status) = fs::read_to_string(format!("/proc/{}/status", child.id())) else {
        std::thread::sleep(std::time::Duration::from_secs(1));
        return true;
    };
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.map(|mask| u64::from_str_radix(mask.trim(), 16).unwrap());
    caught.is_some_and(|mask| mask >> (SIGINT - 1) & 1 == 1)
}

/// Compresses the tiny phi3 to q8, with a tokenizer of two letters that ignores all others.
pub fn model_of_two_letters(folder: &Path) -> PathBuf {
    let (source, out) = (folder.join("source"), folder.join("model.safetensors"));
    fs::create_dir(&source).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(tiny_model("phi3").join(file), source.join(file)).unwrap();
    }
    let special = |id: u32, content: &str| {
        serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false})
    };
    let tokenizer = serde_json::json!({"version": "1.0", "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "model": {"type": "BPE", "vocab": {"a": 0, "<s>": 1, "</s>": 2, "b": 3}, "merges": []}});
    fs::write(source.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let [from, to] = [&source, &out].map(|path| path.to_str().unwrap());
    succeed(["compress", from, "-o", to, "--encoding", "q8"]);
    fs::remove_dir_all(source).unwrap();
    out
}

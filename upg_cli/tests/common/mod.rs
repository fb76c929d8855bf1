//! Runs the real `upg` command.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "helpers of tests, not all of them of each"
)]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

pub fn upg<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
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

/// Runs a command that has to succeed; returns what it printed.
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

/// The tiny phi3 in this encoding, as `folder/NAME`.
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

/// Names of what is in a folder, hidden files too.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

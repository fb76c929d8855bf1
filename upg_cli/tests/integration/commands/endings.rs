//! Work that ends early: by Ctrl-C, a full disk or a closed pipe.

#[cfg(unix)]
use crate::common::{
    catches_interrupts, compress, names, output, send, smollm2, smollm2_gguf, succeed, tiny_model,
    wait_until,
};
use crate::common::{compress_tiny, upg};
#[cfg(unix)]
use nix::sys::signal::Signal::SIGINT;
#[cfg(unix)]
use std::fs;
#[cfg(unix)]
use std::io::Write;
#[cfg(unix)]
use std::process::Command;
use std::process::Stdio;

#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer_and_not_the_chat() {
    const STORY: &str = "Write a long story about a dragon.";
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("text");
    let mut child = upg(["chat", smollm2(), "--temp", "0"])
        .stdin(Stdio::piped())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let text = || fs::read_to_string(&out).unwrap();
    for question in [STORY, "Write a long story about a ship."] {
        let before = text().len();
        writeln!(input, "{question}").unwrap();
        wait_until("answer", || text().len() > before + 20);
        send(&child, SIGINT);
        wait_until("end of the answer", || text().ends_with('\n'));
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    // Both were stopped: the start of a single answer is longer than both.
    let beginning = [
        "run",
        smollm2(),
        "--quiet",
        "--temp",
        "0",
        "-n",
        "300",
        STORY,
    ];
    assert!(text().len() < succeed(beginning).len(), "{}", text());
}

/// A file size limit fails writes as a full disk does, and needs no privileges to set up.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let model = compress_tiny(folder.path(), "model", "q8", &[]);
    let work = folder.path().join("work");
    fs::create_dir(&work).unwrap();
    let (source, model) = (tiny_model("phi3"), model.to_str().unwrap());
    let ids = vec!["1"; 200].join(",");
    for args in [
        vec!["compress", source.to_str().unwrap(), "-o", "out"],
        vec!["decompress", model, "-o", "."],
        vec!["run", model, "--tokens", &ids, "--logits", "out"],
    ] {
        // In blocks of 512 bytes.
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -f 64; exec \"$0\" \"$@\""])
            .arg(env!("CARGO_BIN_EXE_upg"))
            .args(&args)
            .current_dir(&work);
        let (code, _, stderr) = output(&mut command);
        assert_eq!(code, Some(1), "{args:?}: {stderr}");
        assert!(
            stderr.starts_with("upg: ") && stderr.contains("cannot write"),
            "{stderr}"
        );
        assert_eq!(names(&work), [""; 0], "{args:?}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_work_with_its_exit_code_and_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut command = compress(&smollm2_gguf(), &out, &["-e", "t2"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    wait_until("handler", || catches_interrupts(&child));
    send(&child, SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(folder.path()), [""; 0]);

    let mut child = upg([
        "run",
        smollm2(),
        "--raw",
        "Once upon a time",
        "-n",
        "8000",
        "--temp",
        "0",
    ])
    .stdout(fs::File::create(folder.path().join("text")).unwrap())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let text = || fs::read_to_string(folder.path().join("text")).unwrap();
    wait_until("answer", || text().len() > 20);
    send(&child, SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(text().starts_with("Once upon a time") && text().ends_with('\n'));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let model = compress_tiny(folder.path(), "model", "q8", &[]);
    let mut child = upg(["inspect", model.to_str().unwrap(), "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

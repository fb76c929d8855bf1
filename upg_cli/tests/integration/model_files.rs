//! Model files that are overwritten during use, mapped or read into memory.

use crate::common::{
    compress_tiny, model_of_two_letters, names, output, send, succeed, upg, wait_until,
    waiting_for_its_prompt,
};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Output};

/// Largest page size in bytes of the supported systems.
const LARGEST_PAGE: usize = 1 << 16;

/// Starts `upg run` on a model of two letters, which has no token for its first input.
fn run(model: &Path, more: &[&str]) -> (Child, ChildStdin) {
    let model = model.to_str().unwrap();
    let run = [
        "run", model, "--raw", "-", "-n", "4", "--temp", "0", "--quiet",
    ];
    waiting_for_its_prompt(upg(run).args(more))
}

fn answer(child: Child, mut input: ChildStdin) -> Output {
    input.write_all(b"abba").unwrap();
    drop(input);
    child.wait_with_output().unwrap()
}

#[test]
fn a_file_that_is_cut_short_while_it_is_mapped_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_of_two_letters(folder.path());
    let whole = fs::read(&model).unwrap();
    // The pages that are cut off hold weights that every token needs.
    assert!(whole.len() > 4 * LARGEST_PAGE);
    let undisturbed = {
        let (child, input) = run(&model, &[]);
        answer(child, input)
    };
    assert!(undisturbed.status.success(), "{undisturbed:?}");
    for threads in ["1", "3"] {
        for kept in [0, LARGEST_PAGE, 2 * LARGEST_PAGE] {
            let (child, input) = run(&model, &["--threads", threads]);
            let file = File::options().write(true).open(&model).unwrap();
            file.set_len(kept as u64).unwrap();
            let Output { status, stderr, .. } = answer(child, input);
            let stderr = String::from_utf8(stderr).unwrap();
            assert_eq!(status.code(), Some(3), "{stderr}");
            let expected = format!(
                "upg: {}: the file was cut short or overwritten while it was in use, or its disk cannot be \
                 read; fetch or compress it again, and replace model files by renaming, not by copying over them\n",
                model.display()
            );
            assert_eq!(stderr, expected);
            fs::write(&model, &whole).unwrap();
        }
    }
    // A renamed file is a different file.
    let (child, input) = run(&model, &[]);
    fs::write(folder.path().join("other"), b"other").unwrap();
    fs::rename(folder.path().join("other"), &model).unwrap();
    assert_eq!(answer(child, input).stdout, undisturbed.stdout);
}

#[test]
fn a_bus_error_elsewhere_does_what_it_did() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_of_two_letters(folder.path());
    let (mut child, _input) = run(&model, &[]);
    // The first signals gradually restore the previous action.
    wait_until("end", || {
        send(&child, Signal::SIGBUS);
        child.try_wait().unwrap().is_some()
    });
    let ended = child.wait().unwrap();
    assert_eq!(ended.signal(), Some(Signal::SIGBUS as i32), "{ended}");
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    assert_eq!(stderr, "");
}

#[test]
fn a_file_that_was_read_into_memory_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_of_two_letters(folder.path());
    let (child, input) = run(&model, &[]);
    let undisturbed = answer(child, input);
    let (child, input) = run(&model, &["--no-mmap"]);
    fs::write(&model, b"gone").unwrap();
    let found = answer(child, input);
    assert!(found.status.success(), "{found:?}");
    assert_eq!(found.stdout, undisturbed.stdout);
}

/// Every command gives the same result with it.
#[test]
fn what_is_read_into_memory_is_what_would_be_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let text = |name: &str| fs::read(at(name)).unwrap();
    let model = at("mapped");
    compress_tiny(folder.path(), "mapped", "t3", &[]);
    compress_tiny(folder.path(), "read", "t3", &["--no-mmap"]);
    assert!(text("mapped") == text("read"));
    for flag in [&[][..], &["--no-mmap"]] {
        let name = |kind: &str| at(&format!("{kind}{}", flag.len()));
        let run = |args: &[&str]| succeed(args.iter().chain(flag));
        assert!(run(&["verify", &model]).contains("sound"));
        let inspected = run(&["inspect", &model]);
        fs::write(name("inspected"), inspected).unwrap();
        run(&[
            "run",
            &model,
            "--tokens",
            "5,6,7",
            "--logits",
            &name("logits"),
        ]);
        run(&["decompress", &model, "-o", &name("hf")]);
    }
    for kind in ["inspected", "logits"] {
        assert!(
            text(&format!("{kind}0")) == text(&format!("{kind}1")),
            "{kind}"
        );
    }
    assert_eq!(
        names(&folder.path().join("hf0")),
        names(&folder.path().join("hf1"))
    );
    for name in names(&folder.path().join("hf0")) {
        assert!(
            text(&format!("hf0/{name}")) == text(&format!("hf1/{name}")),
            "{name}"
        );
    }
}

/// Damage that only a checksum shows is found when the file is read, with the message of
/// `upg verify`.
#[test]
fn a_damaged_file_is_refused_when_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let model = compress_tiny(folder.path(), "model", "q8", &[]);
    let mut bytes = fs::read(&model).unwrap();
    let place = bytes.len() - 1000;
    bytes[place] ^= 1;
    fs::write(&model, bytes).unwrap();
    let model = model.to_str().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let (code, _, verified) = output(&mut upg(["verify", model]));
    assert_eq!(code, Some(1));
    assert!(verified.contains("(format rule 15)"), "{verified}");
    for args in [
        &["verify", model][..],
        &["inspect", model],
        &["run", model, "--tokens", "1", "--logits", out],
        &["decompress", model, "-o", out],
        &["bench", model, "-p", "0", "-n", "1", "--repetitions", "1"],
    ] {
        let (code, _, stderr) = output(&mut upg(args.iter().chain(&["--no-mmap"])));
        assert_eq!((code, &stderr), (Some(1), &verified), "{args:?}");
    }
    // A mapped file is read only as needed, and no checksum is computed.
    succeed(["inspect", model]);
    assert_eq!(names(folder.path()), ["model"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_does_not_fit_in_memory_is_refused() {
    const BYTES: u64 = 8 << 30;
    let folder = tempfile::tempdir().unwrap();
    let big = folder.path().join("big");
    File::create(&big).unwrap().set_len(BYTES).unwrap();
    let mut command = std::process::Command::new("sh");
    // Address space limit in KiB, for the program and all its threads.
    let limited = "ulimit -v 6000000; exec \"$0\" \"$@\"";
    command.args([
        "-c",
        limited,
        env!("CARGO_BIN_EXE_upg"),
        "inspect",
        "--no-mmap",
    ]);
    let (code, _, stderr) = output(command.arg(&big));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(
        stderr.contains(&format!("no memory for its {BYTES} bytes")),
        "{stderr}"
    );
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

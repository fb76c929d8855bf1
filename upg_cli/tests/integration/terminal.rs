//! The real `upg` command on a pseudo-terminal, and its reaction to signals.

use crate::common::{compress, copy_model, output, send, success, upg, wait_until};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Creates a model that answers with the last token of the prompt, over and over.
///
/// Its tokens are `token(0..=255)`, in the spelling of byte-level tokenizers, except that 1 is `a`.
fn model(folder: &Path, token: impl Fn(usize) -> String) -> PathBuf {
    let source = folder.join("source");
    copy_model("phi3", "phi3", &source);
    let spelled = |id: usize| if id == 1 { "a".to_owned() } else { token(id) };
    let vocab: serde_json::Map<String, Value> =
        (0..256).map(|id| (spelled(id), json!(id))).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true, "vocab": vocab, "merges": []},
    });
    fs::write(source.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let template = "{% for message in messages %}{{ message.content }}{% endfor %}";
    fs::write(source.join("chat_template.jinja"), template).unwrap();
    let path = folder.join("model.safetensors");
    success(&mut compress(&source, &path, &["-e", "q8"]));
    path
}

/// Tokens that turn the text red: `ě` spells the byte 0x1B.
fn red(id: usize) -> String {
    format!("ě[31m{id}")
}

/// Tokens so long that a hundred of them fill any pipe.
fn long(id: usize) -> String {
    format!("{id:04}").repeat(1000)
}

/// Pseudo-terminal with a record of the output.
struct Terminal {
    slave: OwnedFd,
    keys: File,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    fn new() -> Self {
        let pty = openpty(None, None).unwrap();
        let keys = File::from(pty.master);
        let mut screen = keys.try_clone().unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&shown);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = screen.read(&mut buffer) {
                sink.lock().unwrap().extend(&buffer[..n]);
            }
        });
        Self {
            slave: pty.slave,
            keys,
            shown,
        }
    }

    fn stdio(&self) -> Stdio {
        self.slave.try_clone().unwrap().into()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    fn flags(&self) -> LocalFlags {
        tcgetattr(&self.slave).unwrap().local_flags
    }

    /// Returns whether the terminal, not the program, edits lines and shows them.
    fn is_cooked(&self) -> bool {
        self.flags().contains(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    /// Returns whether the terminal edits lines without showing them.
    fn is_silent(&self) -> bool {
        self.flags().contains(LocalFlags::ICANON) && !self.flags().contains(LocalFlags::ECHO)
    }

    fn start(&self, command: &mut Command) -> Child {
        command
            .env("TERM", "xterm")
            .stdin(self.stdio())
            .stdout(self.stdio())
            .stderr(self.stdio())
            .spawn()
            .unwrap()
    }
}

/// Returns the exit code, or `None` if a signal ended the process.
fn code(child: &mut Child) -> Option<i32> {
    let mut status = None;
    wait_until("end", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap().code()
}

/// Waits until `child` has handled every signal and all its threads sleep.
///
/// On Linux its state shows this: no signal is pending, and in two consecutive samples all threads
/// sleep and none has run in between. Elsewhere it waits for a fixed time.
fn settle(child: &Child) {
    if !cfg!(target_os = "linux") {
        return std::thread::sleep(Duration::from_millis(300));
    }
    let threads = || -> Option<Vec<String>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", child.id())).ok()?;
        tasks
            .map(|task| {
                let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
                let value = |key: &str| {
                    let line = status.lines().find(|line| line.starts_with(key))?;
                    Some(line.split_whitespace().nth(1)?.to_owned())
                };
                let is_at_rest = value("State:")? == "S"
                    && ["SigPnd:", "ShdPnd:"]
                        .iter()
                        .all(|key| value(key).is_some_and(|set| set.bytes().all(|b| b == b'0')));
                is_at_rest.then_some(format!(
                    "{} {} {}",
                    value("Pid:")?,
                    value("voluntary_ctxt_switches:")?,
                    value("nonvoluntary_ctxt_switches:")?
                ))
            })
            .collect()
    };
    wait_until("rest", || {
        threads().is_some_and(|now| threads() == Some(now))
    });
}

/// Time after which another signal counts as a second one and ends the process at once.
const SECOND: Duration = Duration::from_millis(500);

const ENDS: [(Signal, i32); 3] = [
    (Signal::SIGINT, 130),
    (Signal::SIGTERM, 143),
    (Signal::SIGHUP, 129),
];

#[test]
fn texts_and_names_do_not_steer_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), red);
    let model = model.to_str().unwrap();
    let run = || {
        upg([
            "run",
            model,
            "--raw",
            "\u{1b}[31m0",
            "-n",
            "3",
            "--quiet",
            "--temp",
            "0",
        ])
    };
    let (_, piped, _) = output(&mut run());
    assert_eq!(piped.matches("\u{1b}[31m").count(), 4, "{piped:?}");

    let terminal = Terminal::new();
    let mut child = terminal.start(&mut run());
    assert_eq!(code(&mut child), Some(0));
    let spelled = piped.replace('\u{1b}', r"\u{1b}").replace('\n', "\r\n");
    wait_until("answer", || terminal.text() == spelled);

    // User input is echoed, and so is a file name.
    let terminal = Terminal::new();
    let mut child = terminal.start(&mut upg([
        "run",
        model,
        "--raw",
        "a\u{9b}2J\r!",
        "-n",
        "1",
        "--quiet",
    ]));
    assert_eq!(code(&mut child), Some(0));
    wait_until("prompt", || terminal.text().starts_with(r"a\u{9b}2J\u{d}!"));
    let terminal = Terminal::new();
    let mut child = terminal.start(&mut upg(["run", "no\u{202e}file\u{1b}c", "-p", "a"]));
    assert_eq!(code(&mut child), Some(1));
    wait_until("error", || {
        terminal.text().starts_with(r"upg: no\u{202e}file\u{1b}c: ")
    });
}

/// Starts a conversation whose answers have this many tokens, and which leaves no history.
fn chat(model: &Path, tokens: &str) -> Command {
    let model = model.to_str().unwrap();
    upg(["chat", model, "-n", tokens, "--temp", "0", "--no-history"])
}

#[test]
fn signals_at_the_prompt_end_a_chat_and_leave_the_terminal_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), |id| format!("word{id}"));
    // The echo of a question has one such word, an answer has two in a row.
    // The prompt is drawn after the terminal is raw; before that a signal is one between prompts.
    let has_next_prompt = |text: &str| {
        text.rsplit_once("word0word0")
            .is_some_and(|(_, rest)| rest.contains("> "))
    };
    for (signal, expected) in ENDS {
        let terminal = Terminal::new();
        assert!(terminal.is_cooked());
        let mut child = terminal.start(&mut chat(&model, "2"));
        wait_until("prompt", || {
            terminal.text().contains("> ") && !terminal.is_cooked()
        });
        // After an answer too.
        (&terminal.keys).write_all(b"word0\r").unwrap();
        wait_until("second prompt", || {
            has_next_prompt(&terminal.text()) && !terminal.is_cooked()
        });
        send(&child, signal);
        if signal == Signal::SIGINT {
            wait_until("hint", || {
                let text = terminal.text();
                text.rsplit_once("Ctrl-C again")
                    .is_some_and(|(_, rest)| rest.contains("> "))
                    && !terminal.is_cooked()
            });
            send(&child, signal);
        }
        // Ctrl-C twice at the prompt exits normally, as Ctrl-D does.
        let expected = if signal == Signal::SIGINT {
            0
        } else {
            expected
        };
        assert_eq!(
            code(&mut child),
            Some(expected),
            "{signal}: {}",
            terminal.text()
        );
        assert!(terminal.is_cooked(), "{signal}");
    }
    // A pipe that sends nothing.
    for (signal, expected) in ENDS {
        let mut command = chat(&model, "2");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"word0\n").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut answer)
            .unwrap();
        assert!(answer.ends_with('\n'));
        // Independent of whether it already waits for a line.
        send(&child, signal);
        assert_eq!(code(&mut child), Some(expected), "{signal}");
    }
}

#[test]
fn lines_that_are_typed_before_the_prompt_are_all_answered() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), |id| format!("word{id}"));
    let terminal = Terminal::new();
    let lines = b"word0\n/set seed 1\n/set seed 2\n/bye\n";
    (&terminal.keys).write_all(lines).unwrap();
    let mut child = terminal.start(&mut chat(&model, "2"));
    assert_eq!(code(&mut child), Some(0), "{}", terminal.text());
    for expected in ["word0word0", "seed is 1", "seed is 2"] {
        wait_until(expected, || terminal.text().contains(expected));
    }
}

#[test]
fn what_is_typed_during_an_answer_does_not_stand_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), long);
    let terminal = Terminal::new();
    let mut child = terminal.start(&mut chat(&model, "100000"));
    wait_until("prompt", || terminal.text().contains("> "));
    // While nobody reads the screen, the answer cannot end.
    let unread = terminal.shown.lock().unwrap();
    (&terminal.keys).write_all(b"a\r").unwrap();
    wait_until("answer", || terminal.is_silent());
    (&terminal.keys).write_all(b"/set seed 77\n").unwrap();
    send(&child, Signal::SIGINT);
    drop(unread);
    wait_until("next line", || terminal.text().contains("> /set seed 77"));
    assert_eq!(terminal.text().matches("/set seed 77").count(), 1);
    (&terminal.keys).write_all(b"/bye\r").unwrap();
    assert_eq!(code(&mut child), Some(0), "{}", terminal.text());
    assert!(terminal.is_cooked());
}

/// Starts a command whose answer fills a pipe that nobody reads.
/// It blocks where it checks no flag.
fn hold_up(mut command: Command) -> (Child, PipeReader) {
    let (reader, writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
    let child = command.stdout(writer.try_clone().unwrap()).spawn().unwrap();
    wait_until("full pipe", || {
        let mut room = [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)];
        poll(&mut room, PollTimeout::ZERO).unwrap() == 0
    });
    // The command holds the write end too; the reader must see the end of the answer.
    drop(command);
    settle(&child);
    (child, reader)
}

#[test]
fn a_second_signal_ends_the_process_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), long);
    for (signal, expected) in ENDS {
        let (mut child, _reader) = hold_up(long_answer(&model));
        send(&child, Signal::SIGINT);
        settle(&child);
        std::thread::sleep(SECOND);
        assert_eq!(child.try_wait().unwrap(), None, "it was not held up");
        send(&child, signal);
        assert_eq!(code(&mut child), Some(expected), "{signal}");
    }
}

fn long_answer(model: &Path) -> Command {
    let model = model.to_str().unwrap();
    upg(["run", model, "--raw", &long(0), "-n", "200", "--temp", "0"])
}

/// `timeout` signals a process and its group, and so does a closing terminal.
#[test]
fn signals_at_once_are_one() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), long);
    for (signal, expected) in ENDS {
        let (mut child, mut answer) = hold_up(long_answer(&model));
        send(&child, signal);
        std::thread::sleep(Duration::from_millis(1));
        send(&child, signal);
        settle(&child);
        assert_eq!(child.try_wait().unwrap(), None, "{signal}: no clean end");
        let reader = std::thread::spawn(move || answer.read_to_end(&mut Vec::new()).unwrap());
        assert_eq!(code(&mut child), Some(expected), "{signal}");
        assert!(reader.join().unwrap() < 400_000, "the answer was not ended");
    }
}

/// `nohup` and the background jobs of shells start with signals ignored.
#[test]
fn signals_that_are_ignored_stay_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), long);
    let started = long_answer(&model);
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP INT; exec \"$0\" \"$@\""])
        .arg(started.get_program())
        .args(started.get_args())
        .stdin(Stdio::null());
    let (mut child, mut answer) = hold_up(command);
    send(&child, Signal::SIGHUP);
    send(&child, Signal::SIGINT);
    settle(&child);
    let reader = std::thread::spawn(move || answer.read_to_end(&mut Vec::new()).unwrap());
    assert_eq!(code(&mut child), Some(0));
    assert!(reader.join().unwrap() > 400_000, "the answer was ended");
}

#[test]
fn sigterm_in_an_answer_ends_the_chat_and_ctrl_c_the_answer() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), long);
    for (signal, expected) in [
        (Signal::SIGTERM, Some(143)),
        (Signal::SIGHUP, Some(129)),
        (Signal::SIGINT, None),
    ] {
        let (asked, mut input) = std::io::pipe().unwrap();
        writeln!(input, "{}", long(0)).unwrap();
        let mut command = chat(&model, "200");
        let (mut child, mut answer) = {
            command.stdin(asked);
            hold_up(command)
        };
        send(&child, signal);
        settle(&child);
        let reader = std::thread::spawn(move || answer.read_to_end(&mut Vec::new()).unwrap());
        // Until then it could wait for more input.
        let input = expected.is_some().then_some(input);
        assert_eq!(code(&mut child), Some(expected.unwrap_or(0)), "{signal}");
        assert!(reader.join().unwrap() < 400_000, "the answer was not ended");
        drop(input);
    }
}

#[test]
fn endless_texts_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path(), red);
    let (model, phi3) = (model.to_str().unwrap(), folder.path().join("source"));
    let phi3 = phi3.to_str().unwrap();
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let zeros = || File::open("/dev/zero").unwrap();
    for (mut command, input) in [
        (upg(["eval", model, "--text", "/dev/zero"]), Stdio::null()),
        (upg(["eval", model, "--text", "/dev/stdin"]), zeros().into()),
        (
            upg(["compress", phi3, "-o", out, "--calibrate", "/dev/zero"]),
            Stdio::null(),
        ),
        (upg(["run", model, "-p", "-"]), zeros().into()),
        (upg(["chat", model]), zeros().into()),
    ] {
        let (code, _, stderr) = output(command.stdin(input));
        assert_eq!(code, Some(1), "{command:?}: {stderr}");
        assert!(
            stderr.contains("over 16777216 bytes"),
            "{command:?}: {stderr}"
        );
    }
}

/// A question comes before an original is compressed, and `--yes` answers it.
#[test]
fn an_original_is_compressed_after_a_yes() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("source"), folder.path().join("upg"));
    copy_model("phi3", "phi3", &source);
    let compressed = || {
        let files = fs::read_dir(&cache).into_iter().flatten();
        let paths = files.map(|f| f.unwrap().path());
        paths
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .count()
    };
    for (answer, more, is_asked, expected) in [
        ("n\n", &[][..], true, 130),
        ("\n", &["--encoding", "q4"], true, 0),
        ("", &["--yes"], false, 0),
    ] {
        let before = compressed();
        let mut terminal = Terminal::new();
        let mut command = upg(["verify", source.to_str().unwrap()]);
        let mut child = terminal.start(command.args(more).env("UPG_CACHE", &cache));
        if is_asked {
            wait_until("question", || terminal.text().contains("[Y/n]"));
            terminal.keys.write_all(answer.as_bytes()).unwrap();
        }
        assert_eq!(code(&mut child), Some(expected), "{}", terminal.text());
        assert_eq!(terminal.text().contains("[Y/n]"), is_asked);
        assert_eq!(compressed() - before, usize::from(expected == 0));
    }
}

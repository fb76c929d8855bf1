//! `upg run` and `upg chat` with a real model.

use crate::common::{smollm2, succeed, succeed_json, upg};
use std::fs;
use std::io::Write;
use std::process::Stdio;

/// Runs a command with this standard input; returns its exit code, output and messages.
fn with_input(args: &[&str], input: &str) -> (Option<i32>, String, String) {
    let mut command = upg(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    // A command that fails early reads nothing.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn a_prompt_is_an_argument_a_file_or_the_input_and_framed_by_the_template() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("question");
    fs::write(&file, "What is 2+2?\n").unwrap();
    let file = file.to_str().unwrap();
    fn run<'a>(args: &[&'a str]) -> Vec<&'a str> {
        [&["run", smollm2(), "--temp", "0", "-n", "12"], args].concat()
    }
    let answer = succeed(run(&["What is 2+2?"]));
    assert!(answer.contains('4'), "{answer}");
    assert_eq!(succeed(run(&["-p", "What is 2+2?"])), answer);
    assert_eq!(succeed(run(&["-f", file])), answer);
    for args in [run(&[]), run(&["-"])] {
        let (code, text, said) = with_input(&args, "What is 2+2?\n");
        assert_eq!((code, text), (Some(0), answer.clone()));
        assert_eq!(said, "");
    }
    assert_ne!(
        succeed(run(&["--system", "You are a pirate.", "What is 2+2?"])),
        answer
    );
    let (_, of_input, _) = with_input(&run(&["-f", "-"]), "What is 2+2?\n");
    assert_eq!(of_input, answer);
    let both = succeed(run(&["What is this sum?", "-f", file]));
    assert_ne!(both, answer);
    let (_, _, said) = with_input(&["run", smollm2(), "hi", "--temp", "0", "-n", "3"], "");
    assert!(said.contains("cut after 3 tokens"), "{said}");
    // Without the template the text goes on.
    let raw = succeed(run(&["--raw", "1, 2, 3, 4, 5,"]));
    assert!(raw.starts_with("1, 2, 3, 4, 5, 6, 7,"), "{raw}");
    for input in ["", "\n"] {
        let (code, _, said) = with_input(&run(&[]), input);
        assert_eq!(code, Some(2));
        assert!(said.contains("no prompt: the text is empty"), "{said}");
    }
}

#[test]
fn json_says_why_an_answer_ended_and_its_seed_gives_it_again() {
    let run = |args: &[&str]| succeed_json([&["run", smollm2(), "--json", "hi"], args].concat());
    let cut = run(&["-n", "3", "--temp", "0"]);
    assert_eq!(cut["finish_reason"], "length");
    assert_eq!(cut["generated_tokens"], 3);
    assert!(cut["prompt_tokens"].as_u64().unwrap() > 10);
    let whole = run(&["--temp", "0", "--stop", "How"]);
    assert_eq!(whole["finish_reason"], "stop");
    assert!(!whole["text"].as_str().unwrap().contains("How"));
    // Without a seed each run has its own.
    let [first, second] = [(); 2].map(|()| run(&["-n", "20", "--temp", "1.5"]));
    assert_ne!(first["seed"], second["seed"]);
    let seed = first["seed"].to_string();
    let again = run(&["-n", "20", "--temp", "1.5", "--seed", &seed]);
    assert_eq!(again["text"], first["text"]);
    assert_eq!(run(&["-n", "0"])["text"], "");
}

#[test]
fn chat_keeps_to_its_commands_and_ends_with_its_input() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved.json");
    let name = saved.to_str().unwrap();
    let input = format!(
        "Say hello.\n/set top-k 7\n/show\n/undo\n/regen\n\n//etc is what?\nIt is \\\na folder.\n\
         /nothing\n/system Be brief.\n/save {name}\n/clear\n/load {name}\n/set seed x\n/bye\nunread"
    );
    let args = ["chat", smollm2(), "-n", "8", "--temp", "0", "--stats"];
    let (code, text, said) = with_input(&args, &input);
    assert_eq!(code, Some(0), "{said}");
    assert!(text.contains("top_k              7"), "{text}");
    assert!(text.contains("1 question; "), "{text}");
    for expected in [
        "no question yet",
        "no command '/nothing'",
        "//nothing sends the text",
        "2 questions from",
        "in place of 0 questions",
        "top-k is 7",
        "forgotten; 0 questions left",
        "'x' is no value of seed",
        " of 8192]",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let saved: serde_json::Value = serde_json::from_slice(&fs::read(&saved).unwrap()).unwrap();
    let messages = saved["messages"].as_array().unwrap();
    let texts: Vec<_> = messages
        .iter()
        .map(|m| m["content"].as_str().unwrap())
        .collect();
    assert_eq!(messages.len(), 5);
    assert_eq!(
        [texts[0], texts[1], texts[3]],
        ["Be brief.", "/etc is what?", "It is \na folder."]
    );
    assert_eq!(messages[4]["role"], "assistant");
    // A file that this conversation does not come from is not overwritten.
    let other = folder.path().join("other");
    fs::write(&other, "text").unwrap();
    let name = other.to_str().unwrap();
    let (code, _, said) = with_input(&args, &format!("/save x\nhi\n/save {name}\n/load {name}\n"));
    assert_eq!(code, Some(0));
    for expected in [
        "no question yet",
        "the file exists",
        "no saved conversation",
    ] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert_eq!(fs::read(other).unwrap(), b"text");
}

#[test]
fn a_full_context_goes_on_without_the_oldest_questions() {
    let args = [
        "chat",
        smollm2(),
        "--context",
        "160",
        "-n",
        "24",
        "--temp",
        "0",
    ];
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("saved.json");
    let questions = "Tell me a story about a ship.\n".repeat(8);
    let input = format!("{questions}/save {}\n", saved.display());
    let (code, text, said) = with_input(&args, &input);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        text.lines().filter(|line| !line.is_empty()).count() >= 8,
        "{text}"
    );
    assert!(said.contains("no longer sees the oldest"), "{said}");
    // What the model no longer sees is still part of the conversation.
    let saved = fs::read_to_string(saved).unwrap();
    assert_eq!(saved.matches("about a ship").count(), 8, "{saved}");
    // A question that does not fit alone.
    let long = "hi\n".to_owned() + &"word ".repeat(200) + "\n/show\nhi\n";
    let (code, text, said) = with_input(&args, &long);
    assert_eq!(code, Some(0));
    assert!(
        said.contains("the question has 2") && said.contains("the context has 160"),
        "{said}"
    );
    // It is taken back, and the model still sees the one before.
    assert!(!said.contains("no longer sees"), "{said}");
    assert!(text.contains("\n1 question; "), "{text}");
}

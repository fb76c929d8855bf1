//! The real `upg` command: what it prints, what it leaves behind, how it ends.
//!
//! `UPG_TEST_GGUF` is the path of SmolLM2-135M-Instruct as GGUF; `./test.sh` fetches it and sets it.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use common::{compress_tiny, names, output, succeed, tiny_model, upg};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;
use tempfile::TempDir;

const ENCODINGS: [&str; 9] = ["keep", "mdcsr", "q8", "q4", "t2", "t3", "t4", "s8", "s4"];

fn gguf() -> PathBuf {
    let path = std::env::var_os("UPG_TEST_GGUF").expect(
        "UPG_TEST_GGUF is not set: run ./test.sh, which downloads SmolLM2-135M-Instruct and sets it",
    );
    path.into()
}

/// SmolLM2 as q8, made once for all tests.
fn smollm2() -> &'static str {
    static MODEL: LazyLock<(TempDir, String)> = LazyLock::new(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("smollm2.safetensors");
        let path = path.to_str().unwrap().to_owned();
        succeed([
            "compress",
            gguf().to_str().unwrap(),
            "-o",
            &path,
            "--encoding",
            "q8",
        ]);
        (folder, path)
    });
    &MODEL.1
}

#[test]
fn every_encoding_is_written_alike_by_any_number_of_threads_and_verifies() {
    let folder = tempfile::tempdir().unwrap();
    for encoding in ENCODINGS {
        let more = ["--embedding", encoding];
        let one = compress_tiny(
            folder.path(),
            "one",
            encoding,
            &[&more[..], &["--threads", "1"]].concat(),
        );
        let two = compress_tiny(
            folder.path(),
            "two",
            encoding,
            &[&more[..], &["--threads", "2"]].concat(),
        );
        assert!(
            fs::read(&one).unwrap() == fs::read(&two).unwrap(),
            "{encoding}"
        );
        let path = one.to_str().unwrap();
        assert!(succeed(["verify", path]).contains("sound"));
        let json: Value = serde_json::from_str(&succeed(["inspect", path, "--json"])).unwrap();
        let layers = json["layers"].as_array().unwrap();
        assert_eq!(layers.len(), if encoding == "keep" { 0 } else { 10 });
        assert!(layers.iter().all(|l| l["encoding"] == encoding));
        assert!(layers.iter().all(|l| l["error"].as_f64().unwrap() < 0.3));
        assert_eq!(json["weights"], 197_088);
        assert!(succeed(["inspect", path]).contains("bits per weight"));
    }
    assert_eq!(names(folder.path()), ["one", "two"]);
}

#[test]
fn keys_and_values_are_kept_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "keep", &[]);
    let logits = ["f32", "f16", "int8"].map(|cache| {
        let out = folder.path().join("logits");
        let (file, path) = (file.to_str().unwrap(), out.to_str().unwrap());
        let run = ["run", file, "--tokens", "5,6,7,8", "--logits", path];
        succeed([&run[..], &["--cache-type", cache]].concat());
        let bytes = fs::read(&out).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let data = tensors.tensor("logits").unwrap().data().as_chunks::<4>().0;
        data.iter()
            .map(|v| f32::from_le_bytes(*v))
            .collect::<Vec<_>>()
    });
    let difference = |of: &[f32]| {
        let pairs = of.iter().zip(&logits[0]).map(|(a, b)| (a - b).abs());
        pairs.fold(0.0, f32::max)
    };
    // Logits up to 5; measured: 3e-4 and 1e-2.
    let (f16, int8) = (difference(&logits[1]), difference(&logits[2]));
    assert!(
        0.0 < f16 && f16 < 3e-3 && f16 < int8 && int8 < 0.1,
        "{f16} {int8}"
    );
}

/// A prompt in one go and a matrix of every encoding: no bit of a logit depends on the number of threads.
#[test]
fn logits_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    for encoding in ENCODINGS {
        let file = compress_tiny(folder.path(), encoding, encoding, &[]);
        for tokens in ["5", "5,6,7,8,9,10,11,12,13,14"] {
            let logits = ["1", "2", "5"].map(|threads| {
                let out = folder.path().join("logits");
                let (file, path) = (file.to_str().unwrap(), out.to_str().unwrap());
                let run = ["run", file, "--tokens", tokens, "--logits", path];
                succeed([&run[..], &["--threads", threads]].concat());
                fs::read(&out).unwrap()
            });
            assert!(
                logits[0] == logits[1] && logits[1] == logits[2],
                "{encoding}"
            );
        }
    }
}

#[test]
fn logits_of_token_ids_are_written_for_every_position() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "keep", &[]);
    let out = folder.path().join("logits");
    let (file, path) = (file.to_str().unwrap(), out.to_str().unwrap());
    succeed(["run", file, "--tokens", "5,6,7", "--logits", path]);
    let bytes = fs::read(&out).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let found = tensors.tensor("logits").unwrap();
    assert_eq!((found.dtype(), found.shape()), (Dtype::F32, &[3, 256][..]));
    let model = upg_kernel::UPGModel::from_file(file).unwrap();
    let expected: Vec<f32> = model
        .forward(&[5, 6, 7])
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    let expected: Vec<u8> = expected.into_iter().flat_map(f32::to_le_bytes).collect();
    assert!(found.data() == expected);
}

#[test]
fn overrides_and_groups_reach_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let more = ["--tensor", "*.down_proj.weight=t3", "--group", "64"];
    let file = compress_tiny(folder.path(), "model", "q4", &more);
    let json = succeed(["inspect", file.to_str().unwrap(), "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    for layer in json["layers"].as_array().unwrap() {
        let name = layer["name"].as_str().unwrap();
        let expected = match name {
            _ if name.ends_with("down_proj.weight") => "t3",
            "model.embed_tokens.weight" | "lm_head.weight" => "q8",
            _ => "q4",
        };
        assert_eq!(layer["encoding"], expected, "{name}");
        let group = if expected == "t3" {
            Value::Null
        } else {
            64.into()
        };
        assert_eq!(layer["group"], group, "{name}");
    }
}

#[test]
fn a_real_model_answers_is_measured_and_goes_back_to_its_directory() {
    let folder = tempfile::tempdir().unwrap();
    let model = smollm2();
    let run = ["run", model, "-p", "The capital of France is", "-n", "4"];
    let text = succeed(run);
    assert!(
        text.starts_with("The capital of France is Paris."),
        "{text}"
    );
    assert_eq!(succeed([&run[..], &["--temperature", "0"]].concat()), text);
    // A seed says what comes out, another seed something else.
    let sampled = |seed| {
        succeed(
            [
                &run[..4],
                &["-n", "12", "--temperature", "1.5", "--seed", seed],
            ]
            .concat(),
        )
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let stopped = succeed([&run[..4], &["-n", "20", "--stop", "Paris"]].concat());
    assert_eq!(stopped, "The capital of France is \n");
    let chat = succeed([
        "run",
        model,
        "--chat",
        "-p",
        "Say hello.",
        "-n",
        "8",
        "--quiet",
    ]);
    assert!(chat.len() > 2 && !chat.contains("<|im_"), "{chat}");

    let text = folder.path().join("text");
    fs::write(&text, "It was a bright cold day in April. ".repeat(20)).unwrap();
    let text = text.to_str().unwrap();
    let eval = |against| {
        let inputs = ["eval", model, "--text", text, "--against", against];
        [&inputs[..], &["--window", "32", "--json"]].concat()
    };
    let json: Value = serde_json::from_str(&succeed(eval(model))).unwrap();
    assert!(json["perplexity"].as_f64().unwrap() > 1.0);
    assert!(
        json["bits_per_weight"].as_f64().unwrap()
            > json["bits_per_weight_blocks"].as_f64().unwrap()
    );
    assert_eq!(
        (json["kl_mean"].as_f64(), json["top1_agreement"].as_f64()),
        (Some(0.0), Some(1.0))
    );

    // Against the original, whose logits are computed once.
    let original = gguf();
    let logits = folder.path().join("logits");
    let logits = logits.to_str().unwrap();
    let against_original = eval(original.to_str().unwrap());
    let exact: Value = serde_json::from_str(&succeed(against_original.clone())).unwrap();
    let kept = [&against_original[..], &["--logits", logits]].concat();
    let first = succeed(kept.clone());
    assert_eq!(succeed(kept), first);
    let first: Value = serde_json::from_str(&first).unwrap();
    for (figure, error) in [
        ("kl_mean", "kl_error"),
        ("perplexity_ratio", "perplexity_ratio_error"),
        ("top1_agreement", "top1_error"),
    ] {
        let [found, expected] = [&first, &exact].map(|json| json[figure].as_f64().unwrap());
        let error = exact[error].as_f64().unwrap();
        assert!(
            (found - expected).abs() <= 0.01 * error,
            "{figure}: {found}, {expected}"
        );
    }

    let exported = folder.path().join("exported");
    succeed(["decompress", model, "-o", exported.to_str().unwrap()]);
    // A directory, which has not all of the files that a model may have.
    let of_directory = folder.path().join("logits of a directory");
    let kept = ["--logits", of_directory.to_str().unwrap()];
    let json = succeed([&eval(exported.to_str().unwrap())[..], &kept].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["kl_mean"].as_f64().unwrap() < 0.1, "{json}");
    assert_eq!(
        names(&exported),
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    let config: Value =
        serde_json::from_slice(&fs::read(exported.join("config.json")).unwrap()).unwrap();
    // The source has no plain type, so nothing but F32 is without loss.
    assert_eq!(config["torch_dtype"], "float32");
    // Its own export it may replace, and nothing of that stays that would be taken for the new one's.
    let tiny = compress_tiny(folder.path(), "tiny", "q8", &[]);
    let out = folder.path().join("replaced");
    for file in [model, tiny.to_str().unwrap()] {
        succeed(["decompress", file, "-o", out.to_str().unwrap()]);
    }
    assert_eq!(
        names(&out),
        ["config.json", "generation_config.json", "model.safetensors"]
    );
    // A directory again: what was decompressed exactly gives the same text.
    let again = folder.path().join("again");
    let again = again.to_str().unwrap();
    succeed([
        "compress",
        exported.to_str().unwrap(),
        "-o",
        again,
        "--encoding",
        "keep",
    ]);
    assert!(succeed(["run", again, "-p", "The capital of France is", "-n", "4"]).contains("Paris"));
}

#[test]
fn chat_keeps_to_its_commands_and_ends_with_its_input() {
    let mut child = upg(["chat", smollm2(), "-n", "8"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    input
        .write_all(b"Say hello.\n/clear\n\nSay it again.\n")
        .unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{errors}");
    let answers = text
        .lines()
        .filter(|l| l.chars().any(char::is_alphabetic))
        .count();
    assert!(answers >= 2, "{text}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_an_answer_and_not_the_chat() {
    const STORY: &str = "Write a long story about a dragon.";
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("text");
    let mut child = upg(["chat", smollm2(), "-n", "4000"])
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
        wait_until(|| text().len() > before + 20);
        interrupt(&child);
        wait_until(|| text().ends_with('\n'));
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    // Both were stopped: what is only the beginning of one answer is longer than the two.
    let beginning = [
        "run",
        smollm2(),
        "--chat",
        "--quiet",
        "-n",
        "300",
        "-p",
        STORY,
    ];
    assert!(text().len() < succeed(beginning).len(), "{}", text());
}

/// Arguments, exit code, and what the one line on standard error has to say. `{}` is a folder with
/// the files that `bad_inputs` makes.
#[rustfmt::skip]
const BAD: &[(&[&str], i32, &[&str])] = &[
    (&["compress", "{}/none", "-o", "{}/out"], 1, &["none", "No such file"]),
    (&["compress", "{}/empty", "-o", "{}/out"], 1, &["empty", "config.json"]),
    (&["compress", "{}/no-weights", "-o", "{}/out"], 1, &["no-weights", "model.safetensors"]),
    (&["compress", "{}/unknown-family", "-o", "{}/out"], 1, &["gptj", "llama"]),
    (&["compress", "{}/cut-weights", "-o", "{}/out"], 1, &["cut-weights/model.safetensors"]),
    (&["compress", "{}/text", "-o", "{}/out"], 1, &["text", ".gguf"]),
    (&["compress", "{}/phi3", "-o", "{}/none/out"], 1, &["no such folder", "make the folder"]),
    (&["compress", "{}/phi3", "-o", "{}/empty"], 2, &["directory"]),
    (&["compress", "{}/phi3", "-o", "{}/phi3/model.safetensors"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--group", "48"], 2, &["48", "32 or 64"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--tensor", "x*=q4"], 2, &["matches no matrix"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--calibrate", "{}/none"], 1, &["none", "No such file"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--calibrate", "{}/text"], 1, &["no tokenizer", "tokenizer.json"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--calibrate", "{}/lines.jsonl"], 1, &["lines.jsonl", "line 2", "'text'"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--calibrate"], 1, &["no tokenizer", "tokenizer.json"]),
    (&["compress", "{}/phi3", "-o", "{}/text", "--calibrate", "{}/text"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--report", "{}/phi3/../out"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--report", "{}/text", "--calibrate", "{}/text"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--report", "{}/out.partial"], 2, &["overwrite"]),
    (&["run", "{}/none", "-p", "x"], 1, &["none", "No such file"]),
    (&["run", "{}/empty", "-p", "x"], 1, &["empty", "not a regular file"]),
    (&["run", "{}/text", "-p", "x"], 1, &["text", "safetensors"]),
    (&["run", "{}/phi3/model.safetensors", "-p", "x"], 1, &["not a UPG file", "upg compress"]),
    (&["run", "{}/model", "-p", "x"], 1, &["no tokenizer"]),
    (&["run", "{}/cut", "-p", "x"], 1, &["cut", "not a whole safetensors file"]),
    (&["run", "{}/wrong-shape", "--tokens", "1", "--logits", "{}/out"], 1, &["shape [320, 96]", "config.json asks for"]),
    (&["run", "{}/model", "--tokens", "256", "--logits", "{}/out"], 2, &["256", "vocabulary"]),
    (&["run", "{}/model", "--tokens", "1", "--logits", "{}/none/out"], 1, &["no such folder"]),
    (&["run", "{smollm2}", "-p", "one two three four", "--context", "3"], 2, &["context of 3", "shorten"]),
    (&["run", "{smollm2}", "-p", ""], 2, &["no tokens"]),
    (&["run", "{}/model", "--tokens", "1", "--logits", "{}/model"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/phi3/config.json"], 2, &["overwrite"]),
    (&["compress", "{}/phi3", "-o", "{}/phi3/tokenizer.json"], 2, &["overwrite"]),
    (&["compress", "{}/odd-names", "-o", "{}/out"], 1, &["layer_scale.weight", "rule 14"]),
    (&["run", "{smollm2}", "-p", "x", "--temperature=-1"], 2, &["temperature"]),
    (&["run", "{smollm2}", "-p", "x", "--threads", "0"], 2, &["threads"]),
    (&["run", "{smollm2}", "-p", "x", "--threads", "1000000"], 2, &["1024"]),
    (&["compress", "{}/phi3", "-o", "{}/out", "--encoding", "t3", "--embedding", "t3", "--group", "64"], 2, &["leave it out"]),
    (&["decompress", "{}/model", "-o", "{}/phi3"], 2, &["another model", "--force"]),
    (&["decompress", "{}/model", "-o", "{}/no-weights"], 2, &["config.json", "--force"]),
    (&["decompress", "{}/model", "-o", "{}/lone-template"], 2, &["chat_template.jinja", "--force"]),
    (&["decompress", "{}/huge", "-o", "{}/none", "--dtype", "f16"], 1, &["F16", "bf16"]),
    (&["compress", "{}/infinite", "-o", "{}/out", "--encoding", "keep"], 1, &["inf", "row"]),
    (&["verify", "{}/damaged"], 1, &["damaged", "checksum", "rule 15"]),
    (&["verify", "{}/damaged-header"], 1, &["damaged-header", "rule"]),
    (&["inspect", "{}/text"], 1, &["text"]),
    (&["decompress", "{}/model", "-o", "{}/text"], 1, &["text", "folder"]),
    (&["decompress", "{}/upg-dir/model.safetensors", "-o", "{}/upg-dir", "--force"], 2, &["overwrite"]),
    (&["eval", "{smollm2}", "--text", "{}/none"], 1, &["none"]),
    (&["eval", "{smollm2}", "--text", "{}/text"], 2, &["window of 512"]),
    (&["eval", "{}/model", "--text", "{}/text"], 1, &["no tokenizer"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{}/phi3"], 1, &["no tokenizer"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{}/text"], 1, &["text", "unknown kind"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{smollm2}", "--logits", "{}/text"], 2, &["text", "upg eval wrote"]),
    (&["chat", "{}/model"], 1, &["no chat template"]),
];

/// Everything that `BAD` names.
fn bad_inputs(folder: &Path) {
    let at = |name: &str| folder.join(name);
    let copy = |name: &str| {
        fs::create_dir(at(name)).unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(tiny_model("phi3").join(file), at(name).join(file)).unwrap();
        }
    };
    let replace = |path: PathBuf, from: &str, to: &str| {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(path, text.replace(from, to)).unwrap();
    };
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("text"), "no model\n").unwrap();
    fs::write(at("story"), "Once upon a time there was a miller.\n").unwrap();
    fs::write(
        at("lines.jsonl"),
        "{\"text\": \"one\"}\n{\"prompt\": \"two\"}\n",
    )
    .unwrap();
    copy("phi3");
    copy("no-weights");
    fs::remove_file(at("no-weights/model.safetensors")).unwrap();
    copy("unknown-family");
    replace(at("unknown-family/config.json"), "\"phi3\"", "\"gptj\"");
    copy("cut-weights");
    let weights = at("cut-weights/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(weights, &bytes[..bytes.len() / 2]).unwrap();

    let model = fs::read(compress_tiny(folder, "model", "q8", &[])).unwrap();
    fs::write(at("cut"), &model[..model.len() - 64]).unwrap();
    let flipped = |byte: usize| {
        let mut bytes = model.clone();
        bytes[byte] ^= 1;
        bytes
    };
    fs::write(at("damaged"), flipped(model.len() - 1000)).unwrap();
    let title = model.windows(5).position(|w| w == b"model").unwrap();
    fs::write(at("damaged-header"), flipped(title)).unwrap();
    fs::create_dir(at("upg-dir")).unwrap();
    fs::copy(at("model"), at("upg-dir/model.safetensors")).unwrap();

    fs::create_dir(at("lone-template")).unwrap();
    fs::write(at("lone-template/chat_template.jinja"), "mine").unwrap();
    copy("large");
    let weights = at("large/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    // 2^17 in each of the last weights, which are the final norm or a matrix, whichever comes last.
    let start = bytes.len() - 96 * 320 * 2;
    for weight in bytes[start..].as_chunks_mut::<2>().0 {
        *weight = 0x4800u16.to_le_bytes();
    }
    fs::write(weights, bytes).unwrap();
    let (source, out) = (at("large"), at("huge"));
    succeed([
        "compress",
        source.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ]);

    copy("infinite");
    let weights = at("infinite/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last..].copy_from_slice(&0x7F80u16.to_le_bytes());
    fs::write(weights, bytes).unwrap();

    copy("odd-names");
    let weights = at("odd-names/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let name = b"model.norm.weight";
    let place = bytes.windows(name.len()).position(|w| w == name).unwrap();
    // One character longer, and a quote of the key moves: the header keeps its length.
    let replaced = b"layer_scale.weight";
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes.splice(place..place + name.len(), *replaced);
    assert_eq!(bytes.remove(header), b' ');
    fs::write(weights, bytes).unwrap();

    copy("other-config");
    replace(
        at("other-config/config.json"),
        "\"intermediate_size\": 160",
        "\"intermediate_size\": 200",
    );
    let (source, out) = (at("other-config"), at("wrong-shape"));
    succeed([
        "compress",
        source.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
    ]);
}

#[test]
fn options_that_do_not_fit_together_are_refused() {
    for (options, fragments) in [
        (&["--sparse", "always"][..], ["always", "auto or never"]),
        (&["--prune", "0.5"], ["required", "--calibrate"]),
        (&["--bpw", "3"], ["required", "--calibrate"]),
        (&["--bpw", "0", "--calibrate"], ["--bpw", "above 0"]),
        (
            &["--bpw", "3", "--calibrate", "-e", "t3"],
            ["--bpw", "cannot be used"],
        ),
        (
            &["--bpw", "3", "--size", "1GB", "--calibrate"],
            ["--size", "cannot be used"],
        ),
        (
            &["--size", "5 apples", "--calibrate"],
            ["5 apples", "--size"],
        ),
    ] {
        let args = ["compress", "none", "-o", "none.safetensors"];
        let mut command = upg(args.iter().chain(options).map(|arg| arg.to_string()));
        let (code, _, stderr) = output(&mut command);
        assert_eq!(code, Some(2), "{command:?}: {stderr}");
        for fragment in fragments {
            assert!(stderr.contains(fragment), "{command:?}: {stderr}");
        }
    }
}

#[test]
fn bad_input_gives_one_line_an_exit_code_and_no_file() {
    let folder = tempfile::tempdir().unwrap();
    bad_inputs(folder.path());
    let before = names(folder.path());
    for (args, expected, fragments) in BAD {
        let args = args.iter().map(|arg| {
            arg.replace("{smollm2}", smollm2())
                .replace("{}", folder.path().to_str().unwrap())
        });
        let mut command = upg(args);
        let (code, stdout, stderr) = output(&mut command);
        let what = format!("{command:?}: {stderr}");
        assert_eq!(code, Some(*expected), "{what}");
        assert!(
            stderr.starts_with("upg: ") && stderr.lines().count() == 1,
            "{what}"
        );
        assert!(
            fragments.iter().all(|f| stderr.contains(f)),
            "{what} lacks one of {fragments:?}"
        );
        assert_eq!(stdout, "", "{what}");
        assert_eq!(names(folder.path()), before, "{what}");
    }
}

/// A limit on the size of files fails writes as a full disk does, and needs no rights to set up.
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
        // Blocks of 512 bytes; the signal that goes with the limit is ignored.
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\""])
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
    let mut child = upg([
        "compress",
        gguf().to_str().unwrap(),
        "-o",
        folder.path().join("out").to_str().unwrap(),
        "--encoding",
        "t2",
    ])
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    wait_until(|| !names(folder.path()).is_empty());
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names(folder.path()), [""; 0]);

    let mut child = upg(["run", smollm2(), "-p", "Once upon a time", "-n", "8000"])
        .stdout(fs::File::create(folder.path().join("text")).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let text = || fs::read_to_string(folder.path().join("text")).unwrap();
    wait_until(|| text().len() > 20);
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(text().starts_with("Once upon a time") && text().ends_with('\n'));
}

#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    let pid = child.id().to_string();
    let killed = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(killed.success());
}

#[cfg(unix)]
fn wait_until(condition: impl Fn() -> bool) {
    for _ in 0..12_000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("two minutes and nothing happened");
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

#[test]
fn kernels_are_shown_and_chosen_and_give_the_same_logits() {
    assert!(succeed(["--version"]).starts_with("upg 0."));
    let with = |kernels: &str, args: &[&str]| output(upg(args).env("UPG_KERNEL", kernels));
    let (code, text, _) = with("scalar", &["--version", "--verbose"]);
    assert_eq!(code, Some(0));
    assert!(text.contains("kernels: scalar (of scalar"), "{text}");
    let (code, _, stderr) = with("mmx", &["inspect", "x"]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("UPG_KERNEL") && stderr.contains("mmx"),
        "{stderr}"
    );

    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits");
    for encoding in ["q8", "q4", "t3", "s4"] {
        let model = compress_tiny(
            folder.path(),
            encoding,
            encoding,
            &["--embedding", encoding],
        );
        let args = [
            "run",
            model.to_str().unwrap(),
            "--tokens",
            "5,6,7",
            // Rounding keys and values would make steps of small differences.
            "--cache-type",
            "f32",
            "--logits",
        ];
        let args = [&args[..], &[out.to_str().unwrap()]].concat();
        let logits = |kernels: &str| -> Vec<f32> {
            assert_eq!(with(kernels, &args).0, Some(0));
            let bytes = fs::read(&out).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let data = tensors.tensor("logits").unwrap().data();
            let values = data.as_chunks::<4>().0.iter();
            values.map(|v| f32::from_le_bytes(*v)).collect()
        };
        let plain = logits("scalar");
        for kernels in upg_kernel::kernels::Kernels::available() {
            let found = logits(kernels.name());
            let pairs = plain.iter().zip(&found).map(|(a, b)| (a - b).abs());
            let largest = pairs.fold(0.0, f32::max);
            assert!(largest <= 1e-3, "{} {encoding}: {largest}", kernels.name());
        }
    }
}

#[test]
fn help_and_completions_are_there() {
    for command in [
        "compress",
        "decompress",
        "inspect",
        "verify",
        "run",
        "chat",
        "eval",
        "bench",
        "completions",
    ] {
        let help = succeed([command, "--help"]);
        assert!(help.contains("Example"), "{command}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(succeed(["completions", shell]).contains("compress"));
    }
}

//! Refused input: messages and exit codes.

use crate::common::{
    compress, compress_tiny, copy_model, names, output, smollm2, smollm2_gguf, success, upg,
};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Arguments, exit code, and required parts of the one line on standard error.
///
/// `{}` is a folder with the files that `bad_inputs` creates.
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
    (&["run", "{}/empty", "-p", "x"], 1, &["empty", "config.json"]),
    (&["run", "{}/text", "-p", "x"], 1, &["text", "safetensors"]),
    (&["run", "{}/phi3/model.safetensors", "-p", "x"], 1, &["not a UPG file", "upg compress"]),
    (&["run", "{}/model", "-p", "x"], 1, &["no tokenizer"]),
    (&["run", "{}/cut", "-p", "x"], 1, &["cut", "not a whole safetensors file"]),
    (&["compress", "{}/other-config", "-o", "{}/out"], 1, &["shape [320, 96]", "config.json asks for", "belongs to"]),
    (&["run", "{}/model", "--tokens", "256", "--logits", "{}/out"], 2, &["256", "vocabulary"]),
    (&["run", "{}/model", "--tokens", "1", "--logits", "{}/none/out"], 1, &["no such folder"]),
    (&["run", "{smollm2}", "--raw", "one two three four", "--context", "3"], 2, &["context of 3", "shorten"]),
    (&["run", "{smollm2}", "--raw", ""], 2, &["no tokens"]),
    (&["run", "{smollm2}"], 2, &["no prompt", "upg chat"]),
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
    (&["inspect", "{}/pointer"], 1, &["pointer", "git lfs pull"]),
    (&["verify", "{}/pointer"], 1, &["pointer", "git lfs pull"]),
    (&["run", "{}/pointer", "hello"], 1, &["pointer", "git lfs pull"]),
    (&["quantize", "{}/phi3", "q4_0"], 2, &["upg compress SOURCE"]),
    (&["run", "{}/model", "-ngl", "99", "-p", "hello"], 2, &["-ngl", "leave it out"]),
    (&["decompress", "{}/model", "-o", "{}/text"], 1, &["text", "folder"]),
    (&["decompress", "{}/upg-dir/model.safetensors", "-o", "{}/upg-dir", "--force"], 2, &["overwrite"]),
    (&["eval", "{smollm2}", "--text", "{}/none"], 1, &["none"]),
    (&["eval", "{smollm2}", "--text", "{}/text"], 2, &["window of 512"]),
    (&["eval", "{}/model", "--text", "{}/text"], 1, &["no tokenizer"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{}/phi3"], 1, &["no tokenizer"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{}/text"], 1, &["text", "unknown kind"]),
    (&["eval", "{smollm2}", "--text", "{}/story", "--window", "4", "--against", "{smollm2}", "--logits", "{}/text"], 2, &["text", "upg eval wrote"]),
    (&["chat", "{}/model"], 1, &["no chat template"]),
    (&["tune", "{}/model", "--original", "{}/phi3", "-o", "{}/tuned"], 1, &["no tokenizer"]),
    (&["tune", "{}/model", "--original", "{}/none", "-o", "{}/tuned"], 1, &["none"]),
    (&["tune", "{}/model", "--original", "{smollm2-gguf}", "-o", "{}/tuned", "--tokens", "512"], 2, &["model", "that the file was made from"]),
    (&["tune", "{smollm2}", "--original", "{smollm2-gguf}", "-o", "{}/tuned", "--text", "{}/text"], 2, &["has 3 tokens"]),
    (&["tune", "{smollm2}", "--original", "{smollm2-gguf}", "-o", "{}/text", "--text", "{}/text"], 2, &["overwrite"]),
];

/// Creates all files that `BAD` names.
fn bad_inputs(folder: &Path) {
    let at = |name: &str| folder.join(name);
    let copy = |name: &str| copy_model("phi3", "phi3", &at(name));
    let replace = |path: PathBuf, from: &str, to: &str| {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        fs::write(path, text.replace(from, to)).unwrap();
    };
    fs::create_dir(at("empty")).unwrap();
    fs::write(at("text"), "no model\n").unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    fs::write(at("pointer"), pointer).unwrap();
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
    // Sets each of the last weights to 2^17. These belong to the final norm or a matrix, whichever
    // is last.
    let start = bytes.len() - 96 * 320 * 2;
    for weight in bytes[start..].as_chunks_mut::<2>().0 {
        *weight = 0x4800u16.to_le_bytes();
    }
    fs::write(weights, bytes).unwrap();
    success(&mut compress(&at("large"), &at("huge"), &[]));

    copy("infinite");
    let weights = at("infinite/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last..].copy_from_slice(&0x7F80u16.to_le_bytes());
    fs::write(weights, bytes).unwrap();

    copy("odd-names");
    add_tensor(&at("odd-names/model.safetensors"), "layer_scale.weight");

    copy("other-config");
    replace(
        at("other-config/config.json"),
        "\"intermediate_size\": 160",
        "\"intermediate_size\": 200",
    );
}

/// Adds a tensor with one value to a safetensors file.
fn add_tensor(path: &Path, name: &str) {
    let mut bytes = fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let end = bytes.len() - data;
    header[name] = json!({"dtype": "BF16", "shape": [1], "data_offsets": [end, end + 2]});
    let header = header.to_string();
    let header = format!("{header:len$}", len = header.len().next_multiple_of(8));
    bytes.extend([0; 2]);
    bytes.splice(8..data, header.bytes());
    bytes[..8].copy_from_slice(&(header.len() as u64).to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn options_that_do_not_fit_together_are_refused() {
    for (options, fragments) in [
        (&["--sparse", "always"][..], ["always", "auto or never"]),
        (&["-e", "q4_k_m"], ["q4_k_m", "nearest to q4_k_m is q4"]),
        (&["-e", "BF16"], ["BF16", "nearest to BF16 is keep"]),
        (
            &["--prune", "0.5", "--no-calibrate"],
            ["--prune", "cannot be used"],
        ),
        (
            &["--bpw", "3", "--no-calibrate"],
            ["--bpw", "cannot be used"],
        ),
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
        // A text to calibrate on would be missing too.
        let plain = args.contains(&"--encoding").then_some(&"--no-calibrate");
        let args = args.iter().chain(plain).map(|arg| {
            arg.replace("{smollm2-gguf}", smollm2_gguf().to_str().unwrap())
                .replace("{smollm2}", smollm2())
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

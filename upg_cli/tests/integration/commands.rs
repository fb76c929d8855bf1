//! End-to-end tests of the `upg` command: its output, files and exit codes.

mod conversations;
mod convert;
mod endings;
mod refusals;

use crate::common::{
    compress, compress_tiny, logits, names, output, smollm2, smollm2_gguf, succeed, succeed_json,
    success, tiny_model, upg,
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::fs;

const ENCODINGS: [&str; 9] = ["keep", "mdcsr", "q8", "q4", "t2", "t3", "t4", "s8", "s4"];

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
        let json = succeed_json(["inspect", path, "--json"]);
        let layers = json["layers"].as_array().unwrap();
        assert_eq!(layers.len(), if encoding == "keep" { 0 } else { 10 });
        assert!(layers.iter().all(|l| l["encoding"] == encoding));
        assert!(layers.iter().all(|l| l["error"].as_f64().unwrap() < 0.3));
        assert_eq!(json["weights"], 197_088);
        assert!(succeed(["inspect", path]).contains("bits per weight"));
        let all = succeed(["inspect", path, "--layers"]);
        assert_eq!(all.matches(".down_proj.").count(), layers.len().min(2));
        assert!(succeed(["inspect", path, "--plot"]).contains("A full bar"));
    }
    assert_eq!(names(folder.path()), ["one", "two"]);
}

#[test]
fn keys_and_values_are_kept_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "keep", &[]);
    let found = ["f32", "f16", "int8"].map(|cache| {
        let out = folder.path().join("logits");
        let (file, path) = (file.to_str().unwrap(), out.to_str().unwrap());
        let run = ["run", file, "--tokens", "5,6,7,8", "--logits", path];
        succeed([&run[..], &["--cache-type", cache]].concat());
        logits(&out)
    });
    let difference = |of: &[f32]| {
        let pairs = of.iter().zip(&found[0]).map(|(a, b)| (a - b).abs());
        pairs.fold(0.0, f32::max)
    };
    // Logits up to 5; measured: 3e-4 and 1e-2.
    let (f16, int8) = (difference(&found[1]), difference(&found[2]));
    assert!(
        0.0 < f16 && f16 < 3e-3 && f16 < int8 && int8 < 0.1,
        "{f16} {int8}"
    );
}

/// No bit of a logit depends on the number of threads,
/// with a whole prompt and every encoding.
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
    let json = succeed_json(["inspect", file.to_str().unwrap(), "--json"]);
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
    let run = ["run", model, "--raw", "The capital of France is"];
    let greedy = ["--temperature", "0", "-n", "4"];
    let text = succeed([&run[..], &greedy].concat());
    assert!(
        text.starts_with("The capital of France is Paris."),
        "{text}"
    );
    let prompt = ["run", model, "--raw", "-p", "The capital of France is"];
    assert_eq!(succeed([&prompt[..], &greedy].concat()), text);
    // The seed determines the output; another seed gives another output.
    let sampled = |seed| {
        succeed(
            [
                &run[..],
                &["-n", "12", "--temperature", "1.5", "--seed", seed],
            ]
            .concat(),
        )
    };
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
    let stopped = succeed([&run[..], &["--temp", "0", "--stop", "Paris"]].concat());
    assert_eq!(stopped, "The capital of France is \n");
    let chat = succeed([
        "run",
        model,
        "Say hello.",
        "-n",
        "8",
        "--temp",
        "0",
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
    let json = succeed_json(eval(model));
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
    let original = smollm2_gguf();
    let logits = folder.path().join("logits");
    let logits = logits.to_str().unwrap();
    let against_original = eval(original.to_str().unwrap());
    let exact = succeed_json(against_original.clone());
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
    // A directory that lacks some of the optional files.
    let of_directory = folder.path().join("logits of a directory");
    let kept = ["--logits", of_directory.to_str().unwrap()];
    let json = succeed_json([&eval(exported.to_str().unwrap())[..], &kept].concat());
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
    // The source has no uniform data type, so only F32 is lossless.
    assert_eq!(config["torch_dtype"], "float32");
    // The command may replace its own export. No old file stays that could be taken for a new one.
    let tiny = compress_tiny(folder.path(), "tiny", "q8", &[]);
    let out = folder.path().join("replaced");
    for file in [model, tiny.to_str().unwrap()] {
        succeed(["decompress", file, "-o", out.to_str().unwrap()]);
    }
    assert_eq!(
        names(&out),
        ["config.json", "generation_config.json", "model.safetensors"]
    );
    // A lossless export used as a source again gives the same text.
    let again = folder.path().join("again");
    success(&mut compress(&exported, &again, &["-e", "keep"]));
    let again = again.to_str().unwrap();
    assert!(succeed([&["run", again], &run[2..], &greedy].concat()).contains("Paris"));
}

#[test]
fn a_real_model_is_tuned_on_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (text, out) = (at("text"), at("tuned"));
    fs::write(&text, "It was a bright cold day in April. ".repeat(60)).unwrap();
    let (model, original) = (smollm2(), smollm2_gguf());
    let said = succeed([
        "tune",
        model,
        "--original",
        original.to_str().unwrap(),
        "-o",
        &out,
        "--text",
        &text,
        "--tokens",
        "512",
        "--passes",
        "1",
        // q8 has lost almost nothing, so larger steps only add error.
        "--rate",
        "0.0001",
    ]);
    assert!(said.contains("scales and gains tuned"), "{said}");
    let size = |path: &str| fs::metadata(path).unwrap().len();
    // The recipe is longer.
    assert!(size(&out).abs_diff(size(model)) <= 4096);
    succeed(["verify", &out]);
    let answer = succeed([
        "run",
        &out,
        "--raw",
        "The capital of France is",
        "--temp",
        "0",
        "-n",
        "4",
    ]);
    assert!(answer.contains("Paris"), "{answer}");
}

#[test]
fn kernels_are_shown_and_chosen_and_give_the_same_logits() {
    assert!(succeed(["--version"]).starts_with("upg 0."));
    let with = |kernels: &str, args: &[&str]| output(upg(args).env("UPG_KERNEL", kernels));
    let (code, text, _) = with("scalar", &["--version", "--verbose"]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("kernels: scalar (available: scalar"),
        "{text}"
    );
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
            // Rounded keys and values would turn small differences into steps.
            "--cache-type",
            "f32",
            "--logits",
        ];
        let args = [&args[..], &[out.to_str().unwrap()]].concat();
        let run = |kernels: &str| -> Vec<f32> {
            assert_eq!(with(kernels, &args).0, Some(0));
            logits(&out)
        };
        let plain = run("scalar");
        for kernels in upg_kernel::kernels::Kernels::available() {
            let found = run(kernels.name());
            let pairs = plain.iter().zip(&found).map(|(a, b)| (a - b).abs());
            let largest = pairs.fold(0.0, f32::max);
            assert!(largest <= 1e-3, "{} {encoding}: {largest}", kernels.name());
        }
    }
}

#[test]
fn compress_prints_json_and_a_page() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let page = folder.path().join("report.html");
    let options = ["-e", "q8", "--json", "--report", page.to_str().unwrap()];
    let text = success(&mut compress(&tiny_model("phi3"), &out, &options));
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["weights"], 197_088);
    assert_eq!(json["file_bytes"], fs::metadata(&out).unwrap().len());
    assert_eq!(json["file"], out.to_str().unwrap());
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("mlp.down_proj") && page.ends_with("</html>\n"));
    // The same of a report in JSON.
    let [report, made] = ["report.json", "made.html"].map(|name| folder.path().join(name));
    let report = report.to_str().unwrap();
    let options = ["-e", "q8", "--report", report];
    success(&mut compress(&tiny_model("phi3"), &out, &options));
    succeed(["report", report, "-o", made.to_str().unwrap()]);
    assert!(fs::read_to_string(made).unwrap().contains("mlp.down_proj"));
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
    let folder = tempfile::tempdir().unwrap();
    succeed(["man", folder.path().to_str().unwrap()]);
    let page = fs::read_to_string(folder.path().join("upg-compress.1")).unwrap();
    assert!(page.contains("no\\-calibrate"), "{page}");
    assert!(succeed(["glossary"]).contains("KL divergence"));
    assert!(succeed(["help", "glossary"]).contains("KL divergence"));
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(succeed(["completions", shell]).contains("UPG_COMPLETE"));
    }
}

//! `upg bench`: every figure is present and of its type; values depend on the machine.

use crate::common::{compress_tiny, names, output, succeed, succeed_json, upg};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use upg_kernel::Matrix;
use upg_kernel::format::{Encoding, FileWriter, LayerInfo, header_capacity};
use upg_kernel::sparse::MdCSRMatrix;

/// Tolerance: the JSON parser may be off in the last bit of a number.
const LAST_BITS: f64 = 4.0 * f64::EPSILON;

/// Options that suffice for the tiny models and run fast.
const SMALL: [&str; 7] = ["-p", "16", "-n", "4", "--repetitions", "2", "--json"];

fn bench(file: &Path, more: &[&str]) -> Value {
    let args = [&["bench", file.to_str().unwrap()], &SMALL[..], more].concat();
    succeed_json(args)
}

fn positive(json: &Value, key: &str) -> f64 {
    let found = json[key].as_f64();
    found
        .filter(|n| n.is_finite() && *n > 0.0)
        .unwrap_or_else(|| panic!("{key} is {}", json[key]))
}

/// Lists the figures of each kind of matrix by shape and encoding.
fn kinds(list: &Value) -> Vec<(u64, u64, String)> {
    let kind = |one: &Value| {
        for key in ["ms", "gbps", "bytes"] {
            positive(one, key);
        }
        let size = |i: usize| one["shape"][i].as_u64().unwrap();
        (size(0), size(1), one["encoding"].as_str().unwrap().into())
    };
    let mut kinds: Vec<_> = list.as_array().unwrap().iter().map(kind).collect();
    kinds.sort();
    kinds
}

#[test]
fn every_figure_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "t3", &["--embedding", "q8"]);
    let more = ["--depth", "7", "--threads", "1", "--sequences", "1,3"];
    let json = bench(&file, &more);
    for key in [
        "read_gbps",
        "read_bytes",
        "load_warm_s",
        "first_token_warm_s",
        "peak_rss_bytes",
        "prefill_tps",
        "decode_tps",
        "decode_percent_of_read",
    ] {
        positive(&json, key);
    }
    // A file system in memory has no cold files; the report then says so.
    let cold = json["load_cold_s"].as_f64();
    assert_eq!(cold.is_none(), json["load_not_cold"].is_string());
    assert!(cold.is_none_or(|s| s > 0.0));
    assert_eq!(json["file"], file.to_str().unwrap());
    assert_eq!(json["model"], "phi3");
    assert_eq!(json["not_run"], Value::Null);
    assert_eq!(
        (&json["threads"], &json["repetitions"]),
        (&1.into(), &2.into())
    );
    assert_eq!(
        (&json["prompt_tokens"], &json["generate"]),
        (&16.into(), &4.into())
    );
    assert_eq!(json["depth"], 7);
    let kernels = upg_kernel::Cpu::shared().unwrap().kernels().name();
    assert_eq!(json["kernels"], kernels);
    // At most all processors.
    if let Some(percent) = json["others_percent"].as_f64() {
        assert!((0.0..=100.0).contains(&percent), "{percent}");
    }
    let batches = json["batches"].as_array().unwrap();
    assert_eq!(batches.len(), 2);
    for (batch, sequences) in batches.iter().zip([1, 3]) {
        assert_eq!(batch["sequences"], sequences);
        let each = positive(batch, "decode_tps") / f64::from(sequences);
        assert!((positive(batch, "decode_tps_per_sequence") / each - 1.0).abs() < LAST_BITS);
    }
    let least = json["decode_tps_spread"][0].as_f64().unwrap();
    assert!(least <= positive(&json, "decode_tps"));

    let shapes = [(96, 96), (96, 160), (192, 96), (320, 96)];
    let mut expected: Vec<_> = shapes.map(|(r, c)| (r, c, "t3".to_owned())).into();
    expected.push((256, 96, "q8".into()));
    expected.sort();
    assert_eq!(kinds(&json["matvec"]), expected);
    assert_eq!(kinds(&json["decompress"]), expected);
    for product in json["matvec"].as_array().unwrap() {
        positive(product, "percent_of_read");
    }

    // A token reads one row of the embedding, and everything else once.
    let inspect = succeed_json(["inspect", file.to_str().unwrap(), "--json"]);
    let bytes = |layer: &Value| {
        let bytes = layer["bytes"].as_u64().unwrap();
        match layer["name"] == "model.embed_tokens.weight" {
            true => bytes / 256,
            false => bytes,
        }
    };
    let layers: u64 = inspect["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(bytes)
        .sum();
    let norms = 5 * 96 * 2;
    assert_eq!(json["decode_token_bytes"], layers + norms);
}

#[test]
fn the_table_names_what_the_json_has() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "keep", &[]);
    let args = ["bench", file.to_str().unwrap()];
    let two = ["--sequences", "2"];
    let text = succeed([&args[..], &SMALL[..SMALL.len() - 1], &two].concat());
    for word in [
        "read",
        "load, cold",
        "load, warm",
        "peak memory",
        "prefill",
        "decode",
        "2 at once",
        "256 x 96  BF16",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    assert!(!text.contains("decompressed"), "{text}");
    let none = ["-p", "0", "-n", "0", "--repetitions", "1"];
    let text = succeed([&args[..], &none, &two].concat());
    for word in ["prefill", "decode", "at once"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}

#[test]
fn a_file_without_a_model_is_measured_as_far_as_it_goes() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("matrix");
    let weights: Vec<f32> = (0..64 * 100).map(|i| (i as f32).sin()).collect();
    let matrix = Matrix::MdCsr(MdCSRMatrix::from_dense(&weights, 64, 100).unwrap());
    let layers = [LayerInfo::new("a.weight", 64, 100, Encoding::MdCsr)];
    let keys = ["model", "compression_ratio", "bits_per_weight", "recipe"];
    let metadata: BTreeMap<String, String> = keys.map(|key| (key.into(), "x".into())).into();
    let capacity = header_capacity(&layers, [].into_iter(), &metadata).unwrap();
    let mut writer = FileWriter::create(&file, capacity).unwrap();
    writer.layer(0, &layers[0], &matrix).unwrap();
    writer.finish(metadata, &layers).unwrap();

    let json = bench(&file, &[]);
    assert!(json["not_run"].as_str().unwrap().contains("config.json"));
    for key in [
        "prefill_tps",
        "decode_tps",
        "decode_percent_of_read",
        "first_token_warm_s",
    ] {
        assert_eq!(json[key], Value::Null, "{key}");
    }
    positive(&json, "load_warm_s");
    assert_eq!(kinds(&json["matvec"]), [(64, 100, "mdcsr".to_owned())]);
}

#[cfg(unix)]
#[test]
fn llama_cpp_is_measured_beside() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "q8", &[]);
    let gguf = folder.path().join("model.gguf");
    fs::write(&gguf, "").unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let args = [
        &[
            "bench",
            file.to_str().unwrap(),
            "--depth",
            "7",
            "--threads",
            "1",
        ],
        &["--compare-llama", gguf.to_str().unwrap()][..],
        &SMALL,
    ]
    .concat();
    let shells = std::env::var_os("PATH").unwrap();
    let path = std::env::join_paths([path].into_iter().chain(std::env::split_paths(&shells)));
    let path = path.unwrap();
    let mut command = upg(&args);
    let (code, text, stderr) = output(command.env("PATH", &path));
    assert_eq!(code, Some(0), "{stderr}");
    let json: Value = serde_json::from_str(&text).unwrap();
    let llama = &json["llama"][0];
    assert_eq!(
        (&llama["build"], &llama["model_bytes"]),
        (&"abc".into(), &1000.into())
    );
    assert_eq!(
        (&llama["prefill_tps"], &llama["decode_tps"]),
        (&50.0.into(), &20.0.into())
    );
    for (ratio, ours, theirs) in [
        ("prefill_ratio", "prefill_tps", 50.0),
        ("decode_ratio", "decode_tps", 20.0),
    ] {
        let expected = positive(&json, ours) / theirs;
        assert!((positive(llama, ratio) / expected - 1.0).abs() < 1e-9);
    }
    let mut command = upg(&args[..args.len() - 1]);
    let (_, text, _) = output(command.env("PATH", &path));
    assert!(
        text.contains("llama.cpp abc") && text.contains("50.0 to 50.0"),
        "{text}"
    );
}

#[test]
fn random_models_are_sound_and_measured_like_others() {
    let folder = tempfile::tempdir().unwrap();
    let out = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let synth = |name: &str, more: &[&str]| {
        let out = out(name);
        let args = ["bench", "synth", "--arch", "smollm2-135m", "-o", &out];
        assert!(succeed([&args[..], more].concat()).contains("134515008 random weights"));
        out
    };
    let [model, again, other] = [("one", "1"), ("two", "1"), ("three", "2")].map(|(name, seed)| {
        synth(
            name,
            &["--encoding", "t2", "--embedding", "q4", "--seed", seed],
        )
    });
    assert!(succeed(["verify", &model]).contains("sound"));
    assert!(fs::read(&model).unwrap() == fs::read(again).unwrap());
    assert!(fs::read(&model).unwrap() != fs::read(other).unwrap());
    let json = bench(Path::new(&model), &[]);
    assert_eq!(json["model"], "synthetic-smollm2-135m");
    positive(&json, "decode_tps");
    // Tied: the embedding is also the head, so all of it is read.
    assert!(json["decode_token_bytes"].as_u64() > json["matvec_bytes"].as_u64());
}

/// Arguments, exit code, and required parts of standard error. `{}` is a folder.
#[rustfmt::skip]
const BAD: &[(&[&str], i32, &[&str])] = &[
    (&["bench"], 2, &["<FILE>"]),
    (&["bench", "{}/none"], 1, &["none", "No such file"]),
    (&["bench", "{}/text"], 1, &["text", "safetensors"]),
    (&["bench", "{}/model", "-p", "257"], 2, &["257", "context of 256", "--prompt-tokens"]),
    (&["bench", "{}/model", "-p", "0", "-n", "200", "--depth", "57"], 2, &["257", "--depth"]),
    (&["bench", "{}/model", "--repetitions", "0"], 2, &["--repetitions"]),
    (&["bench", "{}/model", "--sequences", "2,0"], 2, &["--sequences"]),
    (&["bench", "{}/model", "--compare-llama", "{}/none"], 1, &["none", "No such file"]),
    (&["bench", "{}/model", "--compare-llama", "{}/text"], 1, &["'llama-bench'", "--llama-bench"]),
    (&["bench", "{}/model", "--compare-llama", "{}/text", "--llama-bench", "{}/none"], 1, &["none", "install llama.cpp"]),
    (&["bench", "{}/model", "--llama-bench", "{}/text"], 2, &["--compare-llama"]),
    (&["bench", "synth", "--arch", "gpt-1", "-o", "{}/out"], 2, &["gpt-1", "phi-4", "smollm2-135m"]),
    (&["bench", "synth", "--arch", "phi-4", "--encoding", "s4", "-o", "{}/out"], 2, &["s4", "t3"]),
    (&["bench", "synth", "--arch", "smollm2-135m", "-o", "{}/none/out"], 1, &["no such folder", "make the folder"]),
    (&["bench", "synth", "--arch", "smollm2-135m"], 2, &["--output"]),
];

#[test]
fn bad_input_is_told_and_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    compress_tiny(folder.path(), "model", "q8", &[]);
    fs::write(folder.path().join("text"), "no model\n").unwrap();
    let before = names(folder.path());
    for (args, expected, fragments) in BAD {
        let args = args
            .iter()
            .map(|arg| arg.replace("{}", folder.path().to_str().unwrap()));
        let mut command = upg(args);
        let (code, stdout, stderr) = output(command.env("PATH", ""));
        let what = format!("{command:?}: {stderr}");
        assert_eq!(code, Some(*expected), "{what}");
        assert!(fragments.iter().all(|f| stderr.contains(f)), "{what}");
        assert_eq!(stdout, "", "{what}");
        assert_eq!(names(folder.path()), before, "{what}");
    }
}

#[cfg(unix)]
#[test]
fn what_llama_bench_says_of_a_failure_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = compress_tiny(folder.path(), "model", "q8", &[]);
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/llama-bench");
    for (name, expected) in [("broken", "failed to load model"), ("mute", "not JSON")] {
        let gguf = folder.path().join(name);
        fs::write(&gguf, "").unwrap();
        let compare = [
            "--compare-llama",
            gguf.to_str().unwrap(),
            "--llama-bench",
            program,
        ];
        let args = [&["bench", file.to_str().unwrap()], &compare[..], &SMALL].concat();
        let (code, _, stderr) = output(&mut upg(args));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(
            stderr.contains(expected) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
}

//! Tiny models of every family, compressed from their directories and run from the file.
//!
//! Their logits and greedy tokens are compared with those of transformers.

use crate::common::{
    Case, MODELS, answer, cases, copy_model, exact, largest_difference, model_file, relative_error,
};
use std::path::Path;
use upg_compress::{Choice, CompressOptions, Preflight, compress, source};
use upg_kernel::format::Encoding;
use upg_kernel::inference::Request;
use upg_kernel::{ErrorKind, UPGModel};

/// Tolerance without compression: only the order of additions differs; measured: 4e-6 at
/// logits up to 5.
const KEPT: f32 = 3e-5;

/// Relative error (root mean square) of the logits with `q8`, which rounds every matrix by
/// 0.5 to 0.6 %.
///
/// Measured: 0.010 to 0.026.
const Q8: f64 = 0.03;

/// Compresses the model of folder `name` into `folder` and opens it.
fn compressed(name: &str, weights: &str, choice: Choice, folder: &Path) -> UPGModel {
    let directory = folder.join(name);
    copy_model(name, weights, &directory);
    let out = folder.join(format!("{name}.safetensors"));
    let mut options = CompressOptions::new(choice);
    options.embedding = Some(choice);
    let source = source::open(&directory).unwrap();
    compress(source.as_ref(), &out, &options, &()).unwrap();
    UPGModel::from_file(&out).unwrap()
}

/// Returns the logits that correspond to the expected ones:
/// prompt in one go, and token by token.
fn logits(model: &UPGModel, case: &Case) -> [Vec<f32>; 2] {
    let mut session = model.session(&exact()).unwrap();
    let whole = session.forward(&case.prompt).unwrap();
    let mut session = model.session(&exact()).unwrap();
    let step = |&token| session.step(token).unwrap();
    let steps: Vec<f32> = case.prompt.iter().flat_map(step).collect();
    [whole, steps].map(|logits| logits[logits.len() - case.logits.len()..].to_vec())
}

fn greedy(model: &UPGModel, case: &Case) -> Vec<u32> {
    let request = Request::new(case.prompt.clone(), case.greedy.len());
    answer(&mut model.scheduler(1, &exact()).unwrap(), request).0
}

/// A file that `UPGModel` would not open is not worth hours of work.
#[test]
fn texts_that_no_file_can_be_opened_with_are_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("qwen2");
    copy_model("qwen2", "qwen2", &directory);
    let out = folder.path().join("out.safetensors");
    let options = CompressOptions::new(Choice::Keep);
    let merge = r#"{"model":{"type":"BPE","vocab":{"a":0},"merges":[["a","a"]]}}"#;
    let long = " ".repeat((256 << 10) + 1);
    for (file, text, words) in [
        ("tokenizer.json", "{}", "tokenizer.json: missing field"),
        (
            "tokenizer.json",
            r#"{"model":{"type":"WordPiece"}}"#,
            "'WordPiece'",
        ),
        ("tokenizer.json", merge, "merge 0 makes no token"),
        (
            "chat_template.jinja",
            &long,
            "chat template has 262145 bytes",
        ),
        (
            "generation_config.json",
            r#"{"eos_token_id":"x"}"#,
            "'eos_token_id'",
        ),
    ] {
        std::fs::write(directory.join(file), text).unwrap();
        let source = source::open(&directory).unwrap();
        let found = compress(source.as_ref(), &out, &options, &()).map(drop);
        let before = Preflight::new(source.as_ref(), &out, &options).map(drop);
        for e in [found, before].map(Result::unwrap_err) {
            assert!(e.to_string().contains(words), "{e}");
            let is_tokenizer = file == "tokenizer.json";
            let tells_how = e.to_string().contains("without tokenizer.json");
            assert_eq!(tells_how, is_tokenizer, "{e}");
        }
        std::fs::remove_file(directory.join(file)).unwrap();
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let source = source::open(&directory).unwrap();
    compress(source.as_ref(), &out, &options, &()).unwrap();
}

#[test]
fn kept_weights_give_the_logits_and_tokens_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    for (name, weights) in MODELS {
        let model = compressed(name, weights, Choice::Keep, folder.path());
        for (i, case) in cases(name).iter().enumerate() {
            let found = logits(&model, case).map(|l| largest_difference(&l, &case.logits));
            assert!(
                found.iter().all(|&d| d <= KEPT),
                "{name} case{i}: {found:?}"
            );
            assert_eq!(greedy(&model, case), case.greedy, "{name} case{i}");
        }
    }
}

#[test]
fn q8_gives_logits_close_to_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let q8 = Choice::Encode(Encoding::Q8);
    for (name, weights) in MODELS {
        let model = compressed(name, weights, q8, folder.path());
        for (i, case) in cases(name).iter().enumerate() {
            let found = logits(&model, case).map(|l| relative_error(&l, &case.logits));
            println!("{name} case{i}: {found:?}");
            assert!(found.iter().all(|&d| d <= Q8), "{name} case{i}: {found:?}");
        }
    }
}

/// A source that `upg run` could not load is refused before any work.
#[test]
fn a_config_that_asks_for_other_weights_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source_dir = folder.path().join("source");
    std::fs::create_dir(&source_dir).unwrap();
    std::fs::copy(
        model_file("phi3", "model.safetensors"),
        source_dir.join("model.safetensors"),
    )
    .unwrap();
    let text = std::fs::read_to_string(model_file("phi3", "config.json")).unwrap();
    let good: serde_json::Value = serde_json::from_str(&text).unwrap();
    let layers = good["num_hidden_layers"].as_u64().unwrap();
    for (key, value, kind) in [
        ("num_hidden_layers", layers + 1, ErrorKind::Missing),
        ("vocab_size", 255, ErrorKind::Shape),
        ("intermediate_size", 8, ErrorKind::Shape),
    ] {
        let mut config = good.clone();
        config[key] = value.into();
        std::fs::write(source_dir.join("config.json"), config.to_string()).unwrap();
        let source = source::open(&source_dir).unwrap();
        let out = folder.path().join("out");
        let options = CompressOptions::new(Choice::Encode(Encoding::Q8));
        let error = compress(source.as_ref(), &out, &options, &()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("belongs to"), "{error}");
        assert!(!out.exists());
    }
}

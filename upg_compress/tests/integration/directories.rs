//! Directories whose files could not be run: found out before the work, or read as what they are.

use crate::common::{cases, model_file};
use safetensors::tensor::TensorView;
use safetensors::{SafeTensors, serialize};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use upg_compress::{
    Choice, CompressOptions, Preflight, Source, compress, compress_checked, source,
};
use upg_kernel::format::UpgFile;
use upg_kernel::inference::SessionOptions;
use upg_kernel::inference::weights::HEAD;
use upg_kernel::{ErrorKind, UPGModel};

/// Copies a tiny model, with names and config changed. A tensor without a new name is left out.
fn changed(
    folder: &Path,
    rename: impl Fn(&str) -> Option<String>,
    config: impl Fn(Value) -> Value,
) -> Box<dyn Source> {
    let bytes = std::fs::read(model_file("mistral", "model.safetensors")).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = model.tensors();
    let views = tensors.iter().filter_map(|(name, tensor)| {
        let view = TensorView::new(tensor.dtype(), tensor.shape().to_vec(), tensor.data());
        Some((rename(name)?, view.unwrap()))
    });
    std::fs::write(
        folder.join("model.safetensors"),
        serialize(views, None).unwrap(),
    )
    .unwrap();
    let text = std::fs::read(model_file("mistral", "config.json")).unwrap();
    let changed = config(serde_json::from_slice(&text).unwrap()).to_string();
    std::fs::write(folder.join("config.json"), changed).unwrap();
    source::open(folder).unwrap()
}

fn keep() -> CompressOptions {
    CompressOptions::new(Choice::Keep)
}

#[test]
fn wrapped_models_run_like_the_plain_one() {
    let case = &cases("mistral")[1];
    let logits = |source: &dyn Source| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        compress(source, &path, &keep(), &()).unwrap();
        UPGModel::check(&Arc::new(UpgFile::open(&path).unwrap())).unwrap();
        let model = UPGModel::from_file(&path).unwrap();
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.forward(&case.prompt).unwrap()
    };
    let plain = source::open(model_file("mistral", "")).unwrap();
    let expected = logits(plain.as_ref());
    for wrap in [
        |name: &str| format!("_orig_mod.{name}"),
        |name: &str| format!("base_model.model.{name}"),
        |name: &str| name.trim_start_matches("model.").to_owned(),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let wrapped = changed(folder.path(), |name| Some(wrap(name)), |config| config);
        assert_eq!(logits(wrapped.as_ref()), expected);
    }
    let folder = tempfile::tempdir().unwrap();
    let rename = |name: &str| match name.strip_prefix("model.") {
        Some(rest) => Some(format!("model.language_model.{rest}")),
        None => Some(name.to_owned()),
    };
    let whole = |text: Value| serde_json::json!({"model_type": "mistral3", "text_config": text});
    let multimodal = changed(folder.path(), rename, whole);
    assert_eq!(logits(multimodal.as_ref()), expected);
}

#[test]
fn a_missing_head_is_found_before_the_work_and_by_verify() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let without_head = |name: &str| (name != HEAD).then(|| name.to_owned());
    let source = changed(folder.path(), without_head, |mut config| {
        config["tie_word_embeddings"] = false.into();
        config
    });
    let planned = Preflight::new(source.as_ref(), &path, &keep())
        .err()
        .unwrap();
    let compressed = compress(source.as_ref(), &path, &keep(), &())
        .err()
        .unwrap();
    for error in [planned, compressed] {
        assert_eq!(
            (error.kind(), error.tensor_name()),
            (ErrorKind::Missing, Some(HEAD))
        );
        assert!(
            error
                .to_string()
                .contains("set tie_word_embeddings to true"),
            "{error}"
        );
    }
    assert!(!path.exists());
    compress_checked(source.as_ref(), &path, &keep(), &()).unwrap();
    let file = Arc::new(UpgFile::open(&path).unwrap());
    file.verify(&|_| {}).unwrap();
    let error = UPGModel::check(&file).unwrap_err();
    assert_eq!(
        (error.kind(), error.tensor_name()),
        (ErrorKind::Missing, Some(HEAD))
    );
}

//! The files of a model directory: which there are, how large they may be, what is wrong if one is not there.
#![forbid(unsafe_code)]

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use upg_kernel::format::texts::{MAX_BLOB, parse_object, read_text};
use upg_kernel::{Error, ErrorKind, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Tensor name to shard file from the index; `None` if the weights are in one file.
pub(super) fn read_index(dir: &Path) -> Result<Option<BTreeMap<String, String>>> {
    if dir.join(SINGLE).exists() {
        return Ok(None);
    }
    let path = dir.join(INDEX);
    let Some(text) = read_text(&path, MAX_BLOB)? else {
        return Err(no_weights(dir));
    };
    let index = parse_object(&text, &path)?;
    let malformed = |message: String| Error::new(ErrorKind::Malformed, message).at(&path);
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("no object 'weight_map'".to_owned()))?;
    let mut shards = BTreeMap::new();
    for (name, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        // The index comes from a stranger: a name with a path in it could reach any file.
        let plain = shard.ends_with(".safetensors") && !shard.contains(['/', '\\', ':', '\0']);
        if !plain {
            return Err(
                malformed(format!("shard {shard:?} is not a plain .safetensors name")).tensor(name),
            );
        }
        shards.insert(name.clone(), shard.to_owned());
    }
    Ok(Some(shards))
}

/// The error for a directory without weights, by what is there instead.
fn no_weights(dir: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let find = |test: &dyn Fn(&str) -> bool| names.iter().find(|n| test(n));
    let pickled = |n: &str| n.ends_with(".bin") || n.ends_with(".pt") || n.ends_with(".pth");
    let missing = |found: &str| {
        Error::new(
            ErrorKind::Missing,
            format!("neither {SINGLE} nor {INDEX}{found}"),
        )
    };
    if let Some(name) = find(&|n| n.starts_with("adapter_")) {
        return missing(&format!("; {name} belongs to an adapter"))
            .at(dir)
            .hint("merge the adapter into its base model first");
    }
    if let Some(name) = find(&|n| n.ends_with(".safetensors")) {
        return missing(&format!(", but {name}"))
            .at(dir)
            .hint(format!("rename it to {SINGLE} if it is the whole model"));
    }
    if let Some(name) = find(&pickled) {
        return Error::new(
            ErrorKind::Unsupported,
            format!("the weights are pickled ({name})"),
        )
        .at(dir)
        .hint("convert them: model.save_pretrained(DIR, safe_serialization=True)");
    }
    missing("")
        .at(dir)
        .hint("download the model's .safetensors files too")
}

pub(super) fn no_config(dir: &Path) -> Error {
    let gguf = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .min();
    let hint = match gguf {
        Some(file) => format!("pass the GGUF file itself: {}", file.display()),
        None => "pass a Hugging Face model directory or a .gguf file".to_owned(),
    };
    Error::new(ErrorKind::Missing, "no config.json in this directory")
        .at(dir)
        .hint(hint)
}

/// The name of the directory; for a snapshot in the Hugging Face cache, the name of the model.
pub(super) fn model_name(dir: &Path) -> String {
    // Not canonicalized before the cache is recognized: its files are links, its directories not.
    let dir: PathBuf = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    let cached = dir
        .ancestors()
        .filter_map(|a| a.file_name()?.to_str()?.strip_prefix("models--"))
        .next();
    if let Some(name) = cached {
        return name.replace("--", "/");
    }
    let plain = dir.file_name().map(|n| n.to_string_lossy().into_owned());
    plain.unwrap_or_else(|| "model".to_owned())
}

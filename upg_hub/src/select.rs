//! Files of a repository that a model needs: never pickles, one GGUF file at most.
#![forbid(unsafe_code)]

use crate::name::{ModelName, is_file};
use serde_json::Value;
use std::collections::BTreeSet;
use upg_kernel::support::{MAX_PARTS, PartName};
use upg_kernel::{Error, ErrorKind, Result};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Texts beside weights in safetensors files.
const TEXTS: [&str; 6] = [
    CONFIG,
    TOKENIZER,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
];

/// Prefix of chat templates, which have several forms.
const TEMPLATE: &str = "chat_template.";

/// Quantizations of GGUF files, best first: nearly lossless and no larger than needed.
///
/// The file is compressed again, so its errors add to those of the encoding.
const PREFERRED: [&str; 9] = [
    "Q8_0", "Q6_K", "BF16", "F16", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0",
];

/// File of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileEntry {
    /// Path inside of the repository.
    pub name: String,
    /// Size in bytes, if the server says so.
    pub bytes: Option<u64>,
}

/// Weights of a model, by the names of their files.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Weights {
    /// One safetensors file.
    Safetensors(String),
    /// Safetensors files that an index lists.
    Sharded,
    /// One GGUF file, or all parts of one.
    Gguf(Vec<String>),
}

impl Weights {
    /// Returns whether `file` has to be downloaded; shards, which the index lists, do not count.
    pub(crate) fn needs(&self, file: &str) -> bool {
        let is_text = TEXTS.contains(&file) || (file.starts_with(TEMPLATE) && !file.contains('/'));
        match self {
            Self::Gguf(files) => files.iter().any(|f| f == file),
            Self::Safetensors(weights) => file == weights || is_text,
            Self::Sharded => file == INDEX || is_text,
        }
    }
}

/// Chooses the weights among the files of a repository: safetensors, or else one GGUF file.
///
/// A quantization in `name` chooses a GGUF file. Errors: `Missing` if there are neither;
/// `Argument` if no file or several files have the quantization.
pub(crate) fn choose<'a>(
    name: &ModelName,
    files: impl IntoIterator<Item = &'a str>,
) -> Result<Weights> {
    let files: BTreeSet<&str> = files.into_iter().filter(|f| is_file(f)).collect();
    if name.quantization().is_none() {
        if files.contains(SINGLE) {
            return Ok(Weights::Safetensors(SINGLE.to_owned()));
        }
        if files.contains(INDEX) {
            return Ok(Weights::Sharded);
        }
    }
    let models = gguf_models(&files);
    let chosen = match name.quantization() {
        Some(quantization) => models.iter().find(|m| has_quantization(m[0], quantization)),
        None => PREFERRED
            .iter()
            .find_map(|q| models.iter().find(|m| has_quantization(m[0], q)))
            .or(models.first()),
    };
    match (chosen, name.quantization()) {
        (Some(parts), _) => Ok(Weights::Gguf(parts.iter().map(|&p| p.to_owned()).collect())),
        (None, Some(quantization)) => {
            let message = format!("no GGUF file with {quantization} in {}", name.repository());
            let known: Vec<_> = models.iter().map(|m| m[0]).collect();
            let hint = match known.is_empty() {
                true => format!(
                    "it has no GGUF files; use {} without ':'",
                    name.repository()
                ),
                false => format!("it has {}", known.join(", ")),
            };
            Err(Error::new(ErrorKind::Argument, message).hint(hint))
        }
        (None, None) => Err(no_weights(name, &files)),
    }
}

fn no_weights(name: &ModelName, files: &BTreeSet<&str>) -> Error {
    let is_pickle = |f: &&str| [".bin", ".pth", ".pt"].iter().any(|end| f.ends_with(end));
    let found = match files.iter().find(|f| is_pickle(f)) {
        Some(pickle) => format!(", only pickles such as {pickle}, which are never read"),
        None => String::new(),
    };
    let message = format!(
        "{} has neither safetensors nor GGUF files{found}",
        name.repository()
    );
    Error::new(ErrorKind::Missing, message).hint("look for a conversion of it on the Hub")
}

/// Returns the GGUF models among `files`, each as all of its parts in order.
///
/// Projectors for images and matrices of importance are none.
fn gguf_models<'a>(files: &BTreeSet<&'a str>) -> Vec<Vec<&'a str>> {
    let mut models = Vec::new();
    for file in files {
        let Some(stem) = file.strip_suffix(".gguf") else {
            continue;
        };
        let base = stem.rsplit('/').next().unwrap_or(stem).to_lowercase();
        if base.starts_with("mmproj") || base.contains("imatrix") {
            continue;
        }
        match PartName::of(stem) {
            None => models.push(vec![*file]),
            Some(part) if part.number == 1 => {
                let names = (1..=part.count).map(|number| part.file_name(number, "gguf"));
                let parts = names.map(|name| files.get(name.as_str()).copied());
                // An incomplete model cannot be chosen.
                models.extend(parts.collect::<Option<Vec<_>>>());
            }
            Some(_) => {}
        }
    }
    models
}

/// Returns whether the name of a GGUF file ends in this quantization, or is it altogether.
fn has_quantization(file: &str, quantization: &str) -> bool {
    let stem = file.strip_suffix(".gguf").unwrap_or(file);
    let stem = PartName::of(stem).map_or(stem, |part| part.name);
    let base = stem.rsplit('/').next().unwrap_or(stem).to_lowercase();
    let wanted = quantization.to_lowercase();
    let wanted = wanted.strip_suffix(".gguf").unwrap_or(&wanted);
    let rest = base.strip_suffix(wanted);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with(['-', '.', '_']))
}

/// Returns the names of the shards that an index lists.
///
/// Errors: `Malformed` if it is not such an index; `TooLarge` for too many shards.
pub(crate) fn shards(index: &str) -> Result<Vec<String>> {
    let malformed = |what: &str| Error::new(ErrorKind::Malformed, what);
    let index: Value = upg_kernel::format::json::value(INDEX, index)?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| malformed("no object 'weight_map'"))?;
    let mut shards = BTreeSet::new();
    for shard in map.values() {
        let shard = shard.as_str().filter(|s| is_file(s) && !s.contains('/'));
        let shard = shard.filter(|s| s.ends_with(".safetensors"));
        shards.insert(shard.ok_or_else(|| malformed("a shard that is no safetensors file"))?);
        if shards.len() > MAX_PARTS {
            let message = format!("more than {MAX_PARTS} shards");
            return Err(Error::new(ErrorKind::TooLarge, message));
        }
    }
    Ok(shards.into_iter().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn chosen(name: &str, files: &[&str]) -> Result<Weights> {
        choose(&name.parse().unwrap(), files.iter().copied())
    }

    fn gguf(files: &[&str]) -> Weights {
        Weights::Gguf(files.iter().map(|&f| f.to_owned()).collect())
    }

    #[test]
    fn safetensors_come_first() {
        let single = Weights::Safetensors(SINGLE.to_owned());
        let all = [SINGLE, "pytorch_model.bin", "x-Q8_0.gguf", CONFIG];
        assert_eq!(chosen("u/m", &all).unwrap(), single);
        assert_eq!(chosen("u/m", &[INDEX, "a.gguf"]).unwrap(), Weights::Sharded);
        assert_eq!(chosen("u/m:q8_0", &all).unwrap(), gguf(&["x-Q8_0.gguf"]));
        for file in [
            SINGLE,
            CONFIG,
            TOKENIZER,
            "chat_template.jinja",
            "generation_config.json",
        ] {
            assert!(single.needs(file), "{file}");
        }
        for file in [
            "pytorch_model.bin",
            "x-Q8_0.gguf",
            "README.md",
            "onnx/model.safetensors",
        ] {
            assert!(!single.needs(file), "{file}");
        }
    }

    #[test]
    fn one_gguf_file_is_chosen() {
        let files = [
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "m.Q8_0.gguf",
            "mmproj-F16.gguf",
            "m-IQ2_XS.gguf",
        ];
        assert_eq!(chosen("u/m", &files).unwrap(), gguf(&["m.Q8_0.gguf"]));
        assert_eq!(
            chosen("u/m:Q4_K_M", &files).unwrap(),
            gguf(&["m-Q4_K_M.gguf"])
        );
        assert_eq!(
            chosen("u/m:m-IQ2_XS.gguf", &files).unwrap(),
            gguf(&["m-IQ2_XS.gguf"])
        );
        let e = chosen("u/m:K_M2", &files).unwrap_err();
        assert!(
            e.to_string()
                .contains("it has m-IQ2_XS.gguf, m-Q4_K_M.gguf"),
            "{e}"
        );
        assert!(chosen("u/m:4_K_M", &files).is_err());
        assert_eq!(
            chosen("u/m", &["z.gguf", "b.gguf"]).unwrap(),
            gguf(&["b.gguf"])
        );
    }

    #[test]
    fn all_parts_of_a_split_file_or_none() {
        let parts = [
            "q/m-Q8_0-00001-of-00002.gguf",
            "q/m-Q8_0-00002-of-00002.gguf",
        ];
        assert_eq!(chosen("u/m:Q8_0", &parts).unwrap(), gguf(&parts));
        assert!(chosen("u/m:Q8_0", &parts[..1]).is_err());
        assert!(chosen("u/m:Q8_0", &parts[1..]).is_err());
    }

    #[test]
    fn pickles_are_named_and_refused() {
        let e = chosen("u/m", &["pytorch_model.bin", CONFIG]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Missing);
        assert!(e.to_string().contains("pytorch_model.bin"), "{e}");
    }

    #[test]
    fn an_index_names_files_beside_it() {
        let index =
            |shard: &str| format!(r#"{{"weight_map": {{"a": "{shard}", "b": "{shard}"}}}}"#);
        assert_eq!(shards(&index("a.safetensors")).unwrap(), ["a.safetensors"]);
        for bad in [
            "../a.safetensors",
            "/a.safetensors",
            "a.bin",
            "x/a.safetensors",
        ] {
            assert_eq!(
                shards(&index(bad)).unwrap_err().kind(),
                ErrorKind::Malformed,
                "{bad}"
            );
        }
        for bad in ["", "[]", "{}", r#"{"weight_map": {"a": 1}}"#] {
            assert_eq!(
                shards(bad).unwrap_err().kind(),
                ErrorKind::Malformed,
                "{bad}"
            );
        }
    }
}

//! Completions of arguments: models in the caches, files, encodings.
#![forbid(unsafe_code)]

use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::Path;
use upg_hub::{Cache, CompressedCache, ModelName, Settings};
use upg_kernel::format::Encoding;

/// Ends of the names of model files.
const MODEL_FILES: [&str; 2] = ["safetensors", "gguf"];

/// Returns the models that a command may be meant to use: by name, and files.
pub fn models(current: &OsStr) -> Vec<CompletionCandidate> {
    let is_model = |path: &Path| {
        let extension = path.extension().and_then(OsStr::to_str);
        path.is_dir() || extension.is_some_and(|end| MODEL_FILES.contains(&end))
    };
    let files = PathCompleter::any().filter(is_model).complete(current);
    names(current).into_iter().chain(files).collect()
}

/// Returns the names of the models in the caches.
///
/// A cache that cannot be read has none: the tab key has no place for an error.
pub fn names(current: &OsStr) -> Vec<CompletionCandidate> {
    let mut names = BTreeSet::new();
    if let Ok(settings) = Settings::from_env()
        && let Ok(repositories) = Cache::new(&settings.cache).repositories()
    {
        names.extend(repositories.iter().map(|r| r.name.repository().to_owned()));
    }
    if let Ok(files) = CompressedCache::from_env().and_then(|cache| cache.files()) {
        let of_hub = files.iter().filter_map(|file| file.name.as_ref());
        names.extend(of_hub.map(ModelName::to_string));
    }
    let start = current.to_string_lossy();
    let fitting = names.into_iter().filter(|name| name.starts_with(&*start));
    fitting.map(CompletionCandidate::new).collect()
}

/// Returns the encodings.
pub fn encodings() -> Vec<CompletionCandidate> {
    let names = Encoding::ALL.map(Encoding::name);
    let all = names.into_iter().chain(["keep"]);
    all.map(CompletionCandidate::new).collect()
}

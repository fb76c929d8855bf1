//! `upg list`, and what other commands know of the caches.
#![forbid(unsafe_code)]

use crate::cli::ListArgs;
use crate::terminal;
use serde_json::{Value, json};
use std::path::Path;
use upg_compress::{Source, open};
use upg_hub::{CachedRepository, CompressedCache, CompressedFile, Hub};
use upg_kernel::Result;
use upg_kernel::format::UpgFile;
use upg_kernel::format::json::fields;

pub fn run(args: &ListArgs) -> Result<()> {
    let hub = Hub::from_env()?;
    let cache = CompressedCache::from_env()?;
    let models = all(&hub, &cache)?;
    if args.json {
        let models: Vec<_> = models.iter().map(Entry::as_json).collect();
        return terminal::print(&format!("{:#}\n", Value::from(models)));
    }
    if models.is_empty() {
        terminal::note("upg: no models yet; get one: upg pull user/model");
        return Ok(());
    }
    terminal::print(&table(&models))
}

/// Content of a cache.
pub enum Found {
    Original(CachedRepository),
    Compressed(CompressedFile),
}

/// Model in a cache.
pub struct Entry {
    pub found: Found,
    /// Bits per weight, if the model can be opened.
    bits: Option<f64>,
    family: Option<String>,
    context: Option<u64>,
}

impl Entry {
    pub fn name(&self) -> String {
        match &self.found {
            Found::Original(repository) => repository.name.to_string(),
            Found::Compressed(file) => file.label(),
        }
    }

    /// Returns whether the model is called `name`: by its name, its repository or its file.
    pub fn is_called(&self, name: &str) -> bool {
        match &self.found {
            Found::Original(repository) => repository.name.repository() == name,
            Found::Compressed(file) => {
                file.label() == name
                    || file.file_name() == name
                    || file.name.as_ref().is_some_and(|n| n.repository() == name)
            }
        }
    }

    fn kind(&self) -> &str {
        match &self.found {
            Found::Original(_) => "original",
            Found::Compressed(file) if file.options.is_empty() => "?",
            Found::Compressed(file) => &file.options,
        }
    }

    pub fn bytes(&self) -> u64 {
        match &self.found {
            Found::Original(repository) => repository.bytes,
            Found::Compressed(file) => file.bytes,
        }
    }

    pub fn path(&self) -> &Path {
        match &self.found {
            Found::Original(repository) => &repository.folder,
            Found::Compressed(file) => &file.path,
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "name": self.name(),
            "kind": self.kind(),
            "bytes": self.bytes(),
            "bits_per_weight": self.bits,
            "family": self.family,
            "context": self.context,
            "path": self.path().display().to_string(),
        })
    }

    /// Returns everything that is known, in lines.
    pub fn details(&self) -> String {
        let mut text = format!(
            "{}: {}, {}\n",
            self.name(),
            self.kind(),
            terminal::bytes(self.bytes())
        );
        let mut line = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                text += &format!("  {name:<10} {value}\n");
            }
        };
        line("path", Some(self.path().display().to_string()));
        line("family", self.family.clone());
        line("context", self.context.map(|n| format!("{n} tokens")));
        line("bits", self.bits.map(|b| format!("{b:.3} per weight")));
        match &self.found {
            Found::Original(repository) => line("weights", Some(repository.weights.join(", "))),
            Found::Compressed(file) => line("commit", file.commit.clone()),
        }
        text
    }
}

/// Lists everything in both caches. Errors: `Io`.
pub fn all(hub: &Hub, cache: &CompressedCache) -> Result<Vec<Entry>> {
    let originals = hub.cache().repositories()?.into_iter();
    // Data of other programs, such as models for images, are none of ours.
    let originals = originals
        .filter(|r| !r.weights.is_empty())
        .map(|repository| {
            let model = hub.cache().model(&repository.name).ok().flatten();
            let source = model.and_then(|model| open(&model.path).ok());
            let config = source
                .as_ref()
                .and_then(|s| s.files().config_json.as_deref());
            let bits = source.as_deref().map(bits_of);
            Entry::new(Found::Original(repository), config, bits)
        });
    let mut entries: Vec<_> = originals.collect();
    for file in cache.files()? {
        // A damaged file is listed too, so that it can be removed.
        let opened = UpgFile::open(&file.path).ok();
        let config = opened.as_ref().and_then(|f| f.metadata("config.json"));
        let bits = opened.as_ref().map(UpgFile::bits_per_weight);
        entries.push(Entry::new(Found::Compressed(file), config, bits));
    }
    entries.sort_by_key(|e| (e.name(), matches!(e.found, Found::Compressed(_))));
    Ok(entries)
}

impl Entry {
    fn new(found: Found, config: Option<&str>, bits: Option<f64>) -> Self {
        let keys = ["model_type", "max_position_embeddings"];
        let config = config.and_then(|c| fields("config.json", c, &keys).ok());
        let value = |key| config.as_ref()?.get(key);
        Self {
            family: value("model_type")
                .and_then(Value::as_str)
                .map(str::to_owned),
            context: value("max_position_embeddings").and_then(Value::as_u64),
            found,
            bits,
        }
    }
}

/// Returns the bits per weight of an original, with its texts.
fn bits_of(source: &dyn Source) -> f64 {
    let sizes = source.own_files().into_iter();
    let bytes: u64 = sizes
        .filter_map(|f| f.metadata().ok())
        .map(|m| m.len())
        .sum();
    let weights: usize = source.tensors().iter().map(|t| t.weights()).sum();
    8.0 * bytes as f64 / weights.max(1) as f64
}

fn table(models: &[Entry]) -> String {
    let shown = |text: String| text.escape_debug().to_string();
    let width = models
        .iter()
        .map(|m| shown(m.name()).chars().count())
        .max()
        .unwrap_or(0)
        .max(4);
    let mut text = String::new();
    let mut row = |cells: [String; 6]| {
        let [name, kind, size, bits, family, context] = cells;
        let line =
            format!("{name:<width$}  {kind:<8}  {size:>10}  {bits:>6}  {family:<10}  {context:>8}");
        text += line.trim_end();
        text.push('\n');
    };
    row(["NAME", "KIND", "SIZE", "BITS", "FAMILY", "CONTEXT"].map(str::to_owned));
    for model in models {
        row([
            shown(model.name()),
            shown(model.kind().to_owned()),
            terminal::bytes(model.bytes()),
            model.bits.map_or(String::new(), |b| format!("{b:.2}")),
            shown(model.family.clone().unwrap_or_default()),
            model.context.map_or(String::new(), |n| n.to_string()),
        ]);
    }
    text
}

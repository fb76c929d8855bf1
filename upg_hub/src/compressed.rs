//! Cache of compressed files: one for each original, revision and choice of options.
//!
//! ```text
//! user--model-q8-0123456789abcdef.safetensors        the file, named by a hash of all of these
//! user--model-q8-0123456789abcdef.json               its origin and options
//! .locks/user--model-q8-0123456789abcdef.lock        held while it is compressed
//! ```
#![forbid(unsafe_code)]

use crate::cache::{CachedModel, create_folder_of, entries};
use crate::download::{hex, lock};
use crate::name::ModelName;
use crate::settings::{user_cache, variable};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind as IoKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use upg_kernel::format::json::value;
use upg_kernel::inference::model_dir::read_text;
use upg_kernel::support::{AtomicFile, PartName};
use upg_kernel::{Error, Result};

/// Version of names and content: with another one, no file of an earlier build is used.
const LAYOUT: &str = "UPG 2, cache 1";

/// Bytes of the hash that are in a name.
const HASH_BYTES: usize = 8;

/// Maximum bytes of the origin's name in the name of a file.
const MAX_LABEL: usize = 100;

/// Maximum bytes of the description of a file.
const MAX_DESCRIPTION: u64 = 1 << 20;

/// Interval in which a process looks whether another one has finished a file.
const TICK: Duration = Duration::from_millis(100);

/// Original of a compressed file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// Model of the Hub.
    Hub {
        /// Name that was asked for.
        name: ModelName,
        /// Its files in the cache.
        model: CachedModel,
    },
    /// File or directory.
    Local {
        /// Absolute path.
        path: PathBuf,
        /// Canonical path; names, sizes and modification times of its files or parts.
        state: String,
    },
}

impl Origin {
    /// Describes a GGUF file or a Hugging Face directory, without reading files.
    ///
    /// Errors: `Io`.
    pub fn local(path: &Path) -> Result<Self> {
        let io = |e| Error::io("cannot open", path, e);
        let metadata = path.metadata().map_err(io)?;
        let canonical = path.canonicalize().map_err(io)?;
        let absolute = std::path::absolute(path).map_err(io)?;
        let state = match metadata.is_dir() {
            false => parts_of(path)
                .iter()
                .filter_map(|part| Some(state_of("", &part.metadata().ok()?)))
                .collect::<Vec<_>>()
                .join("\n"),
            true => {
                let ends = [".safetensors", ".json", ".jinja"];
                let mut files = entries(path)?;
                files.retain(|name, _| ends.iter().any(|end| name.ends_with(end)));
                let states = files.iter().filter_map(|(name, path)| {
                    let metadata = path.metadata().ok()?;
                    Some(state_of(name, &metadata))
                });
                states.collect::<Vec<_>>().join("\n")
            }
        };
        Ok(Self::Local {
            path: absolute,
            state: format!("{canonical:?}\n{state}"),
        })
    }

    /// Returns the name that people use: `user/model` or the path.
    pub fn label(&self) -> String {
        match self {
            Self::Hub { name, .. } => name.to_string(),
            Self::Local { path, .. } => path.display().to_string(),
        }
    }

    /// Returns everything that the result depends on, apart from options.
    fn identity(&self) -> String {
        match self {
            Self::Hub { name, model } => {
                let file = model.gguf.as_deref().unwrap_or_default();
                format!("hub\n{}\n{file}\n{}", name.repository(), model.commit)
            }
            Self::Local { state, .. } => format!("local\n{state}"),
        }
    }

    /// Returns the part of the name of a file.
    fn file_label(&self) -> String {
        let label = match self {
            Self::Hub { name, .. } => name.repository().replace('/', "--"),
            Self::Local { path, .. } => {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let stem = name.strip_suffix(".gguf").unwrap_or(&name);
                PartName::of(stem).map_or(stem, |part| part.name).to_owned()
            }
        };
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let plain = label
            .chars()
            .filter(is_plain)
            .take(MAX_LABEL)
            .collect::<String>();
        plain.trim_start_matches(['.', '-']).to_owned()
    }

    fn as_json(&self) -> Value {
        match self {
            Self::Hub { name, model } => {
                json!({ "name": name.to_string(), "commit": model.commit })
            }
            Self::Local { path, .. } => json!({ "path": path.to_string_lossy() }),
        }
    }
}

/// Returns the files of the model in the file `path`: all parts of a split one.
fn parts_of(path: &Path) -> Vec<PathBuf> {
    let stem = path.file_stem().and_then(|s| s.to_str());
    let extension = path.extension().and_then(|e| e.to_str());
    match (stem.and_then(PartName::of), extension) {
        (Some(part), Some(extension)) => (1..=part.count)
            .map(|number| path.with_file_name(part.file_name(number, extension)))
            .collect(),
        _ => vec![path.to_path_buf()],
    }
}

fn state_of(name: &str, metadata: &Metadata) -> String {
    let since = metadata
        .modified()
        .ok()
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    let time = since.map_or(0, |d| d.as_nanos());
    format!("{name} {} {time}", metadata.len())
}

/// Folder of compressed files.
#[derive(Debug, Clone)]
pub struct CompressedCache(PathBuf);

/// File in the cache, by its description.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CompressedFile {
    /// The file.
    pub path: PathBuf,
    /// Name of the original on the Hub.
    pub name: Option<ModelName>,
    /// Path of the original on this machine, if it is not from the Hub.
    pub original: Option<String>,
    /// Commit of an original from the Hub.
    pub commit: Option<String>,
    /// Options of the compression.
    pub options: String,
    /// Size in bytes.
    pub bytes: u64,
    modified: SystemTime,
}

impl CompressedFile {
    /// Returns the name that people use: `user/model` or the path of the original.
    pub fn label(&self) -> String {
        let name = self.name.as_ref().map(ModelName::to_string);
        name.or(self.original.clone()).unwrap_or_default()
    }

    /// Returns the name of the file, which `upg show` and `upg rm` take too.
    pub fn file_name(&self) -> String {
        self.path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }
}

impl CompressedCache {
    /// Creates the value; touches no file.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// Takes the folder from `UPG_CACHE`, or `upg` in `XDG_CACHE_HOME` or `~/.cache`.
    ///
    /// Errors: `Argument` if there is no home folder.
    pub fn from_env() -> Result<Self> {
        match variable("UPG_CACHE") {
            Some(folder) => Ok(Self::new(folder)),
            None => Ok(Self::new(user_cache()?.join("upg"))),
        }
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// Returns the place of the file that `origin` becomes with these `options`.
    pub fn path(&self, origin: &Origin, options: &str) -> PathBuf {
        let key = format!("{LAYOUT}\n{options}\n{}", origin.identity());
        let hash = hex(&Sha256::digest(key.as_bytes())[..HASH_BYTES]);
        let first = options.split_whitespace().next().unwrap_or_default();
        self.0.join(format!(
            "{}-{first}-{hash}.safetensors",
            origin.file_label()
        ))
    }

    /// Returns the newest file of a model of the Hub, for originals that are gone.
    ///
    /// Errors: `Io`.
    pub fn find(&self, name: &ModelName, options: &str) -> Result<Option<PathBuf>> {
        let is_same = |file: &CompressedFile| {
            let Some(found) = &file.name else {
                return false;
            };
            let same_commit = file.commit.as_deref() == Some(name.revision());
            found.repository() == name.repository()
                && found.quantization() == name.quantization()
                && (found.revision() == name.revision() || same_commit)
                && file.options == options
        };
        let same = self.files()?.into_iter().filter(is_same);
        Ok(same.max_by_key(|f| f.modified).map(|f| f.path))
    }

    /// Waits until no other process makes the file `path` of this cache.
    ///
    /// The lock ends with the value. Calls `first` once if it has to wait, and `tick` ten times a
    /// second. Errors: `Io`; those of `tick`.
    pub fn lock(
        &self,
        path: &Path,
        first: &mut dyn FnMut(),
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<File>> {
        let name = path.with_extension("lock");
        let name = name.file_name().unwrap_or_default();
        lock(&self.0.join(".locks").join(name), first, &mut || {
            tick()?;
            std::thread::sleep(TICK);
            Ok(())
        })
    }

    /// Records where the file `path` of this cache comes from. Errors: `Io`.
    pub fn record(&self, path: &Path, origin: &Origin, options: &str) -> Result<()> {
        let description = path.with_extension("json");
        create_folder_of(&description)?;
        let text = json!({ "origin": origin.as_json(), "options": options });
        let mut file = AtomicFile::create(&description)?;
        writeln!(file, "{text:#}").map_err(|e| Error::io("cannot write", &description, e))?;
        file.commit()
    }

    /// Lists the files, in the order of their names. A description that cannot be read counts as
    /// none.
    ///
    /// Errors: `Io`.
    pub fn files(&self) -> Result<Vec<CompressedFile>> {
        let mut found = Vec::new();
        for (file_name, path) in entries(&self.0)? {
            let is_file = |m: &Metadata| m.is_file();
            let Some(metadata) = path.metadata().ok().filter(is_file) else {
                continue;
            };
            if !file_name.ends_with(".safetensors") {
                continue;
            }
            let description = read_text(&path.with_extension("json"), MAX_DESCRIPTION);
            let description = description.ok().flatten().unwrap_or_default();
            let description = value("description", &description).unwrap_or_default();
            let origin = |key: &str| description.get("origin")?.get(key)?.as_str();
            let options = description.get("options").and_then(Value::as_str);
            found.push(CompressedFile {
                name: origin("name").and_then(|n| n.parse().ok()),
                original: origin("path").map(str::to_owned),
                commit: origin("commit").map(str::to_owned),
                options: options.unwrap_or_default().to_owned(),
                bytes: metadata.len(),
                modified: metadata.modified().unwrap_or(UNIX_EPOCH),
                path,
            });
        }
        Ok(found)
    }

    /// Removes a file with what belongs to it. Errors: `Io`.
    pub fn remove(&self, file: &CompressedFile) -> Result<()> {
        for path in [file.path.with_extension("json"), file.path.clone()] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != IoKind::NotFound => {
                    return Err(Error::io("cannot remove", path, e));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_name_depends_on_everything_that_the_content_depends_on() {
        let folder = std::env::temp_dir();
        let cache = CompressedCache::new("/cache");
        let hub = |name: &str, commit: &str, gguf: Option<&str>| Origin::Hub {
            name: name.parse().unwrap(),
            model: CachedModel {
                path: PathBuf::new(),
                commit: commit.to_owned(),
                gguf: gguf.map(str::to_owned),
            },
        };
        let paths = [
            cache.path(&hub("u/m", "a", None), "q8"),
            cache.path(&hub("u/m", "b", None), "q8"),
            cache.path(&hub("u/m", "a", Some("f")), "q8"),
            cache.path(&hub("u/n", "a", None), "q8"),
            cache.path(&hub("u/m", "a", None), "q4"),
            cache.path(&Origin::local(&folder).unwrap(), "q8"),
        ];
        for (i, path) in paths.iter().enumerate() {
            assert!(!paths[..i].contains(path), "{path:?}");
            assert_eq!(path.parent(), Some(Path::new("/cache")));
        }
        let name = paths[0].file_name().unwrap().to_str().unwrap();
        assert!(
            name.starts_with("u--m-q8-") && name.ends_with(".safetensors"),
            "{name}"
        );
        // A branch and its commit are the same.
        assert_eq!(cache.path(&hub("u/m@main", "a", None), "q8"), paths[0]);
    }

    #[test]
    fn a_changed_original_is_another_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.gguf");
        fs::write(&file, "one").unwrap();
        let first = Origin::local(&file).unwrap();
        assert_eq!(first, Origin::local(&file).unwrap());
        fs::write(&file, "three").unwrap();
        assert_ne!(first, Origin::local(&file).unwrap());
    }

    #[test]
    fn a_changed_part_makes_another_original() {
        let folder = tempfile::tempdir().unwrap();
        let part = |number| folder.path().join(format!("a-0000{number}-of-00002.gguf"));
        fs::write(part(1), "one").unwrap();
        fs::write(part(2), "two").unwrap();
        let first = Origin::local(&part(1)).unwrap();
        fs::write(part(2), "three").unwrap();
        assert_ne!(first, Origin::local(&part(1)).unwrap());
        let cache = CompressedCache::new("/cache");
        let name = cache.path(&first, "q8");
        let name = name.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("a-q8-"), "{name}");
    }

    #[test]
    fn files_are_listed_with_their_origin() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CompressedCache::new(folder.path());
        assert!(
            CompressedCache::new(folder.path().join("none"))
                .files()
                .unwrap()
                .is_empty()
        );
        let name: ModelName = "u/m".parse().unwrap();
        let model = CachedModel {
            path: PathBuf::new(),
            commit: "c0".into(),
            gguf: None,
        };
        let origin = Origin::Hub {
            name: name.clone(),
            model,
        };
        let path = cache.path(&origin, "q8");
        fs::write(&path, "x").unwrap();
        cache.record(&path, &origin, "q8").unwrap();
        let files = cache.files().unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!((files[0].label(), files[0].bytes), ("u/m".to_owned(), 1));
        assert_eq!(cache.find(&name, "q8").unwrap(), Some(path));
        assert_eq!(cache.find(&name, "q4").unwrap(), None);
        assert!(
            cache
                .find(&"u/m@c0".parse().unwrap(), "q8")
                .unwrap()
                .is_some()
        );
        assert_eq!(cache.find(&"u/m@c1".parse().unwrap(), "q8").unwrap(), None);
        cache.remove(&files[0]).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

//! Cache of originals, in the layout of `huggingface_hub`, which uses the same files.
//!
//! ```text
//! models--user--model/blobs/ETAG                content of files
//! models--user--model/refs/main                 commit of a branch
//! models--user--model/snapshots/COMMIT/NAME     link to a blob
//! .locks/models--user--model/ETAG.lock          held during a download
//! ```
//!
//! Source: <https://huggingface.co/docs/hub/local-cache>.
#![forbid(unsafe_code)]

use crate::name::{ModelName, is_commit, is_file};
use crate::select::{CONFIG, INDEX, TOKENIZER, Weights, choose, shards};
use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind as IoKind, Write};
use std::path::{Path, PathBuf};
use upg_kernel::inference::model_dir::read_text;
use upg_kernel::support::AtomicFile;
use upg_kernel::{Error, Result};

/// Prefix of the folders of models; data sets have others.
const PREFIX: &str = "models--";

/// Maximum bytes of a reference; a commit has 40.
const MAX_REFERENCE: u64 = 256;

/// Maximum bytes of an index of shards.
pub(crate) const MAX_INDEX: u64 = 64 << 20;

/// Depth of folders inside of a snapshot that are searched for files.
const MAX_DEPTH: usize = 4;

/// Folder of the cache.
#[derive(Debug, Clone)]
pub struct Cache(PathBuf);

/// Model of which everything is on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CachedModel {
    /// Directory with `config.json`, or the first GGUF file.
    pub path: PathBuf,
    /// Commit that the files belong to.
    pub commit: String,
    /// Name of the GGUF file in the repository, if the model is one.
    pub gguf: Option<String>,
}

impl CachedModel {
    pub(crate) fn new(weights: &Weights, snapshot: &Path, commit: String) -> Self {
        let gguf = match weights {
            Weights::Gguf(files) => files.first().cloned(),
            Weights::Safetensors(_) | Weights::Sharded => None,
        };
        Self {
            path: gguf
                .as_ref()
                .map_or(snapshot.to_path_buf(), |f| snapshot.join(f)),
            commit,
            gguf,
        }
    }
}

/// Repository in the cache, perhaps only a part of it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CachedRepository {
    /// Name, `user/model`.
    pub name: ModelName,
    /// Bytes on the disk, of all revisions.
    pub bytes: u64,
    /// Names of the weights: `safetensors` or GGUF files, of all revisions.
    pub weights: Vec<String>,
    /// Folder of the repository.
    pub folder: PathBuf,
}

impl Cache {
    /// Creates the value; touches no file.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self(folder.into())
    }

    /// Returns the folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    fn folder_name(name: &ModelName) -> String {
        format!("{PREFIX}{}", name.repository().replace('/', "--"))
    }

    /// Returns the folder of a repository.
    pub fn repository(&self, name: &ModelName) -> PathBuf {
        self.0.join(Self::folder_name(name))
    }

    pub(crate) fn snapshot(&self, name: &ModelName, commit: &str) -> PathBuf {
        self.repository(name).join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, name: &ModelName, etag: &str) -> PathBuf {
        self.repository(name).join("blobs").join(etag)
    }

    pub(crate) fn lock(&self, name: &ModelName, etag: &str) -> PathBuf {
        let folder = self.0.join(".locks").join(Self::folder_name(name));
        folder.join(format!("{etag}.lock"))
    }

    /// Returns the commit of the revision of `name`, as last looked up.
    ///
    /// Errors: `Io`.
    pub fn commit(&self, name: &ModelName) -> Result<Option<String>> {
        if is_commit(name.revision()) {
            return Ok(Some(name.revision().to_owned()));
        }
        let path = self.repository(name).join("refs").join(name.revision());
        let commit = read_text(&path, MAX_REFERENCE)?;
        let commit = commit.map(|text| text.trim().to_owned());
        Ok(commit.filter(|commit| is_commit(commit)))
    }

    /// Records the commit of the revision of `name`. Errors: `Io`.
    pub(crate) fn set_commit(&self, name: &ModelName, commit: &str) -> Result<()> {
        if is_commit(name.revision()) || self.commit(name)?.as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.repository(name).join("refs").join(name.revision());
        create_folder_of(&path)?;
        let mut file = AtomicFile::create(&path)?;
        let written = file.write_all(commit.as_bytes());
        written.map_err(|e| Error::io("cannot write", &path, e))?;
        file.commit()
    }

    /// Returns the model `name`, if all of its weights, its config and its tokenizer are here.
    ///
    /// Uses no network. Of several GGUF files it chooses among those that are here. Errors: `Io`;
    /// those of a malformed index.
    pub fn model(&self, name: &ModelName) -> Result<Option<CachedModel>> {
        let Some(commit) = self.commit(name)? else {
            return Ok(None);
        };
        let snapshot = self.snapshot(name, &commit);
        let files = files_in(&snapshot)?;
        let Ok(weights) = choose(name, files.iter().map(String::as_str)) else {
            return Ok(None);
        };
        let needed = match &weights {
            Weights::Gguf(files) => files.clone(),
            Weights::Safetensors(file) => vec![file.clone(), CONFIG.into(), TOKENIZER.into()],
            Weights::Sharded => {
                let index = read_text(&snapshot.join(INDEX), MAX_INDEX)?.unwrap_or_default();
                let shards = shards(&index).map_err(|e| e.at(snapshot.join(INDEX)))?;
                shards
                    .into_iter()
                    .chain([CONFIG.into(), TOKENIZER.into()])
                    .collect()
            }
        };
        // A link to a blob that is gone does not exist.
        let is_whole = needed.iter().all(|file| snapshot.join(file).is_file());
        Ok(is_whole.then(|| CachedModel::new(&weights, &snapshot, commit)))
    }

    /// Lists the models in the cache, in the order of their names.
    ///
    /// Errors: `Io`.
    pub fn repositories(&self) -> Result<Vec<CachedRepository>> {
        let mut found = Vec::new();
        for (file_name, folder) in entries(&self.0)? {
            let name = file_name
                .strip_prefix(PREFIX)
                .and_then(|n| n.split_once("--"));
            let Some((user, model)) = name else { continue };
            let Ok(name) = format!("{user}/{model}").parse::<ModelName>() else {
                continue;
            };
            let mut weights = Vec::new();
            for (_, snapshot) in entries(&folder.join("snapshots"))? {
                weights.extend(files_in(&snapshot)?);
            }
            weights.retain(|w| w.ends_with(".safetensors") || w.ends_with(".gguf"));
            weights.sort();
            weights.dedup();
            found.push(CachedRepository {
                name,
                bytes: bytes_in(&folder)?,
                weights,
                folder,
            });
        }
        found.sort_by_key(|r| r.name.to_string());
        Ok(found)
    }

    /// Returns the bytes of unfinished downloads of a repository.
    pub(crate) fn partial_bytes(&self, name: &ModelName) -> u64 {
        let blobs = entries(&self.repository(name).join("blobs")).unwrap_or_default();
        let partial = blobs
            .iter()
            .filter(|(name, _)| name.ends_with(".incomplete"));
        partial
            .filter_map(|(_, path)| path.metadata().ok())
            .map(|m| m.len())
            .sum()
    }

    /// Removes a repository with all of its revisions. Returns whether there was one.
    ///
    /// Errors: `Io`.
    pub fn remove(&self, name: &ModelName) -> Result<bool> {
        for folder in [
            self.0.join(".locks").join(Self::folder_name(name)),
            self.repository(name),
        ] {
            match fs::remove_dir_all(&folder) {
                Ok(()) => {}
                Err(e) if e.kind() == IoKind::NotFound => {
                    if folder == self.repository(name) {
                        return Ok(false);
                    }
                }
                Err(e) => return Err(Error::io("cannot remove", folder, e)),
            }
        }
        Ok(true)
    }
}

/// Creates the folder that `path` is to be in. Errors: `Io`.
pub(crate) fn create_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io("cannot create", folder, e))
}

/// Returns the entries of a folder whose names are UTF-8; none if there is no folder.
pub(crate) fn entries(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let io = |e| Error::io("cannot read", folder, e);
    let entries = match fs::read_dir(folder) {
        Err(e) if matches!(e.kind(), IoKind::NotFound | IoKind::NotADirectory) => {
            return Ok(BTreeMap::new());
        }
        entries => entries.map_err(io)?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        if let Ok(name) = entry.file_name().into_string() {
            found.insert(name, entry.path());
        }
    }
    Ok(found)
}

/// Returns the paths of all files in a snapshot, with `/` between their parts.
fn files_in(snapshot: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut folders = vec![(String::new(), snapshot.to_path_buf(), 0)];
    while let Some((prefix, folder, depth)) = folders.pop() {
        for (name, path) in entries(&folder)? {
            let name = format!("{prefix}{name}");
            match path.is_dir() {
                true if depth < MAX_DEPTH && !path.is_symlink() => {
                    folders.push((name + "/", path, depth + 1));
                }
                true => {}
                false if is_file(&name) => files.push(name),
                false => {}
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Returns the bytes of all files in a folder; links count nothing.
fn bytes_in(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for path in entries(&folder)?.into_values() {
            // A file that another process just removed counts nothing.
            let Ok(metadata) = path.symlink_metadata() else {
                continue;
            };
            match metadata.is_dir() {
                true => folders.push(path),
                false if metadata.is_file() => bytes += metadata.len(),
                false => {}
            }
        }
    }
    Ok(bytes)
}

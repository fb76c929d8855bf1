//! The Hub and its cache: looks up a name, downloads what is missing.
#![forbid(unsafe_code)]

use crate::cache::{Cache, CachedModel, MAX_INDEX, create_folder_of};
use crate::download::{Download, Progress, escaped};
use crate::http::Client;
use crate::name::{ModelName, is_commit, is_file};
use crate::select::{FileEntry, INDEX, Weights, choose, shards};
use crate::settings::Settings;
use serde_json::Value;
use upg_kernel::format::json::fields;
use upg_kernel::inference::model_dir::read_text;
use upg_kernel::{Error, ErrorKind, Result};

/// Maximum bytes of the description of a repository.
const MAX_DESCRIPTION: u64 = 16 << 20;

/// The Hugging Face Hub, or a server with the same interface, and the cache on this machine.
pub struct Hub {
    client: Client,
    cache: Cache,
}

/// Answer of the Hub about a model.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Listing {
    /// Name that was looked up.
    pub name: ModelName,
    /// Commit of its revision.
    pub commit: String,
    /// Weights that were chosen.
    pub weights: Weights,
    /// Files that the model needs. The shards are those that look like some.
    pub files: Vec<FileEntry>,
    /// Number of weights, if the Hub knows it.
    pub parameters: Option<u64>,
}

impl Listing {
    /// Returns the bytes of all files, if the Hub states them.
    pub fn bytes(&self) -> Option<u64> {
        self.files.iter().map(|f| f.bytes).sum()
    }
}

impl Hub {
    /// Creates the value; connects to nothing. Errors: `Argument` for a bad endpoint.
    pub fn new(settings: Settings) -> Result<Self> {
        Ok(Self {
            cache: Cache::new(&settings.cache),
            client: Client::new(settings)?,
        })
    }

    /// Runs [`Hub::new`] with [`Settings::from_env`]. Errors: those of both.
    pub fn from_env() -> Result<Self> {
        Self::new(Settings::from_env()?)
    }

    /// Returns the cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Returns the settings.
    pub fn settings(&self) -> &Settings {
        self.client.settings()
    }

    /// Returns the model if all of it is in the cache. Uses no network.
    ///
    /// Errors: those of [`Cache::model`].
    pub fn cached(&self, name: &ModelName) -> Result<Option<CachedModel>> {
        self.cache.model(name)
    }

    /// Asks the Hub for the commit and the files of a model.
    ///
    /// Errors: `Missing` (no such model or revision, no weights), `Io` (no access, no network,
    /// offline), `Malformed`, `TooLarge` for an answer beyond its limits, `Argument` for a
    /// quantization that is not there, `Interrupted`.
    pub fn look_up(&self, name: &ModelName) -> Result<Listing> {
        if self.settings().offline {
            let message = format!("{name} is not in the cache, and the network is not to be used");
            return Err(Error::new(ErrorKind::Missing, message)
                .hint("leave out --offline and HF_HUB_OFFLINE, or copy it into the cache"));
        }
        let revision = escaped(name.revision());
        let parts = ["api", "models", name.repository(), "revision"];
        let query = format!("{revision}?blobs=true");
        let address = self.client.address(&[&parts[..], &[&query]].concat())?;
        let text = self
            .client
            .text(&address, MAX_DESCRIPTION, &|_| {})
            .map_err(|e| {
                let message = format!("{name}: {e}");
                match e.kind() {
                    ErrorKind::Missing | ErrorKind::Io => {
                        Error::new(e.kind(), message).with_source(e)
                    }
                    _ => e,
                }
            })?;
        let description = fields(
            "description of the model",
            &text,
            &["sha", "siblings", "safetensors", "gguf"],
        )?;
        let malformed = |what: &str| {
            Error::new(
                ErrorKind::Malformed,
                format!("{}: {what}", self.settings().endpoint),
            )
            .hint("is it a Hugging Face Hub?")
        };
        let commit = description.get("sha").and_then(Value::as_str);
        let commit = commit.filter(|c| is_commit(c));
        let commit = commit.ok_or_else(|| malformed("no commit in the description"))?;
        let siblings = description.get("siblings").and_then(Value::as_array);
        let siblings = siblings.ok_or_else(|| malformed("no list of files in the description"))?;
        let mut files: Vec<_> = siblings.iter().filter_map(entry).collect();
        let weights = choose(name, files.iter().map(|f| f.name.as_str()))?;
        files.retain(|f| {
            weights.needs(&f.name) || (weights == Weights::Sharded && is_like_a_shard(&f.name))
        });
        let total = |key| description.get(key)?.get("total")?.as_u64();
        Ok(Listing {
            name: name.clone(),
            commit: commit.to_owned(),
            parameters: match weights {
                Weights::Gguf(_) => total("gguf"),
                Weights::Safetensors(_) | Weights::Sharded => total("safetensors"),
            },
            weights,
            files,
        })
    }

    /// Downloads the files of `listing` that are not in the cache.
    ///
    /// Errors: as [`Hub::look_up`]; `Checksum` if a file is not what the Hub stated. What was
    /// downloaded stays, and the next call resumes.
    pub fn pull(&self, listing: &Listing, progress: &dyn Progress) -> Result<CachedModel> {
        let Listing { name, commit, .. } = listing;
        let snapshot = self.cache.snapshot(name, commit);
        let mut download = Download {
            client: &self.client,
            cache: &self.cache,
            name,
            commit,
            progress,
            before: 0,
        };
        let mut files: Vec<&FileEntry> = listing.files.iter().collect();
        // Small files first: what is wrong with a model is found before its weights.
        files.sort_by_key(|f| f.bytes);
        let index = match listing.weights {
            Weights::Sharded => {
                download.file(INDEX)?;
                let path = snapshot.join(INDEX);
                let text = read_text(&path, MAX_INDEX)?.unwrap_or_default();
                shards(&text).map_err(|e| e.at(path))?
            }
            Weights::Safetensors(_) | Weights::Gguf(_) => Vec::new(),
        };
        files.retain(|f| listing.weights.needs(&f.name) || index.contains(&f.name));
        if let Some(shard) = index.iter().find(|s| files.iter().all(|f| f.name != **s)) {
            let message = format!("{name} has no file {shard}, which its index lists");
            return Err(Error::new(ErrorKind::Missing, message));
        }
        let all: Option<u64> = files.iter().map(|f| f.bytes).sum();
        self.check_room(&download, &files)?;
        progress.start(all);
        for file in files {
            download.before += download.file(&file.name)?;
            progress.position(download.before);
        }
        self.cache.set_commit(name, commit)?;
        Ok(CachedModel::new(
            &listing.weights,
            &snapshot,
            commit.clone(),
        ))
    }

    /// Refuses a download that does not fit on the disk (`Io`).
    fn check_room(&self, download: &Download<'_>, files: &[&FileEntry]) -> Result<()> {
        let snapshot = self.cache.snapshot(download.name, download.commit);
        let missing = files.iter().filter(|f| !snapshot.join(&f.name).is_file());
        let missing: u64 = missing.filter_map(|f| f.bytes).sum();
        create_folder_of(&snapshot)?;
        let folder = self.cache.folder();
        // Without this figure the download itself finds out.
        let Ok(free) = fs4::available_space(folder) else {
            return Ok(());
        };
        let have = self.cache.partial_bytes(download.name);
        match missing.saturating_sub(have) > free {
            false => Ok(()),
            true => {
                let megabytes = |n: u64| n as f64 / 1e6;
                let message = format!(
                    "needs {:.1} MB on the disk of the cache, where {:.1} MB are free",
                    megabytes(missing),
                    megabytes(free)
                );
                Err(Error::new(ErrorKind::Io, message)
                    .at(folder)
                    .hint("make room, or name another folder in HF_HUB_CACHE"))
            }
        }
    }
}

/// Reads one entry of the list of files; `None` for names that are no paths inside of it.
fn entry(sibling: &Value) -> Option<FileEntry> {
    let name = sibling.get("rfilename")?.as_str().filter(|n| is_file(n))?;
    let bytes = sibling.get("size").and_then(Value::as_u64);
    Some(FileEntry {
        name: name.to_owned(),
        bytes,
    })
}

fn is_like_a_shard(file: &str) -> bool {
    !file.contains('/') && file.ends_with(".safetensors")
}

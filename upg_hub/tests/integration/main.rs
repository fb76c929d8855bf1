//! Downloads from a server on this machine: faults, resumption, the layout of the cache.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../common/mirror.rs"]
mod mirror;

use mirror::{COMMIT, Faults, Mirror};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use upg_hub::{CachedModel, Hub, ModelName, Progress, Settings};
use upg_kernel::{Error, ErrorKind, Result};

/// Bytes of the weights of the model of [`mirror_of_one`].
const WEIGHTS: usize = 300_000;

fn weights() -> Vec<u8> {
    (0..WEIGHTS).map(|i| (i * i / 7) as u8).collect()
}

fn mirror_of_one() -> Mirror {
    let mirror = Mirror::start();
    mirror.add("user/model/config.json", "{}");
    mirror.add("user/model/tokenizer.json", "{\"a\": 1}");
    mirror.add("user/model/model.safetensors", weights());
    mirror.add("user/model/pytorch_model.bin", "pickle");
    mirror.add("user/model/README.md", "text");
    mirror
}

fn name() -> ModelName {
    "user/model".parse().unwrap()
}

fn settings(mirror: &Mirror, cache: &Path) -> Settings {
    let mut settings = Settings::new(cache);
    settings.endpoint = mirror.endpoint();
    settings.backoff = Duration::from_millis(1);
    settings.timeout = Duration::from_secs(10);
    settings
}

fn pull_with(settings: Settings, name: &ModelName) -> Result<CachedModel> {
    let hub = Hub::new(settings)?;
    hub.pull(&hub.look_up(name)?, &())
}

fn pull(mirror: &Mirror, cache: &TempDir) -> Result<CachedModel> {
    pull_with(settings(mirror, cache.path()), &name())
}

fn weights_at(model: &CachedModel) -> Vec<u8> {
    fs::read(model.path.join("model.safetensors")).unwrap()
}

/// Returns the names in the folder of blobs.
fn blobs(cache: &TempDir) -> Vec<String> {
    let folder = cache.path().join("models--user--model/blobs");
    let entries = fs::read_dir(folder).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn partial(cache: &TempDir) -> Option<PathBuf> {
    let name = blobs(cache)
        .into_iter()
        .find(|n| n.ends_with(".incomplete"))?;
    Some(cache.path().join("models--user--model/blobs").join(name))
}

#[test]
fn a_model_is_in_the_layout_that_other_programs_use() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    let hub = Hub::new(settings(&mirror, cache.path())).unwrap();
    assert!(hub.cached(&name()).unwrap().is_none());
    let listing = hub.look_up(&name()).unwrap();
    assert_eq!(listing.bytes(), Some(WEIGHTS as u64 + 10));
    let model = hub.pull(&listing, &()).unwrap();
    let folder = cache.path().join("models--user--model");
    assert_eq!(model.path, folder.join("snapshots").join(COMMIT));
    assert_eq!(
        fs::read_to_string(folder.join("refs/main")).unwrap(),
        COMMIT
    );
    assert_eq!(weights_at(&model), weights());
    let mut names: Vec<_> = fs::read_dir(&model.path)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model.safetensors", "tokenizer.json"]
    );
    #[cfg(unix)]
    {
        let target = fs::read_link(model.path.join("model.safetensors")).unwrap();
        assert!(target.starts_with("../../blobs"), "{target:?}");
    }
    // Everything is here: nothing is asked, also for another name of the same commit.
    mirror.requests();
    for same in ["user/model".to_owned(), format!("user/model@{COMMIT}")] {
        let found = hub.cached(&same.parse().unwrap()).unwrap().unwrap();
        assert_eq!(found.path, model.path);
    }
    assert!(mirror.requests().is_empty());
    // The list of the cache, and its end.
    let found = hub.cache().repositories().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, name());
    assert_eq!(found[0].weights, ["model.safetensors"]);
    assert!((WEIGHTS as u64..WEIGHTS as u64 + 100).contains(&found[0].bytes));
    assert!(hub.cache().remove(&name()).unwrap());
    assert!(!hub.cache().remove(&name()).unwrap());
    assert!(!folder.exists());
}

#[test]
fn only_the_shards_of_the_index_are_downloaded() {
    let (mirror, cache) = (Mirror::start(), tempfile::tempdir().unwrap());
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    mirror.add("user/model/model.safetensors.index.json", index);
    mirror.add("user/model/config.json", "{}");
    for file in [
        "model-00001-of-00002",
        "model-00002-of-00002",
        "consolidated",
    ] {
        mirror.add(&format!("user/model/{file}.safetensors"), file);
    }
    let model = pull(&mirror, &cache).unwrap();
    assert!(
        model
            .path
            .join("model-00002-of-00002.safetensors")
            .is_file()
    );
    assert!(!model.path.join("consolidated.safetensors").exists());
}

#[test]
fn a_quantization_chooses_a_gguf_file() {
    let (mirror, cache) = (Mirror::start(), tempfile::tempdir().unwrap());
    for file in ["m-Q4_K_M.gguf", "m-Q8_0.gguf"] {
        mirror.add(&format!("user/model/{file}"), file);
    }
    let name: ModelName = "user/model:q4_k_m".parse().unwrap();
    let model = pull_with(settings(&mirror, cache.path()), &name).unwrap();
    assert_eq!(fs::read_to_string(&model.path).unwrap(), "m-Q4_K_M.gguf");
    let hub = Hub::new(settings(&mirror, cache.path())).unwrap();
    assert_eq!(hub.cached(&name).unwrap().unwrap().path, model.path);
    // Another one is not in the cache, and the whole repository is not asked for.
    assert!(
        hub.cached(&"user/model:q8_0".parse().unwrap())
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_transfer_that_is_cut_twice_is_resumed() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    *mirror.faults() = Faults {
        cuts: 2,
        cut_after: 100_000,
        ..Faults::default()
    };
    let model = pull(&mirror, &cache).unwrap();
    assert_eq!(weights_at(&model), weights());
    let ranges: Vec<_> = mirror
        .requests()
        .into_iter()
        .filter_map(|r| r.range)
        .collect();
    assert_eq!(ranges, ["bytes=100000-", "bytes=200000-"]);
}

#[test]
fn a_later_run_resumes_what_an_earlier_one_left() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    *mirror.faults() = Faults {
        cuts: 1,
        cut_after: 100_000,
        ..Faults::default()
    };
    let mut once = settings(&mirror, cache.path());
    once.attempts = 1;
    let e = pull_with(once, &name()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
    assert!(e.to_string().contains("resumes"), "{e}");
    assert_eq!(partial(&cache).unwrap().metadata().unwrap().len(), 100_000);
    mirror.requests();
    assert_eq!(weights_at(&pull(&mirror, &cache).unwrap()), weights());
    let ranges: Vec<_> = mirror
        .requests()
        .into_iter()
        .filter_map(|r| r.range)
        .collect();
    assert_eq!(ranges, ["bytes=100000-"]);
    assert_eq!(partial(&cache), None);
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    *mirror.faults() = Faults {
        cuts: 1,
        cut_after: 100_000,
        ignores_ranges: true,
        ..Faults::default()
    };
    assert_eq!(weights_at(&pull(&mirror, &cache).unwrap()), weights());
}

#[test]
fn a_busy_server_is_asked_again() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    mirror.faults().unavailable = 3;
    pull(&mirror, &cache).unwrap();
    mirror.faults().unavailable = usize::MAX;
    let e = pull(&mirror, &cache).unwrap_err();
    assert!(e.to_string().contains("503"), "{e}");
    mirror.requests();
}

#[test]
fn a_server_that_falls_silent_is_given_up() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    mirror.faults().delay = Duration::from_secs(60);
    let mut own = settings(&mirror, cache.path());
    (own.timeout, own.attempts) = (Duration::from_millis(100), 2);
    let e = pull_with(own, &name()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
    assert!(e.to_string().contains("2 attempts"), "{e}");
}

#[test]
fn other_content_than_stated_is_refused_and_removed() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    mirror.faults().wrong = true;
    let e = pull(&mirror, &cache).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Checksum, "{e}");
    assert!(e.to_string().contains("model.safetensors"), "{e}");
    // The two small files are left, and nothing of the weights.
    assert_eq!(blobs(&cache).len(), 2);
    let hub = Hub::new(settings(&mirror, cache.path())).unwrap();
    assert!(hub.cached(&name()).unwrap().is_none());
    // The content of an earlier download counts as well.
    mirror.faults().wrong = false;
    let model = pull(&mirror, &cache).unwrap();
    let blob = fs::canonicalize(model.path.join("model.safetensors")).unwrap();
    let partial = blob.with_file_name(format!(
        "{}.incomplete",
        blob.file_name().unwrap().display()
    ));
    fs::remove_file(&blob).unwrap();
    fs::write(&partial, vec![1; 1000]).unwrap();
    let e = pull(&mirror, &cache).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Checksum, "{e}");
    assert_eq!(weights_at(&pull(&mirror, &cache).unwrap()), weights());
}

#[test]
fn a_token_is_needed_sent_and_kept() {
    let (mirror, storage) = (mirror_of_one(), mirror_of_one());
    let cache = tempfile::tempdir().unwrap();
    mirror.faults().token = Some("hf_secret".into());
    let e = pull(&mirror, &cache).unwrap_err();
    assert!(e.to_string().contains("HF_TOKEN"), "{e}");
    // Weights come from another host, which must not see the token.
    mirror.faults().storage = Some(storage.endpoint());
    let mut own = settings(&mirror, cache.path());
    own.token = Some("hf_secret".into());
    let model = pull_with(own.clone(), &name()).unwrap();
    assert_eq!(weights_at(&model), weights());
    let requests = storage.requests();
    assert!(!requests.is_empty());
    assert!(
        requests.iter().all(|r| r.authorization.is_none()),
        "{requests:?}"
    );
    // Errors do not have it either.
    mirror.faults().status = Some(403);
    let e = pull_with(own, &"user/other".parse().unwrap()).unwrap_err();
    assert!(!format!("{e:?}").contains("secret"), "{e}");
}

#[test]
fn what_is_not_there_is_said() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    for other in ["user/other", "user/model@other"] {
        let e = pull_with(settings(&mirror, cache.path()), &other.parse().unwrap()).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Missing, "{e}");
        assert!(e.to_string().contains(other), "{e}");
    }
    mirror.add("user/pickle/pytorch_model.bin", "x");
    let e = pull_with(
        settings(&mirror, cache.path()),
        &"user/pickle".parse().unwrap(),
    );
    assert!(e.unwrap_err().to_string().contains("pytorch_model.bin"));
    assert!(!cache.path().join("models--user--pickle").exists());
}

#[test]
fn without_a_network_the_cache_is_enough() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    let mut offline = settings(&mirror, cache.path());
    offline.offline = true;
    let hub = Hub::new(offline).unwrap();
    let e = hub.look_up(&name()).unwrap_err();
    assert!(e.to_string().contains("HF_HUB_OFFLINE"), "{e}");
    assert!(mirror.requests().is_empty());
    pull(&mirror, &cache).unwrap();
    assert!(hub.cached(&name()).unwrap().is_some());
    // Without a server at all.
    let mut nobody = Settings::new(cache.path());
    nobody.endpoint = "http://127.0.0.1:9".into();
    nobody.backoff = Duration::from_millis(1);
    let e = pull_with(nobody, &name()).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Io);
    assert!(e.to_string().contains("127.0.0.1"), "{e}");
}

#[test]
fn huge_descriptions_are_refused() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    for huge in [(1 << 40, true), (64 << 20, false)] {
        mirror.faults().huge = Some(huge);
        let e = pull(&mirror, &cache).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::TooLarge, "{e}");
    }
}

#[test]
fn names_of_a_server_do_not_leave_the_cache() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    for odd in [
        "../../../chat_template.jinja",
        "/chat_template.x",
        "chat_template.a/../../x",
    ] {
        mirror.faults().odd_name = Some(odd.into());
        pull(&mirror, &cache).unwrap();
    }
    let index = r#"{"weight_map": {"a": "../../evil.safetensors"}}"#;
    mirror.add("user/evil/model.safetensors.index.json", index);
    mirror.faults().odd_name = None;
    let e = pull_with(
        settings(&mirror, cache.path()),
        &"user/evil".parse().unwrap(),
    )
    .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Malformed, "{e}");
}

/// Observer that counts, and raises a flag once some bytes are there.
#[derive(Default)]
struct Counted {
    waits: AtomicUsize,
    interrupt: Option<(u64, Arc<AtomicBool>)>,
    retries: AtomicUsize,
}

impl Progress for Counted {
    fn position(&self, bytes: u64) {
        if let Some((at, flag)) = &self.interrupt
            && bytes >= *at
        {
            flag.store(true, Ordering::Relaxed);
        }
    }

    fn retry(&self, _why: &Error) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    fn wait(&self, _name: &str) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn an_interrupt_ends_a_download_that_can_be_resumed() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    let flag = Arc::new(AtomicBool::new(false));
    let mut own = settings(&mirror, cache.path());
    own.interrupt = Some(Arc::clone(&flag));
    let hub = Hub::new(own).unwrap();
    let progress = Counted {
        interrupt: Some((1000, flag)),
        ..Counted::default()
    };
    let e = hub
        .pull(&hub.look_up(&name()).unwrap(), &progress)
        .unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Interrupted, "{e}");
    assert!(partial(&cache).unwrap().metadata().unwrap().len() > 0);
    assert_eq!(weights_at(&pull(&mirror, &cache).unwrap()), weights());
}

#[test]
fn two_at_once_download_once() {
    let (mirror, cache) = (mirror_of_one(), tempfile::tempdir().unwrap());
    mirror.faults().delay = Duration::from_millis(5);
    let progress = Counted::default();
    let one = || {
        let hub = Hub::new(settings(&mirror, cache.path()))?;
        hub.pull(&hub.look_up(&name())?, &progress)
    };
    std::thread::scope(|scope| {
        let both = [scope.spawn(one), scope.spawn(one)];
        for handle in both {
            assert_eq!(weights_at(&handle.join().unwrap().unwrap()), weights());
        }
    });
    let requests = mirror.requests();
    let weights = requests
        .iter()
        .filter(|r| r.method == "GET" && r.path.ends_with("safetensors"));
    assert_eq!(weights.count(), 1);
    assert!(progress.waits.load(Ordering::Relaxed) > 0);
}

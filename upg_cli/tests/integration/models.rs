//! Models by name and other originals: from empty caches to text, against a server on this machine.

use crate::common::{
    copy_model, names, output, success, tiny_model, tokenizer_of_two_letters, upg,
};
use crate::mirror::{COMMIT, Faults, Mirror};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Limit of the start of a command whose model is in the cache, with the load of other tests.
const WARM: Duration = Duration::from_secs(5);

/// Folder of GGUF files that another program wrote.
fn gguf_fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../upg_compress/tests/data")
}

struct Place {
    mirror: Mirror,
    folder: TempDir,
}

impl Place {
    /// A server with the tiny phi3 and a tokenizer of two letters, and empty caches.
    fn new() -> Self {
        let (mirror, folder) = (Mirror::start(), tempfile::tempdir().unwrap());
        let source = folder.path().join("source");
        copy_model("phi3", "phi3", &source);
        fs::write(source.join("tokenizer.json"), tokenizer_of_two_letters()).unwrap();
        for file in names(&source) {
            let content = fs::read(source.join(&file)).unwrap();
            mirror.add(&format!("user/tiny/{file}"), content);
        }
        Self { mirror, folder }
    }

    fn upg(&self, args: &[&str]) -> Command {
        let mut command = upg(args);
        command
            .env("HF_HOME", self.folder.path().join("hf"))
            .env("UPG_CACHE", self.folder.path().join("upg"))
            .env("HF_ENDPOINT", self.mirror.endpoint());
        for name in [
            "HF_HUB_CACHE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
        ] {
            command.env_remove(name);
        }
        command
    }

    /// Names of the compressed files.
    fn compressed(&self) -> Vec<String> {
        let all = names(&self.folder.path().join("upg"));
        all.into_iter()
            .filter(|n| n.ends_with(".safetensors"))
            .collect()
    }

    fn logits(&self, model: &str, more: &[&str]) -> Vec<u8> {
        let out = self.folder.path().join("logits");
        let out = out.to_str().unwrap();
        let run = ["run", model, "--tokens", "5,6,7", "--logits", out];
        success(&mut self.upg(&[&run[..], more].concat()));
        fs::read(out).unwrap()
    }
}

#[test]
fn a_name_is_enough_to_run_a_model() {
    let place = Place::new();
    place.mirror.faults().cuts = 1;
    place.mirror.faults().cut_after = 1000;
    let run = [
        "run",
        "user/tiny",
        "-p",
        "ab",
        "-n",
        "4",
        "--temp",
        "0",
        "--quiet",
    ];
    let (code, first, stderr) = output(&mut place.upg(&run));
    assert_eq!(code, Some(0), "{stderr}");
    // Without a terminal there is no question, but a word.
    assert!(stderr.contains("download user/tiny"), "{stderr}");
    assert!(stderr.contains("as q8"), "{stderr}");
    assert!(place.mirror.requests().iter().any(|r| r.range.is_some()));
    assert_eq!(place.compressed().len(), 1);
    // Everything is here now: no request, no word.
    let start = Instant::now();
    let (code, second, stderr) = output(&mut place.upg(&run));
    assert_eq!((code, &second, stderr.as_str()), (Some(0), &first, ""));
    assert!(start.elapsed() < WARM, "{:?}", start.elapsed());
    let mut offline = place.upg(&[&run[..], &["--offline"]].concat());
    assert_eq!(success(&mut offline), first);
    assert!(place.mirror.requests().is_empty());
    // Without the original, too.
    let rm = ["rm", "user/tiny"];
    let (code, _, stderr) = output(&mut place.upg(&rm));
    assert_eq!(code, Some(2), "{stderr}");
    fs::remove_dir_all(place.folder.path().join("hf")).unwrap();
    assert_eq!(success(&mut place.upg(&run)), first);
    assert!(place.mirror.requests().is_empty());
}

#[test]
fn caches_are_listed_shown_and_cleared() {
    let place = Place::new();
    let list = |more: &[&str]| success(&mut place.upg(&[&["list"], more].concat()));
    assert_eq!(list(&[]), "");
    let pulled = success(&mut place.upg(&["pull", "user/tiny"]));
    assert!(pulled.trim_end().ends_with(COMMIT), "{pulled}");
    for encoding in ["q8", "q4"] {
        let verify = ["verify", "user/tiny", "--encoding", encoding];
        assert!(success(&mut place.upg(&verify)).contains("sound"));
    }
    let table = list(&[]);
    for word in ["user/tiny", "original", "q8", "q4", "phi3"] {
        assert!(table.contains(word), "{table}");
    }
    assert_eq!(table.lines().count(), 4, "{table}");
    let json: serde_json::Value = serde_json::from_str(&list(&["--json"])).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 3);
    assert!(json[1]["bits_per_weight"].as_f64().unwrap() > 4.0, "{json}");
    // The tab key knows it, too.
    let mut tab = place.upg(&["--", "upg", "run", "us"]);
    tab.env("UPG_COMPLETE", "bash");
    let tab = tab.env("_CLAP_COMPLETE_INDEX", "2").env("_CLAP_IFS", "\n");
    assert_eq!(success(tab), "user/tiny");
    let shown = success(&mut place.upg(&["show", "user/tiny"]));
    assert!(
        shown.contains(COMMIT) && shown.contains("context"),
        "{shown}"
    );

    success(&mut place.upg(&["rm", "user/tiny", "--keep-original"]));
    assert_eq!(place.compressed(), [""; 0]);
    assert_eq!(list(&[]).lines().count(), 2);
    success(&mut place.upg(&["rm", "user/tiny", "--yes"]));
    assert_eq!(list(&[]), "");
    for command in ["show", "rm"] {
        let (code, _, stderr) = output(&mut place.upg(&[command, "user/tiny"]));
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains("upg list"), "{stderr}");
    }
}

#[test]
fn local_originals_are_compressed_once() {
    let place = Place::new();
    let model = tiny_model("phi3");
    let model = model.to_str().unwrap();
    let logits = place.logits(model, &[]);
    let files = place.compressed();
    assert_eq!(files.len(), 1);
    let made = |name: &str| {
        place
            .folder
            .path()
            .join("upg")
            .join(name)
            .metadata()
            .unwrap()
            .modified()
    };
    let time = made(&files[0]).unwrap();
    assert_eq!(place.logits(model, &[]), logits);
    assert_eq!(made(&files[0]).unwrap(), time);
    // The name of the file in the cache is a model, too.
    let path = place.folder.path().join("upg").join(&files[0]);
    assert_eq!(place.logits(path.to_str().unwrap(), &[]), logits);
    // Another encoding is another file, and a changed original as well.
    place.logits(model, &["--encoding", "q4"]);
    assert_eq!(place.compressed().len(), 2);
    let copy = place.folder.path().join("copy");
    copy_model("phi3", "phi3", &copy);
    place.logits(copy.to_str().unwrap(), &[]);
    let generation = copy.join("generation_config.json");
    fs::write(generation, "{\"eos_token_id\": 7}").unwrap();
    place.logits(copy.to_str().unwrap(), &[]);
    assert_eq!(place.compressed().len(), 4);
    assert!(place.mirror.requests().is_empty());
}

#[test]
fn a_gguf_file_runs() {
    let place = Place::new();
    let gguf = gguf_fixtures().join("families/qwen3/model.gguf");
    let inspect = ["inspect", gguf.to_str().unwrap(), "--json"];
    let (code, first, stderr) = output(&mut place.upg(&inspect));
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("compress"), "{stderr}");
    let start = Instant::now();
    assert_eq!(success(&mut place.upg(&inspect)), first);
    assert!(start.elapsed() < WARM, "{:?}", start.elapsed());
}

#[test]
fn compress_takes_a_name() {
    let place = Place::new();
    let out = place.folder.path().join("out.safetensors");
    let compress = [
        "compress",
        "user/tiny",
        "-e",
        "q4",
        "-o",
        out.to_str().unwrap(),
    ];
    success(&mut place.upg(&compress));
    assert!(place.logits(out.to_str().unwrap(), &[]).len() > 100);
    assert!(!place.folder.path().join("upg").exists());
}

#[test]
fn a_split_gguf_file_is_one_model() {
    let place = Place::new();
    let fixtures = gguf_fixtures();
    for number in 1..=4 {
        let name = format!("qwen3-{number:05}-of-00004.gguf");
        let part = fs::read(fixtures.join("split").join(&name)).unwrap();
        place.mirror.add(&format!("user/split/{name}"), part);
    }
    let whole = fixtures.join("families/qwen3/model.gguf");
    let expected = place.logits(whole.to_str().unwrap(), &[]);
    assert_eq!(place.logits("user/split", &[]), expected);
    let last = fixtures.join("split/qwen3-00004-of-00004.gguf");
    assert_eq!(place.logits(last.to_str().unwrap(), &[]), expected);
}

#[test]
fn what_cannot_be_had_is_said_in_a_line() {
    let place = Place::new();
    let missing = place.folder.path().join("none.gguf");
    for (args, code, words) in [
        (
            &["run", "user/none", "-p", "x"][..],
            1,
            &["user/none", "not found"][..],
        ),
        (&["pull", "../x"], 2, &["user/model@revision"]),
        (
            &["pull", "user/tiny", "--offline"],
            1,
            &["user/tiny", "HF_HUB_OFFLINE"],
        ),
        (
            &["chat", "user/tiny", "--offline"],
            1,
            &["user/tiny", "HF_HUB_OFFLINE"],
        ),
        (
            &["inspect", missing.to_str().unwrap()],
            1,
            &["none.gguf", "cannot open"],
        ),
    ] {
        let (found, _, stderr) = output(&mut place.upg(args));
        assert_eq!(found, Some(code), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args:?}: {stderr}");
        }
    }
    *place.mirror.faults() = Faults {
        status: Some(401),
        ..Faults::default()
    };
    let (code, _, stderr) = output(&mut place.upg(&["run", "user/gated", "-p", "x"]));
    assert_eq!(code, Some(1));
    assert!(stderr.contains("HF_TOKEN"), "{stderr}");
    for word in ["model.gguf", "user/tiny"] {
        let (code, _, stderr) = output(&mut place.upg(&[word]));
        assert_eq!(code, Some(2));
        assert!(stderr.contains(&format!("upg run {word}")), "{stderr}");
    }
}

//! Memory of the readers of untrusted files is limited to a small multiple of the input.
//!
//! This is the only test of this program, because the bytes of the process are counted.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[path = "../../upg_kernel/tests/common/counting.rs"]
mod counting;
#[path = "../../upg_kernel/tests/common/data.rs"]
mod data;

use serde_json::json;
use std::fmt::Write;
use std::path::Path;
use std::sync::Mutex;
use upg_compress::sensitivity::json_lines;
use upg_compress::{CompressOptions, compress, source};
use upg_kernel::format::{UpgFile, checksum_of};
use upg_kernel::inference::ModelConfig;
use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::inference::tokenizer::{SpecialIds, Tokenizer};
use upg_kernel::v1::V1File;
use upg_kernel::{Error, ErrorKind};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

const MIB: usize = 1 << 20;

/// Maximum memory of a reader: a multiple of its input, plus MiB.
struct Budget(usize, usize);

const CONTAINER: Budget = Budget(4, 4);
const HF: Budget = Budget(8, 4);
const CONFIG: Budget = Budget(2, 34);
const TOKENIZER: Budget = Budget(16, 4);
/// Budget of tokens alone: short merges take the most per byte.
const VOCABULARY: Budget = Budget(9, 1);
const GGUF: Budget = Budget(8, 4);
/// Budget with merges that a vocabulary implies.
const MERGES: Budget = Budget(8, 64);
const JOURNAL: Budget = Budget(8, 4);
const LINES: Budget = Budget(8, 1);
const PICKLE: Budget = Budget(0, 200);

/// All failures: a run prints the whole list.
static WRONG: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn check(is_right: bool, what: String) {
    if !is_right {
        WRONG.lock().unwrap().push(what);
    }
}

/// Runs `read` on `bytes` of input, prints its peak and checks it.
fn within<T>(what: &str, budget: &Budget, bytes: usize, read: impl FnOnce() -> T) -> T {
    let (found, peak) = counting::peak_of(read);
    let most = budget.0 * bytes + budget.1 * MIB;
    let line = format!("{what}: {peak} bytes for {bytes}, at most {most}");
    println!("{line}");
    check(peak <= most, line);
    found
}

/// Checks for an error of one short line.
fn refused<T>(what: &str, found: Result<T, Error>, kind: ErrorKind, words: &str) {
    let Err(e) = found else {
        return check(false, format!("{what}: not refused"));
    };
    let shown = e.to_string();
    let is_right = e.kind() == kind && shown.contains(words);
    check(is_right, format!("{what}: {e:?}"));
    check(
        !shown.contains('\n') && shown.len() < 1000,
        format!("{what}: {} bytes", shown.len()),
    );
}

/// Joins `n` parts, each written for its number, with commas.
fn list(n: usize, mut part: impl FnMut(&mut String, usize)) -> String {
    let mut text = String::new();
    for i in 0..n {
        if i > 0 {
            text.push(',');
        }
        part(&mut text, i);
    }
    text
}

fn safetensors(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
}

/// Returns a UPG file without tensors with this metadata.
fn upg(metadata: &[(&str, String)]) -> Vec<u8> {
    let mut all = std::collections::BTreeMap::new();
    for key in ["model", "compression_ratio", "bits_per_weight", "recipe"] {
        all.insert(key, "x".to_owned());
    }
    let fixed = [
        ("format", "upg"),
        ("version", "2.1"),
        ("num_layers", "0"),
        ("layers", "[]"),
        ("checksums", "{}"),
    ];
    all.extend(fixed.map(|(key, value)| (key, value.to_owned())));
    all.extend(metadata.iter().cloned());
    let mut table = String::new();
    for (key, value) in &all {
        write!(table, "{key}\n{}\n{value}\n", value.len()).unwrap();
    }
    all.insert("checksum", checksum_of(table.as_bytes()));
    safetensors(&json!({ "__metadata__": all }).to_string())
}

/// Returns 4 MB of the shortest possible tensors.
fn tiny_tensors() -> String {
    let tensors = list(70_000, |text, i| {
        write!(
            text,
            r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#
        )
        .unwrap();
    });
    format!("{{{tensors}}}")
}

fn headers(folder: &Path) {
    let path = folder.join("header.safetensors");
    let keys = list(300_000, |text, i| write!(text, r#""{i:x}":"""#).unwrap());
    let few_keys = list(65_000, |text, i| write!(text, r#""{i:x}":"""#).unwrap());
    let metadata = |text: &str| format!(r#"{{"__metadata__":{{{text}}}}}"#);
    let shape = format!(
        r#"{{"t":{{"dtype":"U8","shape":[{}0],"data_offsets":[0,0]}}}}"#,
        "0,".repeat(2_000_000)
    );
    let name = format!(r#"{{"{}":{{}}}}"#, "n".repeat(4_000_000));
    let dtype = format!(r#"{{"t":{{"dtype":"{}"}}}}"#, "d".repeat(4_000_000));
    use ErrorKind::{Malformed, TooLarge};
    let no_upg = "not a UPG file";
    for (what, header, kind, words) in [
        ("header of tensors", tiny_tensors(), Malformed, no_upg),
        (
            "header of metadata keys",
            metadata(&keys),
            TooLarge,
            "metadata keys",
        ),
        (
            "header of allowed metadata keys",
            metadata(&few_keys),
            Malformed,
            no_upg,
        ),
        (
            "header of escapes",
            metadata(&format!(r#""x":"{}""#, "\\u0041".repeat(700_000))),
            Malformed,
            no_upg,
        ),
        (
            "header of a text",
            metadata(&format!(r#""x":"{}""#, "x".repeat(4_000_000))),
            Malformed,
            no_upg,
        ),
        ("header of a shape", shape, TooLarge, "dimensions"),
        (
            "header of a name",
            name,
            TooLarge,
            "a name of 4000000 bytes",
        ),
        ("header of a dtype", dtype, Malformed, "dtype"),
        (
            "header of lists",
            "[".repeat(4_000_000),
            Malformed,
            "expected an object",
        ),
        (
            "header of objects",
            r#"{"a":"#.repeat(800_000),
            Malformed,
            "safetensors",
        ),
    ] {
        std::fs::write(&path, safetensors(&header)).unwrap();
        let found = within(what, &CONTAINER, header.len(), || UpgFile::open(&path));
        refused(what, found, kind, words);
        std::fs::remove_file(&path).unwrap();
    }
    // The metadata of a valid file contain JSON again.
    let layer = r#"{"name":"l","rows":1,"cols":1,"encoding":"q8","group":64}"#;
    let layers = |n| {
        format!(
            "[{}]",
            list(n, |text, i| *text +=
                &layer.replace("\"l\"", &format!("\"l{i}\"")))
        )
    };
    for (n, kind, words) in [
        (60_000, ErrorKind::Missing, "layer_0_values"),
        (110_000, ErrorKind::Invalid, "more than 100000 layers"),
    ] {
        let file = upg(&[("layers", layers(n)), ("num_layers", n.to_string())]);
        std::fs::write(&path, &file).unwrap();
        let found = within("layers", &CONTAINER, file.len(), || UpgFile::open(&path));
        refused("layers", found, kind, words);
        std::fs::remove_file(&path).unwrap();
    }
    let sums = list(400_000, |text, i| write!(text, r#""{i:x}":"""#).unwrap());
    let file = upg(&[("checksums", format!("{{{sums}}}"))]);
    std::fs::write(&path, &file).unwrap();
    within("checksums", &CONTAINER, file.len(), || {
        UpgFile::open(&path).unwrap().verify(&|_| ()).unwrap();
    });
}

fn directories(folder: &Path) {
    let dir = folder.join("hf");
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
    let fresh = || {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        write("config.json", "{}");
    };
    let open = || source::open(&dir);
    let zeros = format!("[{}0]", "0,".repeat(2_000_000));

    fresh();
    let header = tiny_tensors().replace("U8", "F32");
    std::fs::write(dir.join("model.safetensors"), safetensors(&header)).unwrap();
    let found = within("weights", &HF, header.len(), open);
    refused("weights", found, ErrorKind::Shape, "no weights");

    fresh();
    let map = list(150_000, |text, i| {
        write!(text, r#""t{i:x}":"{:x}.safetensors""#, i % 5).unwrap()
    });
    let index = format!(r#"{{"metadata":{zeros},"weight_map":{{{map}}}}}"#);
    write("model.safetensors.index.json", &index);
    let found = within("index", &HF, index.len(), open);
    refused("index", found, ErrorKind::Missing, "0.safetensors");

    fresh();
    write("config.json", &format!(r#"{{"x":{zeros}}}"#));
    let found = within("config.json", &CONFIG, zeros.len(), open);
    refused("config.json", found, ErrorKind::TooLarge, "values");

    fresh();
    write(
        "tokenizer_config.json",
        &format!(r#"{{"x":{zeros},"chat_template":{zeros}}}"#),
    );
    let found = within("tokenizer_config.json", &CONFIG, 2 * zeros.len(), || {
        ModelFiles::read(&dir)
    });
    refused(
        "tokenizer_config.json",
        found,
        ErrorKind::TooLarge,
        "values",
    );

    let generation = format!(r#"{{"eos_token_id":{zeros}}}"#);
    let found = within("generation_config.json", &CONFIG, generation.len(), || {
        ModelConfig::from_json("{}", Some(&generation))
    });
    refused(
        "generation_config.json",
        found,
        ErrorKind::TooLarge,
        "values",
    );
}

/// Returns the text of a tokenizer with these lists.
fn tokenizer(vocab: &str, merges: &str, added: &str, normalizer: &str) -> String {
    format!(
        r#"{{"version":"1.0","added_tokens":[{added}],"normalizer":{normalizer},"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{{"type":"BPE","vocab":{{{vocab}}},"merges":[{merges}]}}}}"#
    )
}

fn tokenizers() {
    let vocab = |n| list(n, |text, i| write!(text, r#""{i:x}":{i}"#).unwrap());
    let merges = |n| list(n, |text, _| *text += r#""1 2""#);
    let pairs = |n| list(n, |text, _| *text += r#"["1","2"]"#);
    let added = |n| {
        list(n, |text, i| {
            write!(text, r#"{{"id":{i},"content":"{i:x}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#).unwrap();
        })
    };
    let deep = format!("{}{}", "[".repeat(2_000_000), "]".repeat(2_000_000));
    let wide = format!("[{}0]", "0,".repeat(1_000_000));
    let none = "null";
    let good = [
        (
            "tokens",
            VOCABULARY,
            vocab(200_000),
            String::new(),
            String::new(),
        ),
        (
            "merges",
            TOKENIZER,
            vocab(300),
            merges(400_000),
            String::new(),
        ),
        (
            "pairs",
            TOKENIZER,
            vocab(300),
            pairs(300_000),
            String::new(),
        ),
        (
            "added tokens",
            VOCABULARY,
            vocab(20_000),
            String::new(),
            added(20_000),
        ),
    ];
    for (what, budget, vocab, merges, added) in good {
        let text = tokenizer(&vocab, &merges, &added, none);
        within(what, &budget, text.len(), || {
            Tokenizer::from_json(text.as_bytes(), None, SpecialIds::default()).unwrap();
        });
    }
    use ErrorKind::{Malformed, TooLarge};
    let bad = [
        (
            "too many tokens",
            tokenizer(&vocab(600_000), "", "", none),
            TooLarge,
            "600000 tokens, at most 524288",
        ),
        (
            "too many merges",
            tokenizer("", &merges(1_100_000), "", none),
            TooLarge,
            "1100000 merges, at most 1048576",
        ),
        (
            "too many added tokens",
            tokenizer("", "", &added(140_000), none),
            TooLarge,
            "140000 added tokens",
        ),
        ("deep", tokenizer("", "", "", &deep), Malformed, "recursion"),
        (
            "wide",
            tokenizer("", "", "", &wide),
            TooLarge,
            "more than 16384 values",
        ),
        (
            "wide vocabulary",
            tokenizer(&format!(r#""a":{wide}"#), "", "", none),
            Malformed,
            "invalid type",
        ),
        (
            "unknown",
            tokenizer("", "", "", none).replacen('{', &format!(r#"{{"x":{wide},"#), 1),
            Malformed,
            "no vocab",
        ),
    ];
    for (what, text, kind, words) in bad {
        let text = match what {
            "unknown" => text.replace(r#""vocab":{},"#, ""),
            _ => text,
        };
        let read = || Tokenizer::from_json(text.as_bytes(), None, SpecialIds::default());
        let found = within(what, &TOKENIZER, text.len(), read);
        refused(what, found, kind, words);
    }
}

/// GGUF file under construction.
#[derive(Default)]
struct Gguf {
    keys: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
}

impl Gguf {
    fn text(bytes: &mut Vec<u8>, text: &[u8]) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text);
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        Self::text(&mut self.keys.1, key.as_bytes());
        self.keys.1.extend(kind.to_le_bytes());
        self.keys.1.extend(value);
        self.keys.0 += 1;
    }

    fn texts(&mut self, key: &str, texts: &[String]) {
        let mut value = [
            8u32.to_le_bytes().as_slice(),
            &(texts.len() as u64).to_le_bytes(),
        ]
        .concat();
        texts
            .iter()
            .for_each(|text| Self::text(&mut value, text.as_bytes()));
        self.key(key, 9, &value);
    }

    fn tensor(&mut self, name: &str, dims: &[u64]) {
        let to = &mut self.tensors.1;
        Self::text(to, name.as_bytes());
        to.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| to.extend(d.to_le_bytes()));
        to.extend([0; 12]);
        self.tensors.0 += 1;
    }

    fn bytes(&self, data: usize) -> Vec<u8> {
        let mut file = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
        file.extend(self.tensors.0.to_le_bytes());
        file.extend(self.keys.0.to_le_bytes());
        file.extend(&self.keys.1);
        file.extend(&self.tensors.1);
        file.resize(file.len().next_multiple_of(32) + data, 0);
        file
    }

    /// Returns a llama with a sentencepiece vocabulary.
    fn llama(tokens: &[String]) -> Vec<u8> {
        let mut file = Self::default();
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        file.key("general.architecture", 8, &text("llama"));
        file.key("tokenizer.ggml.model", 8, &text("llama"));
        for key in [
            "context_length",
            "embedding_length",
            "block_count",
            "feed_forward_length",
            "attention.head_count",
        ] {
            let n: u32 = if key == "embedding_length" { 8 } else { 1 };
            file.key(&format!("llama.{key}"), 4, &n.to_le_bytes());
        }
        file.key(
            "llama.attention.layer_norm_rms_epsilon",
            6,
            &1e-5f32.to_le_bytes(),
        );
        file.texts("tokenizer.ggml.tokens", tokens);
        let n = (tokens.len() as u64).to_le_bytes();
        let floats = vec![0; 4 * tokens.len()];
        file.key(
            "tokenizer.ggml.scores",
            9,
            &[6u32.to_le_bytes().as_slice(), &n, &floats].concat(),
        );
        file.tensor("token_embd.weight", &[8, tokens.len() as u64]);
        file.tensor("output_norm.weight", &[8]);
        for (name, dims) in [
            ("attn_norm", &[8u64][..]),
            ("ffn_norm", &[8]),
            ("attn_q", &[8, 8]),
            ("attn_k", &[8, 8]),
            ("attn_v", &[8, 8]),
            ("attn_output", &[8, 8]),
            ("ffn_gate", &[8, 1]),
            ("ffn_up", &[8, 1]),
            ("ffn_down", &[1, 8]),
        ] {
            file.tensor(&format!("blk.0.{name}.weight"), dims);
        }
        file.bytes(32 * tokens.len())
    }
}

fn ggufs(folder: &Path) {
    let path = folder.join("model.gguf");
    let open = |what: &str, budget: &Budget, file: &[u8]| {
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, file).unwrap();
        within(what, budget, file.len(), || source::open(&path))
    };
    let numbered = |n: usize| (0..n).map(|i| format!("{i:x}")).collect::<Vec<_>>();
    let source = open("GGUF vocabulary", &GGUF, &Gguf::llama(&numbered(50_000))).unwrap();
    within(
        "tokenizer of a GGUF",
        &TOKENIZER,
        source.files().tokenizer_json.as_ref().unwrap().len(),
        || {
            source.files().check().unwrap();
        },
    );
    drop(source);

    let mut file = Gguf::default();
    file.texts("tokenizer.ggml.tokens", &vec![String::new(); 600_000]);
    refused(
        "GGUF texts",
        open("GGUF texts", &GGUF, &file.bytes(0)),
        ErrorKind::Missing,
        "general.architecture",
    );
    let mut file = Gguf::default();
    (0..60_000).for_each(|i| file.tensor(&format!("{i:x}"), &[1]));
    let found = open("GGUF tensors", &GGUF, &file.bytes(32));
    refused(
        "GGUF tensors",
        found,
        ErrorKind::Missing,
        "general.architecture",
    );
    let mut file = Gguf::default();
    (0..60_000).for_each(|i| file.key(&format!("{i:x}"), 0, &[0]));
    let found = open("GGUF keys", &GGUF, &file.bytes(32));
    refused(
        "GGUF keys",
        found,
        ErrorKind::Missing,
        "general.architecture",
    );

    let chain = |n: usize| {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
        tokens.extend((1..n).map(|n| "a".repeat(n)));
        tokens
    };
    let found = open("chain of merges", &MERGES, &Gguf::llama(&chain(2000)));
    refused(
        "chain of merges",
        found,
        ErrorKind::TooLarge,
        "implies more than",
    );
    let most = open("most merges", &MERGES, &Gguf::llama(&chain(450))).unwrap();
    assert!(most.files().tokenizer_json.as_ref().unwrap().len() > 25 * MIB);
}

fn others(folder: &Path) {
    // Valid lines of another run.
    let out = folder.join("out.safetensors");
    let mut journal = "upg journal 2\n".to_owned();
    let mut chain = String::new();
    for _ in 0..60_000 {
        chain = checksum_of(format!("{chain}0").as_bytes());
        journal += &format!("{chain} 0\n");
    }
    std::fs::write(folder.join("out.safetensors.partial.journal"), &journal).unwrap();
    let source = source::open(data::data("tiny-models/qwen2")).unwrap();
    let mut options = CompressOptions::new("keep".parse().unwrap());
    options.resume = true;
    let found = within("journal", &JOURNAL, journal.len(), || {
        compress(source.as_ref(), &out, &options, &())
    });
    refused("journal", found, ErrorKind::Malformed, "journal");

    let lines = "{\"text\":\"a\"}\n".repeat(100_000)
        + &format!(r#"{{"x":[{}0],"text":"a"}}"#, "0,".repeat(1_000_000));
    assert_eq!(
        within("lines", &LINES, lines.len(), || json_lines(&lines))
            .unwrap()
            .len(),
        100_001
    );

    let path = folder.join("old.upg");
    let pickle = [b"\x80\x04".as_slice(), &b"}\x94".repeat(600_000), b"."].concat();
    std::fs::write(&path, &pickle).unwrap();
    let found = within("pickle", &PICKLE, pickle.len(), || V1File::open(&path, &[]));
    refused("pickle", found, ErrorKind::TooLarge, "objects");
}

#[test]
fn every_reader_stays_within_its_budget() {
    let folder = tempfile::tempdir().unwrap();
    headers(folder.path());
    directories(folder.path());
    tokenizers();
    ggufs(folder.path());
    others(folder.path());
    let wrong = WRONG.lock().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

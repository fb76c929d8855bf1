//! Valid and invalid Hugging Face directories, and inputs that are not a source.

use super::hf::HfSource;
use super::{FloatType, Source, SourceDtype, open, sort_key};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use upg_kernel::ErrorKind;

/// Returns a file under `tests/data`.
pub(super) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data")
        .join(name)
}

/// Values that BF16 and F16 represent exactly.
const VALUES: [f32; 6] = [0.0, -1.5, 2.0, 0.0078125, -3.0, 96.0];

fn encoded(dtype: Dtype) -> Vec<u8> {
    let each = |x: &f32| -> Vec<u8> {
        match dtype {
            Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::F32 => x.to_le_bytes().to_vec(),
            _ => vec![0; dtype.bitsize() / 8],
        }
    };
    VALUES.iter().flat_map(each).collect()
}

/// Returns a safetensors file of `[3, 2]` tensors.
fn shard(tensors: &[(&str, Dtype)]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, d)| encoded(*d)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, dtype), bytes)| (*name, TensorView::new(*dtype, vec![3, 2], bytes).unwrap()));
    serialize(views, None).unwrap()
}

const NORM: &str = "model.norm.weight";
const EMBEDDINGS: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Name and content of a file.
type File<'a> = (&'a str, &'a [u8]);

/// Creates a directory with these files.
fn directory(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn index(map: &[(&str, &str)]) -> Vec<u8> {
    let map: HashMap<_, _> = map.iter().copied().collect();
    serde_json::to_vec(&serde_json::json!({"metadata": {}, "weight_map": map})).unwrap()
}

#[test]
fn one_file_of_every_dtype() {
    let weights = shard(&[
        ("model.layers.10.b", Dtype::F32),
        ("model.layers.2.c", Dtype::F16),
        (HEAD, Dtype::BF16),
        (NORM, Dtype::F32),
        (EMBEDDINGS, Dtype::BF16),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::I64),
    ]);
    let dir = directory(&[
        ("config.json", b"{\"a\":1}"),
        ("model.safetensors", &weights),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{\"chat_template\":\"T\"}"),
        ("special_tokens_map.json", b"{}"),
    ]);
    let source = open(dir.path()).unwrap();
    let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
    let order = [
        EMBEDDINGS,
        "model.layers.2.c",
        "model.layers.10.b",
        NORM,
        HEAD,
    ];
    assert_eq!(names, order);
    let dtypes: Vec<String> = source
        .tensors()
        .iter()
        .map(|t| t.dtype.to_string())
        .collect();
    assert_eq!(dtypes, ["BF16", "F16", "F32", "F32", "BF16"]);
    for (i, tensor) in source.tensors().iter().enumerate() {
        assert_eq!(tensor.shape, [3, 2]);
        assert_eq!(source.read_f32(i).unwrap(), VALUES);
        assert_eq!(source.read_rows_f32(i, 1..2).unwrap(), VALUES[2..4]);
        let raw = source.read_raw(i).unwrap();
        assert_eq!(SourceDtype::Float(raw.dtype), tensor.dtype);
        let mut values = [0f32; 6];
        raw.dtype.to_f32(&raw.bytes, &mut values).unwrap();
        assert_eq!(values, VALUES);
    }
    assert_eq!(source.total_weights(), 30);
    assert_eq!(
        source.skipped()[0].reason,
        "a rotary table, computed from the config"
    );
    let files = source.files();
    assert_eq!(files.config_json.as_deref(), Some("{\"a\":1}"));
    assert_eq!(files.tokenizer_json.as_deref(), Some(b"{}".as_slice()));
    assert_eq!(files.chat_template.as_deref(), Some("T"));
    assert_eq!(files.special_tokens_map_json.as_deref(), Some("{}"));
    assert_eq!(files.generation_config_json, None);
}

#[test]
fn shards_are_one_model() {
    let map = [(NORM, "b.safetensors"), (EMBEDDINGS, "a.safetensors")];
    let dir = directory(&[
        ("config.json", b"{}"),
        ("model.safetensors.index.json", &index(&map)),
        ("a.safetensors", &shard(&[(EMBEDDINGS, Dtype::F16)])),
        (
            "b.safetensors",
            &shard(&[(NORM, Dtype::BF16), ("other", Dtype::I8)]),
        ),
    ]);
    let source = open(dir.path()).unwrap();
    let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, [EMBEDDINGS, NORM]);
    assert_eq!(source.read_f32(1).unwrap(), VALUES);
    assert_eq!(source.skipped()[0].name, "other");
}

#[test]
fn templates_have_an_order() {
    let weights = shard(&[(NORM, Dtype::F32)]);
    let named =
        br#"{"chat_template":[{"name":"rag","template":"R"},{"name":"default","template":"D"}]}"#;
    let base: [(&str, &[u8]); 3] = [
        ("config.json", b"{}"),
        ("model.safetensors", &weights),
        ("tokenizer_config.json", named),
    ];
    let template = |dir: &Path| open(dir).unwrap().files().chat_template.clone();
    let dir = directory(&base);
    assert_eq!(template(dir.path()).as_deref(), Some("D"));
    fs::write(dir.path().join("chat_template.jinja"), "J").unwrap();
    assert_eq!(template(dir.path()).as_deref(), Some("J"));
}

#[test]
fn a_tied_head_is_stored_once() {
    let both = [(EMBEDDINGS, Dtype::F16), (HEAD, Dtype::F16)];
    let dir = directory(&[
        ("config.json", b"{\"tie_word_embeddings\":true}"),
        ("model.safetensors", &shard(&both)),
    ]);
    let source = open(dir.path()).unwrap();
    assert_eq!((source.tensors().len(), source.skipped().len()), (1, 1));

    let other = directory(&[
        ("config.json", b"{\"tie_word_embeddings\":true}"),
        (
            "model.safetensors",
            &shard(&[(EMBEDDINGS, Dtype::F16), (HEAD, Dtype::F32)]),
        ),
    ]);
    let error = open(other.path()).err().unwrap();
    assert_eq!(
        (error.kind(), error.tensor_name()),
        (ErrorKind::Invalid, Some(HEAD))
    );

    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_eq!(open(dir.path()).unwrap().tensors().len(), 2);
}

#[test]
fn bad_directories_say_what_is_wrong() {
    use ErrorKind::{Malformed, Missing, Shape, Unsupported};
    let good = shard(&[(NORM, Dtype::F32)]);
    let config: (&str, &[u8]) = ("config.json", b"{}");
    let empty = serialize(
        [("x", TensorView::new(Dtype::F32, vec![0, 2], &[]).unwrap())],
        None,
    )
    .unwrap();
    let weights = |bytes| [config, ("model.safetensors", bytes)].to_vec();
    let indexed = |map: &[(&str, &str)]| index(map);
    let a = indexed(&[(NORM, "a.safetensors")]);
    let up = indexed(&[(NORM, "../a.safetensors")]);
    let root = indexed(&[(NORM, "/etc/a.safetensors")]);
    let back = indexed(&[(NORM, "..\\a.safetensors")]);
    let passwd = indexed(&[(NORM, "passwd")]);
    let other = indexed(&[(EMBEDDINGS, "a.safetensors")]);
    let fp8 = shard(&[(NORM, Dtype::F8_E4M3)]);
    let long = [good.as_slice(), &[0]].concat();
    let with_index = |bytes| [config, ("model.safetensors.index.json", bytes)].to_vec();
    let with_shard = |bytes| [with_index(bytes), vec![("a.safetensors", good.as_slice())]].concat();
    type Files<'a> = Vec<(&'a str, &'a [u8])>;
    let table: Vec<(&str, Files<'_>, ErrorKind, &str)> = vec![
        ("nothing", vec![], Missing, "no config.json"),
        ("gguf inside", vec![("m.gguf", b"GGUF")], Missing, "m.gguf"),
        (
            "bad config",
            vec![("config.json", b"{"), ("model.safetensors", &good)],
            Malformed,
            "not JSON",
        ),
        (
            "config list",
            vec![("config.json", b"[]"), ("model.safetensors", &good)],
            Malformed,
            "object",
        ),
        (
            "config bytes",
            vec![("config.json", b"\xff")],
            Malformed,
            "UTF-8",
        ),
        (
            "quantized",
            vec![(
                "config.json",
                br#"{"quantization_config":{"quant_method":"gptq"}}"#,
            )],
            Unsupported,
            "gptq",
        ),
        (
            "no weights",
            vec![config],
            Missing,
            "neither model.safetensors nor",
        ),
        (
            "pickled",
            vec![config, ("pytorch_model.bin", b"PK")],
            Unsupported,
            "pytorch_model.bin",
        ),
        (
            "adapter",
            vec![config, ("adapter_model.safetensors", b"x")],
            Missing,
            "adapter",
        ),
        (
            "other name",
            vec![config, ("weights.safetensors", b"x")],
            Missing,
            "weights.safetensors",
        ),
        (
            "pointer",
            weights(b"version https://git-lfs"),
            Malformed,
            "git-lfs",
        ),
        ("too long", weights(&long), Malformed, "safetensors"),
        (
            "fp8",
            weights(&fp8),
            Unsupported,
            "tensor 'model.norm.weight': dtype F8_E4M3",
        ),
        ("empty tensor", weights(&empty), Shape, "[0, 2]"),
        ("no map", with_index(b"{}"), Malformed, "weight_map"),
        ("shard gone", with_index(&a), Missing, "a.safetensors"),
        ("parent", with_shard(&up), Malformed, "not a plain"),
        ("root", with_shard(&root), Malformed, "not a plain"),
        ("backslash", with_shard(&back), Malformed, "not a plain"),
        ("any file", with_shard(&passwd), Malformed, "not a plain"),
        (
            "not in shard",
            with_shard(&other),
            Missing,
            "tensor 'model.embed_tokens.weight'",
        ),
        (
            "bad template",
            vec![
                config,
                ("model.safetensors", &good),
                ("tokenizer_config.json", b"{"),
            ],
            Malformed,
            "tokenizer_config.json",
        ),
    ];
    for (what, files, kind, message) in table {
        let dir = directory(&files);
        let error = open(dir.path()).err().unwrap();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        let error = error.to_string();
        assert!(
            error.contains(message) && !error.contains('\n'),
            "{what}: {error}"
        );
    }
}

#[test]
fn stand_ins_for_files_are_named() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    let good = shard(&[(NORM, Dtype::F32)]);
    let index = index(&[(NORM, "a.safetensors")]);
    let config: (&str, &[u8]) = ("config.json", b"{}");
    let weights: (&str, &[u8]) = ("model.safetensors", &good);
    let table: [(&[File<'_>], &str, &str); 6] = [
        (
            &[config, ("model.safetensors", pointer)],
            "model.safetensors: ",
            "git lfs pull",
        ),
        (
            &[config, weights, ("tokenizer.json", pointer)],
            "tokenizer.json: ",
            "git lfs pull",
        ),
        (
            &[("config.json", pointer), weights],
            "config.json: ",
            "git lfs pull",
        ),
        (
            &[
                config,
                ("model.safetensors.index.json", &index),
                ("a.safetensors", pointer),
            ],
            "a.safetensors: ",
            "git lfs pull",
        ),
        (
            &[config, ("model.safetensors", b"../../b/00")],
            "model.safetensors: ",
            "'../../b/00'",
        ),
        (
            &[config, weights, ("tokenizer.json", b"../t")],
            "tokenizer.json: ",
            "'../t'",
        ),
    ];
    for (files, file, cause) in table {
        let dir = directory(files);
        let error = open(dir.path()).err().unwrap().to_string();
        assert!(error.contains(file) && error.contains(cause), "{error}");
    }
    let dir = directory(&[("m.gguf", pointer)]);
    let error = open(dir.path().join("m.gguf")).err().unwrap().to_string();
    assert!(
        error.contains("m.gguf: this is a git-lfs pointer"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn links_to_nothing_are_named() {
    let good = shard(&[(NORM, Dtype::F32)]);
    let index = index(&[(NORM, "a.safetensors")]);
    let config: (&str, &[u8]) = ("config.json", b"{}");
    let weights: (&str, &[u8]) = ("model.safetensors", &good);
    let table: [(&[File<'_>], &str); 5] = [
        (&[config], "model.safetensors"),
        (&[config], "model.safetensors.index.json"),
        (
            &[config, ("model.safetensors.index.json", &index)],
            "a.safetensors",
        ),
        (&[config, weights], "tokenizer.json"),
        (&[weights], "config.json"),
    ];
    for (files, link) in table {
        let dir = directory(files);
        std::os::unix::fs::symlink("../blobs/00", dir.path().join(link)).unwrap();
        let error = open(dir.path()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Missing);
        let error = error.to_string();
        let expected = format!("{link}: this link points to ../blobs/00, which is missing");
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn the_gguf_file_to_pass_is_named() {
    let hint = |names: &[&str]| {
        let mut files: Vec<(&str, &[u8])> = vec![("config.json", b"{}")];
        files.extend(names.iter().map(|name| (*name, b"GGUF".as_slice())));
        open(directory(&files).path()).err().unwrap().to_string()
    };
    let one = hint(&["m.gguf", "mmproj-m.gguf"]);
    assert!(
        one.contains("pass the GGUF file itself: ") && one.contains("/m.gguf"),
        "{one}"
    );
    assert!(!one.contains("mmproj"), "{one}");
    let several = hint(&["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.GGUF"]);
    assert!(
        several.contains("pass one of the GGUF files: "),
        "{several}"
    );
    assert!(!several.contains("a-00002"), "{several}");
}

#[test]
fn a_tied_head_may_be_missing_from_its_shard() {
    let map = [(EMBEDDINGS, "a.safetensors"), (HEAD, "a.safetensors")];
    let files = |config| {
        directory(&[
            ("config.json", config),
            ("model.safetensors.index.json", &index(&map)),
            ("a.safetensors", &shard(&[(EMBEDDINGS, Dtype::F16)])),
        ])
    };
    let dir = files(br#"{"tie_word_embeddings":true}"#);
    let source = open(dir.path()).unwrap();
    assert_eq!(source.tensors().len(), 1);
    assert_eq!(source.skipped()[0].name, HEAD);
    let error = open(files(b"{}").path()).err().unwrap();
    assert_eq!(error.tensor_name(), Some(HEAD));
    // A shard of its own is not needed either.
    let apart = index(&[(EMBEDDINGS, "a.safetensors"), (HEAD, "b.safetensors")]);
    fs::write(dir.path().join("model.safetensors.index.json"), apart).unwrap();
    let source = open(dir.path()).unwrap();
    assert_eq!((source.tensors().len(), source.skipped().len()), (1, 1));
}

#[test]
fn wrapped_and_multimodal_models_are_their_text_models() {
    let weights = shard(&[
        ("language_model.model.embed_tokens.weight", Dtype::F16),
        ("language_model.model.norm.weight", Dtype::F32),
        ("language_model.lm_head.weight", Dtype::BF16),
        ("vision_tower.patch.weight", Dtype::F32),
        ("vision_tower.position_ids", Dtype::I64),
    ]);
    let config = br#"{"model_type":"llava","text_config":{"model_type":"llama"}}"#;
    let dir = directory(&[("config.json", config), ("model.safetensors", &weights)]);
    let source = open(dir.path()).unwrap();
    let names: Vec<&str> = source.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, [EMBEDDINGS, NORM, HEAD]);
    assert_eq!(source.read_f32(1).unwrap(), VALUES);
    let config = source.files().config_json.as_ref().unwrap();
    let config: serde_json::Value = serde_json::from_str(config).unwrap();
    assert_eq!(config, serde_json::json!({"model_type": "llama"}));
    let skipped: Vec<&str> = source.skipped().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(
        skipped,
        ["vision_tower.position_ids", "vision_tower.patch.weight"]
    );
}

#[test]
fn every_truncation_of_a_shard_is_an_error() {
    let good = shard(&[(NORM, Dtype::F32), (EMBEDDINGS, Dtype::BF16)]);
    let dir = directory(&[("config.json", b"{}")]);
    let path = dir.path().join("model.safetensors");
    for len in 0..good.len() {
        let _ = fs::remove_file(&path);
        fs::write(&path, &good[..len]).unwrap();
        let kind = HfSource::open(dir.path()).unwrap_err().kind();
        assert_eq!(kind, ErrorKind::Malformed, "{len}");
    }
}

#[test]
fn other_files_are_named() {
    let upg = {
        let metadata = HashMap::from([("format".to_owned(), "upg".to_owned())]);
        let bytes = encoded(Dtype::F32);
        let view = TensorView::new(Dtype::F32, vec![6], &bytes).unwrap();
        serialize([("x", view)], Some(metadata)).unwrap()
    };
    let plain = shard(&[(NORM, Dtype::F32)]);
    let table: Vec<(&[u8], &str)> = vec![
        (b"", "an empty file"),
        (
            b"\x80\x04K\x01.",
            "the file is the number 1, expected a dict",
        ),
        (b"\x80\x02\x8A\nl\xFC\x9CF\xF9 j\xA8P\x19.", "PyTorch"),
        (b"PK\x03\x04", "PyTorch"),
        (b"FUGG\0\0\0\0", "big-endian GGUF"),
        (b"tjgg\x03\0\0\0", "before GGUF"),
        (&upg, "a UPG file"),
        (&plain, "a single safetensors file"),
        (b"{\"model_type\":\"llama\"}", "a JSON file"),
        (b"hello", "unknown kind"),
    ];
    for (bytes, message) in table {
        let dir = directory(&[("file", bytes)]);
        let error = open(dir.path().join("file")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(message), "{error}");
    }
    #[cfg(unix)]
    assert_eq!(open("/dev/null").err().unwrap().kind(), ErrorKind::Io);
    let none = directory(&[]);
    assert_eq!(
        open(none.path().join("x")).err().unwrap().kind(),
        ErrorKind::Io
    );
}

#[test]
fn names_sort_by_layer_number() {
    let mut names = [
        HEAD,
        "model.layers.10.a",
        NORM,
        "model.layers.9.z",
        EMBEDDINGS,
    ];
    names.sort_by_key(|name| sort_key(name));
    let expected = [
        EMBEDDINGS,
        "model.layers.9.z",
        "model.layers.10.a",
        NORM,
        HEAD,
    ];
    assert_eq!(names, expected);
}

#[test]
fn float_types_refuse_other_lengths() {
    let mut out = [0f32; 2];
    for dtype in [FloatType::Bf16, FloatType::F16, FloatType::F32] {
        assert!(dtype.to_f32(&vec![0; 2 * dtype.size()], &mut out).is_ok());
        assert!(
            dtype
                .to_f32(&vec![0; 2 * dtype.size() - 1], &mut out)
                .is_err()
        );
    }
}

#[test]
fn random_damage_never_panics() {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let good = fs::read(data("families/qwen3/model.safetensors")).unwrap();
    let dir = directory(&[("config.json", b"{}")]);
    let path = dir.path().join("model.safetensors");
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut refused = 0;
    for _ in 0..500 {
        let mut bad = good.clone();
        let at = (random.next_u64() % 3000) as usize;
        bad[at] = random.next_u64() as u8;
        let _ = fs::remove_file(&path);
        fs::write(&path, &bad).unwrap();
        match HfSource::open(dir.path()) {
            Err(_) => refused += 1,
            Ok(source) => {
                for index in 0..source.tensors().len() {
                    source.read_f32(index).unwrap();
                }
            }
        }
    }
    assert!(
        refused > 100,
        "{refused} of 500 refused: is the damage applied?"
    );
}

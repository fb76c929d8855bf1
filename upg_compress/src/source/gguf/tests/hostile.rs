//! Damaged and malicious GGUF files: an error that says what is wrong, or a good read; never a
//! panic, never more memory than the file accounts for.

use super::super::{GgufSource, Source};
use super::{FAMILIES, data};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::path::Path;
use upg_kernel::{ErrorKind, Result};

/// Writes `bytes` and reads everything that can be read of them.
fn read_all(path: &Path, bytes: &[u8]) -> Result<()> {
    // Not in place: a mapped file must not change.
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
    let source = GgufSource::open(path)?;
    for index in 0..source.tensors().len() {
        source.read_f32(index)?;
        source.read_raw(index)?;
    }
    Ok(())
}

#[test]
fn every_truncation_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let good = std::fs::read(data("families/qwen2/model.gguf")).unwrap();
    read_all(&path, &good).unwrap();
    // The last tensor ends up to one alignment before the file does.
    for len in (0..good.len() - 32).step_by(5) {
        let error = read_all(&path, &good[..len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{len}: {error}");
    }
}

#[test]
fn random_damage_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for family in FAMILIES {
        let good = std::fs::read(data(&format!("families/{family}/model.gguf"))).unwrap();
        // Where the tensor data starts does not matter: most flips go where decisions are made.
        let header = good.len().min(5000) as u64;
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..=random.next_u64() % 3 {
                let at = (random.next_u64() % header) as usize;
                bad[at] = random.next_u64() as u8;
            }
            refused += usize::from(read_all(&path, &bad).is_err());
        }
    }
    assert!(
        refused > 100,
        "{refused} of 2100 refused: is the damage applied?"
    );
}

/// A GGUF file piece by piece.
struct File(Vec<u8>);

impl File {
    fn new(tensors: u64, keys: u64) -> Self {
        Self([b"GGUF".as_slice(), &3u32.to_le_bytes()].concat())
            .u64(tensors)
            .u64(keys)
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn u32(self, n: u32) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    fn u64(self, n: u64) -> Self {
        self.bytes(&n.to_le_bytes())
    }

    fn text(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn key(self, key: &str, kind: u32) -> Self {
        self.text(key).u32(kind)
    }

    /// A key with a u32.
    fn number(self, key: &str, n: u32) -> Self {
        self.key(key, 4).u32(n)
    }

    fn tensor(self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        let mut file = self.text(name).u32(dims.len() as u32);
        for &dim in dims {
            file = file.u64(dim);
        }
        file.u32(kind).u64(offset)
    }
}

const STRING: u32 = 8;
const ARRAY: u32 = 9;

#[test]
fn absurd_headers_are_refused() {
    let architecture = |name: &str| {
        File::new(0, 1)
            .key("general.architecture", STRING)
            .text(name)
    };
    let tensor = |dims: &[u64], kind, offset| {
        File::new(1, 0)
            .tensor("blk.0.x", dims, kind, offset)
            .bytes(&[0; 256])
    };
    let nested = (0..9).fold(File::new(0, 1).key("k", ARRAY), |f, _| f.u32(ARRAY).u64(1));
    let huge = u64::MAX;
    use ErrorKind::{Malformed, Missing, TooLarge, Unsupported};
    let table: Vec<(&str, File, ErrorKind, &str)> = vec![
        ("tensors", File::new(huge, 0), TooLarge, "at most 65536"),
        ("keys", File::new(0, huge), TooLarge, "metadata keys"),
        (
            "key length",
            File::new(0, 1).u64(huge),
            Malformed,
            "more bytes expected",
        ),
        (
            "long key",
            File::new(0, 1).text(&"k".repeat(5000)).u32(0),
            Malformed,
            "5000 bytes",
        ),
        (
            "key bytes",
            File::new(0, 1).u64(2).bytes(&[0xff, 0xfe]),
            Malformed,
            "UTF-8",
        ),
        (
            "string length",
            File::new(0, 1).key("k", STRING).u64(huge),
            Malformed,
            "\"k\"",
        ),
        (
            "value type",
            File::new(0, 1).key("k", 13).u64(0),
            Malformed,
            "unknown value type 13",
        ),
        (
            "bool",
            File::new(0, 1).key("k", 7).bytes(&[2]),
            Malformed,
            "2 as a value",
        ),
        (
            "bytes",
            File::new(0, 1).key("k", ARRAY).u32(0).u64(huge),
            Malformed,
            "more bytes",
        ),
        (
            "longs",
            File::new(0, 1).key("k", ARRAY).u32(10).u64(huge / 4),
            Malformed,
            "more bytes",
        ),
        (
            "strings",
            File::new(0, 1).key("k", ARRAY).u32(STRING).u64(huge),
            Malformed,
            "more bytes",
        ),
        ("nested", nested, Malformed, "depth"),
        (
            "key twice",
            File::new(0, 2).number("k", 1).number("k", 2),
            Malformed,
            "twice",
        ),
        (
            "alignment 0",
            File::new(0, 1).number("general.alignment", 0),
            Malformed,
            "power of two",
        ),
        (
            "alignment 12",
            File::new(0, 1).number("general.alignment", 12),
            Malformed,
            "power of two",
        ),
        (
            "alignment 4",
            File::new(0, 1).number("general.alignment", 4),
            Malformed,
            "power of two",
        ),
        (
            "big alignment",
            File::new(0, 1).number("general.alignment", 1 << 31),
            Malformed,
            "power",
        ),
        (
            "alignment kind",
            File::new(0, 1).key("general.alignment", STRING).text("8"),
            Malformed,
            "",
        ),
        ("no dims", tensor(&[], 0, 0), Malformed, "0 dimensions"),
        ("5 dims", tensor(&[1; 5], 0, 0), Malformed, "5 dimensions"),
        ("dim 0", tensor(&[4, 0], 0, 0), Malformed, "bad dimensions"),
        (
            "overflow",
            tensor(&[1 << 40, 1 << 40], 0, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "wraps to 0",
            tensor(&[1 << 32, 1 << 32], 0, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "bytes overflow",
            tensor(&[1 << 62], 0, 0),
            Malformed,
            "past the end",
        ),
        (
            "ragged block",
            tensor(&[33, 2], 2, 0),
            Malformed,
            "bad dimensions",
        ),
        (
            "past the end",
            tensor(&[64], 0, 32),
            Malformed,
            "past the end",
        ),
        (
            "offset overflow",
            tensor(&[4], 0, huge - 31),
            Malformed,
            "past the end",
        ),
        ("unaligned", tensor(&[4], 0, 8), Malformed, "not aligned"),
        (
            "IQ type",
            tensor(&[256], 23, 0),
            Unsupported,
            "tensor 'blk.0.x': GGUF type IQ4_XS",
        ),
        ("MXFP4", tensor(&[256], 39, 0), Unsupported, "MXFP4"),
        ("Q8_1", tensor(&[32], 9, 0), Unsupported, "Q8_1"),
        (
            "new type",
            tensor(&[256], 1000, 0),
            Unsupported,
            "number 1000",
        ),
        (
            "tensor twice",
            File::new(2, 0)
                .tensor("a", &[1], 0, 0)
                .tensor("a", &[1], 0, 0),
            Malformed,
            "twice",
        ),
        ("nothing", File::new(0, 0), Missing, "general.architecture"),
        (
            "other model",
            architecture("gemma3"),
            Unsupported,
            "\"gemma3\"",
        ),
        (
            "no sizes",
            architecture("llama"),
            Missing,
            "llama.embedding_length",
        ),
        (
            "split",
            File::new(0, 1).key("split.count", 2).bytes(&[3, 0]),
            Unsupported,
            "3 parts",
        ),
        (
            "adapter",
            File::new(0, 1).key("general.type", STRING).text("adapter"),
            Unsupported,
            "adapter",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (what, file, kind, message) in table {
        let error = read_all(&path, &file.0).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        let error = error.to_string();
        assert!(error.contains(message), "{what}: {error}");
        assert!(
            error.contains("m.gguf") && !error.contains('\n'),
            "{what}: {error}"
        );
    }
}

/// 8 GiB of one-byte values, in a file with a hole: expanded into values of 32 bytes it would be
/// 256 GiB. Nothing of it is read or kept.
#[test]
fn a_huge_array_costs_no_memory() {
    let len = 8u64 << 30;
    let header = File::new(0, 1).key("k", ARRAY).u32(0).u64(len).0;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, &header).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(header.len() as u64 + len).unwrap();
    let error = GgufSource::open(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Missing, "{error}");
}

/// A good file with `from` replaced by `to` (of the same length) wherever it stands.
fn edited(family: &str, from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut bytes = std::fs::read(data(&format!("families/{family}/model.gguf"))).unwrap();
    assert_eq!(from.len(), to.len());
    let places: Vec<usize> = (0..=bytes.len() - from.len())
        .filter(|&at| bytes[at..].starts_with(from))
        .collect();
    assert!(!places.is_empty(), "nothing to edit");
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    bytes
}

fn key_with(key: &str, n: u32) -> Vec<u8> {
    [key.as_bytes(), &4u32.to_le_bytes(), &n.to_le_bytes()].concat()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

#[test]
fn models_that_do_not_add_up_are_refused() {
    use ErrorKind::{Invalid, Malformed, Missing, Shape, Unsupported};
    let number =
        |family, key: &str, from, to| edited(family, &key_with(key, from), &key_with(key, to));
    let rename = |family, from: &str, to: &str| edited(family, from.as_bytes(), to.as_bytes());
    let table: Vec<(&str, Vec<u8>, ErrorKind, &str)> = vec![
        (
            "a tensor is gone",
            rename("phi3", "blk.1.ffn_up", "blk.1.ffn_xx"),
            Missing,
            "blk.1.ffn_up.weight",
        ),
        (
            "a tensor too many",
            number("qwen2", "block_count", 2, 1),
            Unsupported,
            "1 layers",
        ),
        (
            "a layer too few",
            number("qwen2", "block_count", 2, u32::MAX),
            Missing,
            "blk.2.",
        ),
        (
            "no embeddings",
            rename("qwen2", "token_embd", "token_xxxx"),
            Invalid,
            "vocabulary 0",
        ),
        (
            "other heads",
            number("qwen3", "head_count", 4, 8),
            Shape,
            "expected",
        ),
        (
            "odd kv heads",
            number("llama3", "head_count_kv", 2, 3),
            Invalid,
            "share 3",
        ),
        (
            "no heads",
            number("llama3", "head_count", 4, 0),
            Malformed,
            "head_count is 0",
        ),
        (
            "no kv heads",
            number("llama3", "head_count_kv", 2, 0),
            Invalid,
            "kv head count 0",
        ),
        (
            "big ffn",
            number("llama3", "feed_forward_length", 20, u32::MAX),
            Invalid,
            "feed-forward",
        ),
        (
            "partial rotary",
            number("llama3", "dimension_count", 12, 6),
            Unsupported,
            "6 of 12",
        ),
        (
            "wide rotary",
            number("phi3", "dimension_count", 4, 6),
            Invalid,
            "6 of 4",
        ),
        (
            "values unlike keys",
            number("llama3", "value_length", 12, 16),
            Unsupported,
            "another length",
        ),
        (
            "one bias gone",
            rename("qwen2", "blk.0.attn_q.bias", "blk.0.attn_q.xxxx"),
            Missing,
            "attn_q.bias",
        ),
        (
            "factors gone",
            rename("phi4-mini", "rope_factors_long", "rope_factors_xxxx"),
            Missing,
            "long",
        ),
        (
            "other factors",
            edited(
                "llama3",
                &floats(&[8.0; 5]),
                &floats(&[8.0, 8.0, 9.0, 8.0, 8.0]),
            ),
            Unsupported,
            "llama3",
        ),
        (
            "not a number",
            edited("llama3", &1e-5f32.to_le_bytes(), &f32::NAN.to_le_bytes()),
            Malformed,
            "finite",
        ),
        (
            "token bytes",
            edited("qwen2", b"t23", b"t2\xff"),
            Malformed,
            "UTF-8",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for (what, bytes, kind, message) in table {
        let error = read_all(&path, &bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(message), "{what}: {error}");
    }
}

/// A llama of one layer and one head of 8, all zeros, with more keys (name below `llama.`, value
/// type, bytes) and tensors.
fn llama(keys: &[(&str, u32, &[u8])], tensors: &[(&str, &[u64])]) -> Vec<u8> {
    let sizes = [
        "embedding_length",
        "attention.head_count",
        "feed_forward_length",
        "block_count",
        "context_length",
    ];
    let matrices = [
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    let vectors = [
        "blk.0.attn_norm.weight",
        "blk.0.ffn_norm.weight",
        "output_norm.weight",
    ];
    let mut file = File::new(11 + tensors.len() as u64, 7 + keys.len() as u64)
        .key("general.architecture", STRING)
        .text("llama")
        .key("llama.attention.layer_norm_rms_epsilon", 6)
        .bytes(&1e-5f32.to_le_bytes());
    for name in sizes {
        let one = matches!(name, "attention.head_count" | "block_count");
        file = file.number(&format!("llama.{name}"), if one { 1 } else { 8 });
    }
    for (name, kind, bytes) in keys {
        file = file.key(&format!("llama.{name}"), *kind).bytes(bytes);
    }
    file = file.tensor("token_embd.weight", &[8, 8], 0, 0);
    for name in matrices {
        file = file.tensor(&format!("blk.0.{name}.weight"), &[8, 8], 0, 0);
    }
    for name in vectors {
        file = file.tensor(name, &[8], 0, 0);
    }
    for (name, dims) in tensors {
        file = file.tensor(name, dims, 0, 0);
    }
    file.bytes(&[0; 32 + 8 * 8 * 4]).0
}

fn config_of(bytes: &[u8]) -> Result<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    let source = GgufSource::open(&path)?;
    Ok(serde_json::from_str(&source.files().config_json).unwrap())
}

/// The bytes of a string value.
fn text(text: &str) -> Vec<u8> {
    File(Vec::new()).text(text).0
}

#[test]
fn variants_that_the_families_do_not_have_are_refused() {
    let q: (&str, &[u64]) = ("blk.0.attn_q.bias", &[8]);
    let biases: Vec<(&str, &[u64])> = vec![
        q,
        ("blk.0.attn_k.bias", &[8]),
        ("blk.0.attn_v.bias", &[8]),
        ("blk.0.attn_output.bias", &[8]),
    ];
    let window: (&str, u32, &[u8]) = ("attention.sliding_window", 4, &[4, 0, 0, 0]);
    assert_eq!(
        config_of(&llama(&[], &[])).unwrap()["attention_bias"],
        false
    );
    assert_eq!(
        config_of(&llama(&[], &biases)).unwrap()["attention_bias"],
        true
    );
    let mistral = config_of(&llama(&[window], &[])).unwrap();
    assert_eq!(
        (&mistral["model_type"], &mistral["sliding_window"]),
        (&"mistral".into(), &4.into())
    );

    let experts: (&str, u32, &[u8]) = ("expert_count", 4, &[8, 0, 0, 0]);
    let dynamic = text("dynamic");
    let per_layer = [
        4u32.to_le_bytes(),
        2u32.to_le_bytes(),
        [0; 4],
        [1, 0, 0, 0],
        [2, 0, 0, 0],
    ];
    let per_layer = per_layer.concat();
    let table: Vec<(&str, Vec<u8>, ErrorKind, &str)> = vec![
        (
            "one bias",
            llama(&[], &[q]),
            ErrorKind::Unsupported,
            "1 of 4 biases",
        ),
        (
            "mistral's",
            llama(&[window], &biases),
            ErrorKind::Unsupported,
            "4 of 4 biases",
        ),
        (
            "experts",
            llama(&[experts], &[]),
            ErrorKind::Unsupported,
            "mixture",
        ),
        (
            "layers",
            llama(&[("attention.head_count_kv", ARRAY, &per_layer)], &[]),
            ErrorKind::Unsupported,
            "differs between",
        ),
        (
            "rope",
            llama(&[("rope.scaling.type", STRING, &dynamic)], &[]),
            ErrorKind::Unsupported,
            "dynamic",
        ),
        (
            "freqs",
            llama(&[], &[("rope_freqs.weight", &[5])]),
            ErrorKind::Invalid,
            "5 rotary factors",
        ),
        (
            "many",
            llama(&[], &[("rope_freqs.weight", &[2, 2])]),
            ErrorKind::Shape,
            "short list",
        ),
        (
            "head",
            llama(&[], &[("output.weight", &[4, 8])]),
            ErrorKind::Shape,
            "[8, 4], expected [8, 8]",
        ),
    ];
    for (what, bytes, kind, message) in table {
        let error = config_of(&bytes).unwrap_err();
        assert_eq!(error.kind(), kind, "{what}: {error}");
        assert!(error.to_string().contains(message), "{what}: {error}");
    }
}

#[test]
fn rope_scaling_keys_become_rope_scaling() {
    use serde_json::json;
    let four: &[u8] = &4f32.to_le_bytes();
    let (linear, yarn, none) = (text("linear"), text("yarn"), text("none"));
    let scaling =
        |keys: &[(&str, u32, &[u8])]| config_of(&llama(keys, &[])).unwrap()["rope_scaling"].clone();
    let factor = ("rope.scaling.factor", 6, four);
    let original = (
        "rope.scaling.original_context_length",
        4,
        [32, 0, 0, 0].as_slice(),
    );
    assert_eq!(scaling(&[]), json!(null));
    assert_eq!(
        scaling(&[("rope.scaling.type", STRING, &none), factor]),
        json!(null)
    );
    let expected = json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(
        scaling(&[("rope.scaling.type", STRING, &linear), factor]),
        expected
    );
    assert_eq!(scaling(&[("rope.scale_linear", 6, four)]), expected);
    let expected =
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
    let yarn = ("rope.scaling.type", STRING, yarn.as_slice());
    assert_eq!(scaling(&[yarn, factor, original]), expected);
}

//! Well-formed files of inconsistent or unsupported models,
//! and the rope scaling of supported ones.

use super::super::{GgufSource, Source};
use super::builder::{ARRAY, STRING, edited, floats, key_with, llama, text};
use super::hostile::read_all;
use upg_kernel::inference::config::{ModelConfig, RopeScaling};
use upg_kernel::{ErrorKind, Result};

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
            "negative factors",
            edited(
                "llama3",
                &floats(&[8.0; 5]),
                &floats(&[8.0, 8.0, -9.0, 8.0, 8.0]),
            ),
            Invalid,
            "rotary factors",
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

fn config_of(bytes: &[u8]) -> Result<serde_json::Value> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    let source = GgufSource::open(&path)?;
    Ok(serde_json::from_str(source.files().config_json.as_ref().unwrap()).unwrap())
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

/// Divisors of any kind are read as longrope that is the same at every length.
#[test]
fn rotary_factors_of_no_known_kind_are_listed() {
    let factors = [8.0, 8.0, 9.0, 8.0, 8.0];
    let bytes = edited("llama3", &floats(&[8.0; 5]), &floats(&factors));
    let config = config_of(&bytes).unwrap();
    let rope = ModelConfig::from_json(&config.to_string(), None)
        .unwrap()
        .rope;
    let RopeScaling::LongRope {
        short,
        long,
        attention_factor,
        ..
    } = rope.scaling
    else {
        panic!("{rope:?}");
    };
    assert!(
        short
            .windows(5)
            .any(|found| *found == factors.map(f64::from))
    );
    assert_eq!((short, attention_factor), (long, 1.0));
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
    let half = 0.5f32.to_le_bytes();
    let attention = ("rope.scaling.attn_factor", 6, half.as_slice());
    let found = scaling(&[yarn, factor, attention])["attention_factor"]
        .as_f64()
        .unwrap();
    assert!((found - 0.5 * (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
    let e = config_of(&llama(&[attention], &[]))
        .unwrap_err()
        .to_string();
    assert!(e.contains("attn_factor 0.5 without YaRN"), "{e}");
}

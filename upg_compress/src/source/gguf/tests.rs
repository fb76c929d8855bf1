//! Comparison with files that transformers and llama.cpp's `gguf` package wrote.
//!
//! See `tests/data/make_fixtures.py`.

mod builder;
mod hostile;
mod split;
mod variants;

use super::super::hf::HfSource;
use super::super::{Source, SourceDtype, open};
use super::types::GgmlType;
use super::{GgufSource, RowOrder};
use crate::source::tests::data;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;
use upg_kernel::ErrorKind;

const FAMILIES: [&str; 7] = [
    "llama3",
    "llama-bias",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "phi4-mini",
];

fn both(family: &str) -> (HfSource, GgufSource) {
    let dir = data(&format!("families/{family}"));
    let gguf = GgufSource::open(dir.join("model.gguf")).unwrap();
    (HfSource::open(dir).unwrap(), gguf)
}

/// Names, shapes, order and every value equal those of the model that transformers saved.
#[test]
fn gguf_gives_back_the_hugging_face_model() {
    for family in FAMILIES {
        let (hf, gguf) = both(family);
        let shapes = |s: &dyn Source| -> Vec<(String, Vec<usize>)> {
            let pair = |t: &super::TensorInfo| (t.name.clone(), t.shape.clone());
            s.tensors().iter().map(pair).collect()
        };
        assert_eq!(shapes(&hf), shapes(&gguf), "{family}");
        assert_eq!(hf.total_weights(), gguf.total_weights());
        for (i, tensor) in hf.tensors().iter().enumerate() {
            let expected = hf.read_f32(i).unwrap();
            assert_eq!(expected.len(), tensor.weights());
            assert_eq!(
                expected,
                gguf.read_f32(i).unwrap(),
                "{family} {}",
                tensor.name
            );
            let last = tensor.rows() - 1;
            let row = gguf.read_rows_f32(i, last..tensor.rows()).unwrap();
            assert_eq!(row, expected[last * tensor.cols()..]);
            // The conversion widened vectors to F32; matrices keep their bytes.
            if tensor.shape.len() == 2 {
                let (a, b) = (hf.read_raw(i).unwrap(), gguf.read_raw(i).unwrap());
                assert_eq!(
                    (a.dtype, &a.bytes),
                    (b.dtype, &b.bytes),
                    "{family} {}",
                    tensor.name
                );
            }
        }
    }
}

/// Returns the fields that affect the computation,
/// in one form for both forms of rope parameters.
fn essence(config_json: &str) -> Value {
    let config: Value = serde_json::from_str(config_json).unwrap();
    let config = config.as_object().unwrap();
    let mut out = serde_json::Map::new();
    let keys = "architectures model_type hidden_size intermediate_size num_hidden_layers \
        num_attention_heads num_key_value_heads max_position_embeddings rms_norm_eps vocab_size \
        tie_word_embeddings bos_token_id eos_token_id pad_token_id hidden_act sliding_window \
        attention_bias mlp_bias use_sliding_window original_max_position_embeddings";
    for key in keys.split_whitespace() {
        if let Some(value) = config.get(key) {
            out.insert(key.to_owned(), value.clone());
        }
    }
    let dtype = config.get("torch_dtype").or(config.get("dtype")).unwrap();
    out.insert("dtype".to_owned(), dtype.clone());
    let size = |key: &str| config[key].as_u64().unwrap();
    let head_dim = config.get("head_dim").and_then(Value::as_u64);
    let head_dim = head_dim.unwrap_or_else(|| size("hidden_size") / size("num_attention_heads"));
    out.insert("head_dim".to_owned(), json!(head_dim));
    let mut rope = match (config.get("rope_parameters"), config.get("rope_scaling")) {
        (Some(rope), _) | (None, Some(rope)) if rope.is_object() => rope.clone(),
        _ => json!({"rope_type": "default"}),
    };
    let rope = rope.as_object_mut().unwrap();
    rope.remove("type");
    for key in ["rope_theta", "partial_rotary_factor"] {
        if let Some(value) = config.get(key) {
            rope.insert(key.to_owned(), value.clone());
        }
    }
    if config["model_type"] == "phi3" {
        rope.remove("original_max_position_embeddings");
    }
    let mut rope: Vec<_> = rope.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    rope.sort_by(|a, b| a.0.cmp(&b.0));
    out.insert("rope".to_owned(), json!(rope));
    Value::Object(out)
}

#[test]
fn the_config_says_what_that_of_transformers_says() {
    for family in FAMILIES {
        let (hf, gguf) = both(family);
        let rebuilt = essence(gguf.files().config_json.as_ref().unwrap());
        assert_eq!(
            rebuilt,
            essence(hf.files().config_json.as_ref().unwrap()),
            "{family}"
        );
        let generation: Value =
            serde_json::from_str(gguf.files().generation_config_json.as_ref().unwrap()).unwrap();
        assert_eq!(
            generation,
            json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
        );
    }
}

#[test]
fn the_vocabulary_is_collected() {
    let (_, gguf) = both("qwen3");
    let vocab = gguf.vocab();
    assert_eq!(
        (vocab.model.as_str(), vocab.pre.as_deref()),
        ("gpt2", Some("gpt-2"))
    );
    assert_eq!((vocab.tokens.len(), vocab.tokens[23].as_str()), (24, "t23"));
    assert_eq!(vocab.token_types, vec![1; 24]);
    assert_eq!(vocab.merges, ["t 1", "t 2"]);
    assert_eq!(
        (vocab.bos, vocab.eos, vocab.unk, vocab.pad),
        (Some(1), Some(2), None, Some(0))
    );
    assert_eq!((vocab.add_bos, vocab.add_eos), (Some(false), None));
    let template = Some("{{ messages[0].content }}");
    assert_eq!(vocab.chat_template.as_deref(), template);
    assert_eq!(gguf.files().chat_template.as_deref(), template);
    assert_eq!(gguf.model_name(), "qwen3");
}

#[test]
fn factor_tensors_are_skipped_and_said_to_be() {
    let names = |family| -> Vec<String> {
        let (_, gguf) = both(family);
        gguf.skipped().iter().map(|s| s.name.clone()).collect()
    };
    assert_eq!(names("llama3"), ["rope_freqs.weight"]);
    let long = ["rope_factors_short.weight", "rope_factors_long.weight"];
    assert_eq!(names("phi4-mini"), long);
    assert!(names("qwen2").is_empty());
}

/// By hand: two heads of 4. Stored are x0 y0 x1 y1 (adjacent pairs),
/// the model has x0 x1 y0 y1.
#[test]
fn interleaved_rows_are_put_back() {
    let order = RowOrder::Interleaved { head_dim: 4 };
    let stored: Vec<usize> = (0..8).map(|row| order.stored_row(row)).collect();
    assert_eq!(stored, [0, 2, 1, 3, 4, 6, 5, 7]);
    let order = RowOrder::Interleaved { head_dim: 6 };
    let stored: Vec<usize> = (0..6).map(|row| order.stored_row(row)).collect();
    assert_eq!(stored, [0, 2, 4, 1, 3, 5]);
}

/// Maximum difference to llama.cpp's own values, relative to the largest of the block.
///
/// The order of the f32 multiplications differs in the K types.
const BLOCK_TOLERANCE: f32 = 2e-7;

#[test]
fn blocks_of_every_type_decode_as_in_llama_cpp() {
    let file = std::fs::read(data("ggml_blocks.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let mut seen = 0;
    for number in 0..64 {
        let Ok(kind @ GgmlType::Quantized(_)) = GgmlType::from_number(number) else {
            continue;
        };
        let Ok(blocks) = file.tensor(&format!("{}.blocks", kind.name())) else {
            assert_eq!(kind.name(), "Q8_K", "no fixture");
            continue;
        };
        let values = file.tensor(&format!("{}.values", kind.name())).unwrap();
        assert_eq!(blocks.shape()[1], kind.block_bytes());
        let mut expected = vec![0f32; values.data().len() / 4];
        super::FloatType::F32
            .to_f32(values.data(), &mut expected)
            .unwrap();
        // At every alignment that the mapped file could have if the header did not forbid it.
        for shift in 0..4 {
            let mut moved = vec![0u8; shift];
            moved.extend_from_slice(blocks.data());
            let mut out = vec![f32::NAN; expected.len()];
            kind.to_f32(&moved[shift..], &mut out).unwrap();
            let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
            for (x, y) in out.iter().zip(&expected) {
                assert!(
                    (x - y).abs() <= BLOCK_TOLERANCE * largest,
                    "{} {x} {y}",
                    kind.name()
                );
            }
        }
        let mut out = vec![0f32; expected.len()];
        assert!(kind.to_f32(&blocks.data()[1..], &mut out).is_err());
        assert!(kind.to_f32(blocks.data(), &mut out[1..]).is_err());
        seen += 1;
    }
    assert_eq!(seen, 10);
}

/// Q8_K has no decoder in the `gguf` package; by its definition a value is d x q.
#[test]
fn q8_k_is_scale_times_level() {
    let mut block = 0.5f32.to_le_bytes().to_vec();
    block.extend((0..=255u8).map(|q| q.wrapping_sub(128)));
    block.extend([0; 32]);
    let mut out = vec![0f32; 256];
    GgmlType::from_number(15)
        .unwrap()
        .to_f32(&block, &mut out)
        .unwrap();
    let expected: Vec<f32> = (-128..128).map(|q| 0.5 * q as f32).collect();
    assert_eq!(out, expected);
}

fn smollm2() -> PathBuf {
    let path = std::env::var_os("UPG_TEST_GGUF");
    PathBuf::from(path.expect(
        "UPG_TEST_GGUF is not set: run ./test.sh, or set it to the path of \
         SmolLM2-135M-Instruct.Q4_1.gguf",
    ))
}

#[test]
fn smollm2_has_the_values_that_llama_cpp_reads() {
    let source = open(smollm2()).unwrap();
    let expected = std::fs::read(data("smollm2_q4_1.json")).unwrap();
    let expected: Value = serde_json::from_slice(&expected).unwrap();
    let expected = expected["tensors"].as_object().unwrap();
    assert_eq!(source.tensors().len(), expected.len());
    assert_eq!(source.total_weights(), 134_515_008);
    for (i, tensor) in source.tensors().iter().enumerate() {
        let expected = &expected[&tensor.name];
        assert_eq!(json!(tensor.shape), expected["shape"]);
        assert_eq!(json!(tensor.dtype.to_string()), expected["type"]);
        let values = source.read_f32(i).unwrap();
        for (x, y) in values
            .iter()
            .zip(expected["first"].as_array().into_iter().flatten())
        {
            assert_eq!(*x, y.as_f64().unwrap() as f32, "{}", tensor.name);
        }
        let checksum = values.iter().zip(1u64..).fold(0u64, |sum, (x, place)| {
            sum.wrapping_add(u64::from(x.to_bits()).wrapping_mul(place))
        });
        assert_eq!(json!(checksum), expected["checksum"], "{}", tensor.name);
    }
}

#[test]
fn smollm2_has_its_published_config() {
    let source = GgufSource::open(smollm2()).unwrap();
    let config: Value = serde_json::from_str(source.files().config_json.as_ref().unwrap()).unwrap();
    let published = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "rope_theta": 100000.0, "rope_scaling": null,
        "vocab_size": 49152, "tie_word_embeddings": true, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "hidden_act": "silu", "attention_bias": false,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    });
    for (key, value) in published.as_object().unwrap() {
        assert_eq!(&config[key], value, "{key}");
    }
    let vocab = source.vocab();
    assert_eq!((vocab.tokens.len(), vocab.merges.len()), (49152, 48900));
    assert_eq!(vocab.pre.as_deref(), Some("smollm"));
    let head = source.tensors().iter().find(|t| t.name == "lm_head.weight");
    assert_eq!(head, None);
    assert_eq!(source.tensors()[0].dtype, SourceDtype::Quantized("Q8_0"));
}

#[test]
fn reading_beyond_the_tensors_is_refused() {
    let (hf, gguf) = both("phi3");
    for source in [&hf as &dyn Source, &gguf] {
        let count = source.tensors().len();
        let rows = source.tensors()[0].rows();
        for error in [
            source.read_f32(count).unwrap_err(),
            source.read_raw(count).unwrap_err(),
            source.read_rows_f32(0, 1..rows + 1).unwrap_err(),
            source
                .read_rows_f32(0, std::ops::Range { start: 2, end: 1 })
                .unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Argument);
        }
        assert!(source.read_rows_f32(0, rows..rows).unwrap().is_empty());
    }
}

/// `general.sampling.*` of llama.cpp become what transformers calls them.
#[test]
fn recommended_sampling_is_in_the_generation_config() {
    let (int, float) = (5, 6);
    let bytes = builder::llama(
        &[
            ("general.sampling.temp", float, &0.6f32.to_le_bytes()),
            ("general.sampling.top_k", int, &20i32.to_le_bytes()),
            // Not a number: left out, as nothing depends on it.
            ("general.sampling.top_p", 7, &[1]),
        ],
        &[],
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let gguf = GgufSource::open(file.path()).unwrap();
    let text = gguf.files().generation_config_json.clone().unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(config["temperature"], json!(0.6));
    assert_eq!(config["top_k"], json!(20));
    assert_eq!(config.get("top_p"), None);
}

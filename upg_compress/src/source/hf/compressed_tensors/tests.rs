//! Checkpoints of `compressed-tensors`: those of `tests/data/make_compressed_tensors.py`, and
//! damaged ones.

use crate::source::hf::HfSource;
use crate::source::tests::data;
use crate::source::{FloatType, Source, SourceDtype};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use upg_kernel::{Error, ErrorKind};

/// Tensors by name: type, shape, bytes.
type Model = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Model {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let of = |t: &TensorView<'_>| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
    let tensors = tensors.tensors();
    tensors
        .iter()
        .map(|(name, t)| (name.clone(), of(t)))
        .collect()
}

fn folder(name: &str) -> std::path::PathBuf {
    data(&format!("compressed-tensors/{name}"))
}

#[test]
fn every_checkpoint_has_its_dense_values() {
    for name in [
        "sparse-bitmask",
        "sparse-bitmask-0.5",
        "sparse-24-bitmask",
        "pack-quantized",
        "pack-quantized-0.8",
    ] {
        let source = HfSource::open(folder(name)).unwrap();
        let expected = read(&folder(name).join("expected.safetensors"));
        let names: Vec<&String> = source.tensors().iter().map(|t| &t.name).collect();
        assert_eq!(names.len(), expected.len(), "{names:?}");
        for (index, tensor) in source.tensors().iter().enumerate() {
            let at = format!("{name}: {}", tensor.name);
            let (_, shape, bytes) = &expected[&tensor.name];
            let mut values = vec![0.0; bytes.len() / 4];
            FloatType::F32.to_f32(bytes, &mut values).unwrap();
            assert_eq!(&tensor.shape, shape, "{at}");
            assert_eq!(source.read_f32(index).unwrap(), values, "{at}");
            let raw = source.read_raw(index).unwrap();
            match tensor.dtype {
                SourceDtype::Float(float) => assert_eq!(raw.dtype, float, "{at}"),
                SourceDtype::Quantized(name) => assert_eq!(name, "pack-quantized", "{at}"),
            }
            let mut all = vec![0.0; values.len()];
            raw.dtype.to_f32(&raw.bytes, &mut all).unwrap();
            assert_eq!(all, values, "{at}");
            let (rows, cols) = (tensor.rows(), tensor.cols());
            for part in [0..1, rows / 2..rows, rows - 1..rows, rows..rows] {
                let some = source.read_rows_f32(index, part.clone()).unwrap();
                assert_eq!(some, values[part.start * cols..part.end * cols], "{at}");
            }
        }
        let config: Value =
            serde_json::from_str(source.files().config_json.as_ref().unwrap()).unwrap();
        let left: Vec<&String> = config.as_object().unwrap().keys().collect();
        assert_eq!(
            left,
            ["architectures", "model_type", "vocab_size", "hidden_size"]
        );
    }
}

/// Returns the error of opening or reading the model of folder `name` after a change.
fn error(name: &str, change: impl Fn(&mut Value, &mut Model)) -> Option<Error> {
    let text = fs::read_to_string(folder(name).join("config.json")).unwrap();
    let mut config = serde_json::from_str(&text).unwrap();
    let mut model = read(&folder(name).join("model.safetensors"));
    change(&mut config, &mut model);
    let views = model.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(path, serialize(views, None).unwrap()).unwrap();
    let source = match HfSource::open(dir.path()) {
        Ok(source) => source,
        Err(e) => return Some(e),
    };
    let all = 0..source.tensors().len();
    let errors = all.flat_map(|i| [source.read_f32(i).err(), source.read_raw(i).err()]);
    errors.flatten().next()
}

const Q: &str = "model.layers.0.self_attn.q_proj";
const K: &str = "model.layers.0.self_attn.k_proj";
const V: &str = "model.layers.0.self_attn.v_proj";
const UP: &str = "model.layers.0.mlp.up_proj";
const GATE: &str = "model.layers.0.mlp.gate_proj";

/// Sets a byte of a tensor.
fn set(model: &mut Model, name: &str, at: usize, value: impl Fn(u8) -> u8) {
    let byte = &mut model.get_mut(name).unwrap().2[at];
    *byte = value(*byte);
}

/// Truncates a tensor to the shape.
fn cut(model: &mut Model, name: &str, shape: &[usize]) {
    let (_, old, bytes) = model.get_mut(name).unwrap();
    let each = bytes.len() / old.iter().product::<usize>();
    bytes.truncate(shape.iter().product::<usize>() * each);
    *old = shape.to_vec();
}

#[test]
#[rustfmt::skip]
fn weights_whose_parts_do_not_agree_are_refused() {
    use ErrorKind::{Invalid, Missing, Shape, Unsupported};
    type Change = fn(&mut Model);
    let table: Vec<(&str, &str, Change, ErrorKind, &str)> = vec![
        ("sparse-bitmask", Q, |m| drop(m.remove(&format!("{Q}.compressed"))), Missing, "'.compressed'"),
        ("sparse-bitmask", Q, |m| drop(m.remove(&format!("{Q}.shape"))), Missing, "'.shape'"),
        ("sparse-bitmask", Q, |m| drop(m.remove(&format!("{Q}.row_offsets"))), Missing, "'.row_offsets'"),
        ("sparse-bitmask", Q, |m| drop(m.remove(&format!("{Q}.bitmask"))), Unsupported, "belongs to no weight"),
        ("sparse-bitmask", Q, |m| cut(m, &format!("{Q}.bitmask"), &[4, 3]), Shape, "[4, 3], expected [5, 3]"),
        ("sparse-bitmask", Q, |m| cut(m, &format!("{Q}.row_offsets"), &[4]), Shape, "[4], expected [5]"),
        ("sparse-bitmask", Q, |m| cut(m, &format!("{Q}.compressed"), &[3]), Invalid, "row 0 has"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.shape"), 15, |_| 0x80), Shape, "expected one or two sizes"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.shape"), 7, |_| 0x40), Shape, "expected one or two sizes"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.shape"), 0, |_| 0), Shape, "expected one or two sizes"),
        // 19 columns: bits 3 to 7 of the third byte are past the last one.
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.bitmask"), 5, |b| b | 8), Invalid, "row 1 has bits past column 19"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.bitmask"), 6, |b| b ^ 1), Invalid, "row 2 has"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.row_offsets"), 0, |_| 1), Invalid, "offsets of row 0"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.row_offsets"), 8, |b| b + 1), Invalid, "row 0 has"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.row_offsets"), 16, |_| 0), Invalid, "row 1 has"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.row_offsets"), 23, |_| 0x80), Invalid, "offsets of row 1"),
        ("sparse-bitmask", Q, |m| set(m, &format!("{Q}.row_offsets"), 38, |_| 1), Invalid, "row 3 has"),
        (
            "sparse-bitmask",
            K,
            |m| {
                let plain = (Dtype::F16, vec![3, 16], vec![0; 96]);
                m.insert(format!("{K}.weight"), plain);
            },
            Invalid,
            "stored twice",
        ),
        (
            "sparse-bitmask",
            V,
            |m| {
                m.get_mut(&format!("{V}.row_offsets")).unwrap().0 = Dtype::U64;
            },
            Unsupported,
            "U64, expected [I64]",
        ),
        ("sparse-24-bitmask", GATE, |m| cut(m, &format!("{GATE}.compressed"), &[4, 8]), Shape, "expected [5, 8]"),
        ("sparse-24-bitmask", GATE, |m| set(m, &format!("{GATE}.bitmask"), 2, |b| b ^ 0x11), Invalid, "row 1 has other"),
        (
            "sparse-24-bitmask",
            GATE,
            |m| {
                let offsets = (Dtype::I64, vec![5], vec![0; 40]);
                m.insert(format!("{GATE}.row_offsets"), offsets);
            },
            Unsupported,
            "row_offsets",
        ),
        ("pack-quantized", Q, |m| drop(m.remove(&format!("{Q}.weight_shape"))), Missing, "'.weight_shape'"),
        ("pack-quantized", Q, |m| drop(m.remove(&format!("{Q}.weight_scale"))), Missing, "'.weight_scale'"),
        ("pack-quantized", Q, |m| drop(m.remove(&format!("{Q}.weight_packed"))), Unsupported, "belongs to no weight"),
        ("pack-quantized", Q, |m| cut(m, &format!("{Q}.weight_packed"), &[5, 3]), Shape, "[5, 3], expected [6, 3]"),
        ("pack-quantized", Q, |m| cut(m, &format!("{Q}.weight_scale"), &[6, 2]), Shape, "[6, 2], expected [6, 3]"),
        ("pack-quantized", K, |m| set(m, &format!("{K}.weight_packed"), 39, |_| 1), Invalid, "row 1 has bits past column 19"),
        ("pack-quantized", V, |m| drop(m.remove(&format!("{V}.weight_zero_point"))), Missing, "'.weight_zero_point'"),
        ("pack-quantized", V, |m| cut(m, &format!("{V}.weight_zero_point"), &[1, 3]), Shape, "[1, 3], expected [1, 8]"),
        ("pack-quantized", UP, |m| set(m, &format!("{UP}.weight_g_idx"), 0, |_| 2), Invalid, "column 0 is in group 2 of 2"),
        (
            "pack-quantized",
            UP,
            |m| {
                m.get_mut(&format!("{UP}.weight_g_idx")).unwrap().2.fill(0);
            },
            Invalid,
            "group 1 has no columns",
        ),
        (
            "pack-quantized",
            Q,
            |m| {
                m.insert(
                    format!("{Q}.input_scale"),
                    (Dtype::F32, vec![1], vec![0; 4]),
                );
            },
            Unsupported,
            "belongs to no weight",
        ),
        ("pack-quantized-0.8", UP, |m| drop(m.remove(&format!("{UP}.weight_zero_point"))), Missing, "'.weight_zero_point'"),
    ];
    for (name, tensor, change, kind, message) in table {
        let e = error(name, |_, model| change(model)).expect(message);
        let text = e.to_string();
        assert!(text.contains(message), "{message}: {text}");
        assert!(e.tensor_name().unwrap().starts_with(tensor), "{text}");
        assert_eq!(e.kind(), kind, "{text}");
    }
}

#[test]
fn columns_without_groups_of_their_own_are_in_order() {
    let name = format!("{UP}.weight_g_idx");
    let unused = |_: &mut Value, m: &mut Model| m.get_mut(&name).unwrap().2.fill(0xff);
    assert!(error("pack-quantized", unused).is_none());
}

#[test]
#[rustfmt::skip]
fn other_formats_are_refused_by_name() {
    fn group(config: &mut Value) -> &mut Value {
        &mut config["quantization_config"]["config_groups"]["group_0"]
    }
    type Change = fn(&mut Value);
    let table: Vec<(&str, Change, &str)> = vec![
        ("pack-quantized", |c| c["quantization_config"]["quant_method"] = json!("gptq"), "(gptq)"),
        ("pack-quantized", |c| c["quantization_config"]["quant_method"] = json!(null), "(?)"),
        ("pack-quantized", |c| c["quantization_config"] = json!("int4"), "(?)"),
        ("pack-quantized", |c| { c["quantization_config"] = json!(null); c["compression_config"] = json!("int4"); }, "(?)"),
        ("pack-quantized", |c| c["quantization_config"]["format"] = json!("marlin-24"), "'marlin-24'"),
        ("pack-quantized", |c| group(c)["format"] = json!("nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
        ("pack-quantized", |c| c["quantization_config"]["config_groups"] = json!({"W4A16": ["Linear"]}), "null bits"),
        ("pack-quantized", |c| c["quantization_config"]["config_groups"] = json!("W4A16"), "'config_groups'"),
        ("pack-quantized", |c| c["quantization_config"]["config_groups"] = json!({}), "'pack-quantized'"),
        ("pack-quantized", |c| c["quantization_config"]["kv_cache_scheme"] = json!({"num_bits": 8}), "'kv_cache_scheme'"),
        ("pack-quantized", |c| c["quantization_config"]["transform_config"] = json!({"R1": 1}), "'transform_config'"),
        ("pack-quantized", |c| c["quantization_config"]["sparsity_config"] = json!({"format": "sparse-bitmask"}), "both"),
        ("pack-quantized", |c| group(c)["input_activations"] = json!({"num_bits": 8}), "'input_activations'"),
        ("pack-quantized", |c| group(c)["weights"]["num_bits"] = json!(3), "3 bits"),
        ("pack-quantized", |c| group(c)["weights"]["type"] = json!("float"), "float of 4 bits"),
        ("pack-quantized", |c| group(c)["weights"]["strategy"] = json!("block"), "'block'"),
        ("pack-quantized", |c| group(c)["weights"]["group_size"] = json!(0), "size of 0"),
        ("pack-quantized", |c| group(c)["weights"]["group_size"] = json!(-3), "size of -3"),
        ("sparse-bitmask", |c| c["quantization_config"]["sparsity_config"]["format"] = json!("dense"), "belongs to no weight"),
        ("sparse-bitmask", |c| c["quantization_config"]["sparsity_config"]["format"] = json!("runs"), "'runs'"),
        ("sparse-bitmask", |c| c["quantization_config"]["format"] = json!("float-quantized"), "'float-quantized'"),
        ("sparse-bitmask", |c| drop(c.as_object_mut().unwrap().remove("quantization_config")), "dtype"),
    ];
    for (name, change, message) in table {
        let e = error(name, |config, _| change(config)).expect(message);
        assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}");
        assert!(e.to_string().contains(message), "{message}: {e}");
        assert!(e.to_string().contains("pass the original"), "{e}");
    }
}

#[test]
fn a_strategy_that_is_not_named_follows_from_the_group_size() {
    let unnamed = |config: &mut Value, _: &mut Model| {
        let groups = &mut config["quantization_config"]["config_groups"];
        for group in groups.as_object_mut().unwrap().values_mut() {
            let weights = group["weights"].as_object_mut().unwrap();
            weights.remove("strategy");
            if weights["group_size"].is_null() {
                weights["group_size"] = json!(-1);
            }
        }
    };
    assert!(error("pack-quantized", unnamed).is_none());
}

#[test]
fn sizes_that_fit_two_groups_are_refused() {
    // Zero points with the same sizes, or none: their loss would go unnoticed.
    let both = |config: &mut Value, _: &mut Model| {
        let groups = &mut config["quantization_config"]["config_groups"];
        let mut other = groups["group_0"].clone();
        other["weights"]["symmetric"] = json!(false);
        groups["other"] = other;
    };
    let e = error("pack-quantized", both).unwrap();
    assert!(e.to_string().contains("several groups"), "{e}");
    // The same scheme with another name is not another one.
    let same = |config: &mut Value, _: &mut Model| {
        let groups = &mut config["quantization_config"]["config_groups"];
        groups["other"] = groups["group_0"].clone();
        groups["other"]["weights"]["actorder"] = json!("weight");
    };
    assert!(error("pack-quantized", same).is_none());
}

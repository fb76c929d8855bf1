//! Damaged files: one for every rule of `upg_format_v2.md`, truncations,
//! and random byte flips.

use crate::draft::{COLS, Draft, ROWS};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use std::path::Path;
use upg_kernel::format::{Encoding, MAX_TOKENIZER_BYTES, UpgFile};
use upg_kernel::{Error, ErrorKind, UPGDecompressor};

/// Time at which a damage must be detected.
#[derive(Clone, Copy, PartialEq, Debug)]
enum When {
    Opening,
    FirstUse,
    Verifying,
}

use ErrorKind::{Checksum, Invalid, Malformed, Missing, Shape, TooLarge, Unsupported};
use When::{FirstUse, Opening, Verifying};

type Damage = fn(&mut Draft);

/// Rows of name, damage, error kind, rule and time of detection.
#[rustfmt::skip]
const TABLE: &[(&str, Damage, ErrorKind, u8, When)] = &[
    ("control character in a name", |d| d.tensor("model.norm.weight").name = "a\nb".into(), Malformed, 1, Opening),
    ("name of 5000 bytes", |d| d.tensor("model.norm.weight").name = "n".repeat(5000), TooLarge, 1, Opening),
    ("tensor of 17 dimensions", |d| d.tensor("model.norm.weight").shape.extend([1; 16]), TooLarge, 1, Opening),
    ("65,537 metadata keys", |d| (0..1 << 16).for_each(|i| set(d, &i.to_string(), "")), TooLarge, 1, Opening),
    ("no format", |d| drop(d.metadata.remove("format")), Malformed, 2, Opening),
    ("other format", |d| set(d, "format", "gguf"), Malformed, 2, Opening),
    ("no model", |d| drop(d.metadata.remove("model")), Missing, 2, Opening),
    ("no recipe", |d| drop(d.metadata.remove("recipe")), Missing, 2, Opening),
    ("no version", |d| drop(d.metadata.remove("version")), Missing, 2, Opening),
    ("version 1", |d| set(d, "version", "1.0"), Unsupported, 3, Opening),
    ("version 3", |d| set(d, "version", "3.0"), Unsupported, 3, Opening),
    ("version 20", |d| set(d, "version", "20.1"), Unsupported, 3, Opening),
    ("version with a sign", |d| set(d, "version", "2.+1"), Unsupported, 3, Opening),
    ("version with a leading zero", |d| set(d, "version", "2.01"), Unsupported, 3, Opening),
    ("version without a minor number", |d| set(d, "version", "2."), Unsupported, 3, Opening),
    ("version in words", |d| set(d, "version", "2.x"), Unsupported, 3, Opening),
    ("header checksum", |d| set(d, "checksum", "00"), Checksum, 4, Opening),
    ("layers are no JSON", |d| set(d, "layers", "["), Invalid, 5, Opening),
    ("layers are no list", |d| set(d, "layers", "{}"), Invalid, 5, Opening),
    ("wrong num_layers", |d| set(d, "num_layers", "7"), Invalid, 5, Opening),
    ("num_layers in words", |d| set(d, "num_layers", "eight"), Invalid, 5, Opening),
    ("two layers of one name", |d| d.layers[1]["name"] = "mdcsr.weight".into(), Invalid, 5, Opening),
    ("layer with the name of the metadata", |d| d.layers[1]["name"] = "__metadata__".into(), Invalid, 5, Opening),
    ("layer with the name of an array", |d| d.layers[1]["name"] = "layer_1_values".into(), Invalid, 5, Opening),
    ("layer with a line break in its name", |d| d.layers[1]["name"] = "a\nb".into(), Invalid, 5, Opening),
    ("layer with a name of 5000 bytes", |d| d.layers[1]["name"] = "n".repeat(5000).into(), TooLarge, 5, Opening),
    ("no rows", |d| d.layers[1]["rows"] = 0.into(), TooLarge, 5, Opening),
    ("too many rows", |d| d.layers[1]["rows"] = (1u64 << 25).into(), TooLarge, 5, Opening),
    ("too many columns", |d| d.layers[1]["cols"] = (1u64 << 21).into(), TooLarge, 5, Opening),
    ("rows overflow", |d| d.layers[1]["rows"] = u64::MAX.into(), TooLarge, 5, Opening),
    ("negative rows", |d| d.layers[1]["rows"] = (-1).into(), Invalid, 5, Opening),
    ("matrix too large", |d| both(d, 1, 1 << 17), TooLarge, 5, Opening),
    ("unknown encoding", |d| d.layers[1]["encoding"] = "q5".into(), Unsupported, 6, Opening),
    ("q8 without group", |d| drop_field(d, 1, "group"), Invalid, 6, Opening),
    ("q4 with group 48", |d| d.layers[2]["group"] = 48.into(), Invalid, 6, Opening),
    ("q4 with group 0", |d| d.layers[2]["group"] = 0.into(), Invalid, 6, Opening),
    ("mdcsr with group 0", |d| d.layers[0]["group"] = 0.into(), Invalid, 6, Opening),
    ("t3 with a group", |d| d.layers[4]["group"] = 64.into(), Invalid, 6, Opening),
    ("q8 with hadamard", |d| d.layers[1]["hadamard"] = 64.into(), Invalid, 6, Opening),
    ("s8 with group 32", |d| d.layers[6]["group"] = 32.into(), Invalid, 6, Opening),
    ("t2 without hadamard", |d| drop_field(d, 3, "hadamard"), Invalid, 6, Opening),
    ("t2 with hadamard 0", |d| d.layers[3]["hadamard"] = 0.into(), Invalid, 6, Opening),
    ("t2 with hadamard 32 for 70 columns", |d| d.layers[3]["hadamard"] = 32.into(), Invalid, 6, Opening),
    ("t2 with hadamard 128 for 70 columns", |d| d.layers[3]["hadamard"] = 128.into(), Invalid, 6, Opening),
    ("t2 with signs for every column", |d| resize(d, "layer_3_signs", &[9], 9), Shape, 7, Opening),
    ("array missing", |d| remove(d, "layer_1_values"), Missing, 7, Opening),
    ("array of another dtype", |d| d.tensor("layer_1_values").dtype = Dtype::U8, Shape, 7, Opening),
    ("array of another shape", |d| d.tensor("layer_1_values").shape = vec![2 * 128 * 64], Shape, 7, Opening),
    ("one scale too few", |d| resize(d, "layer_1_scales", &[ROWS - 1], 4 * ROWS - 4), Shape, 7, Opening),
    ("one strip too few", |d| resize(d, "layer_1_values", &[1, 128 * 64], 128 * 64), Shape, 7, Opening),
    ("only as many rows as there are", |d| resize(d, "layer_2_codes", &[ROWS, 48], ROWS * 48), Shape, 7, Opening),
    ("columns that no group has", |d| resize(d, "layer_2_codes", &[2, 32 * 70], 64 * 70), Shape, 7, Opening),
    ("prime indices row by row", |d| resize(d, "layer_1_prime_indices", &[128, 2], 256), Shape, 7, Opening),
    ("prime indices of a group too few", |d| resize(d, "layer_6_prime_indices", &[2, 1, 64], 128), Shape, 7, Opening),
    ("bitmap of a strip too few", |d| resize(d, "layer_7_bitmap", &[1, 1024], 1024), Shape, 7, Opening),
    ("one strip pointer too few", |d| resize(d, "layer_6_strip_pointers", &[2], 8), Shape, 7, Opening),
    ("no strip pointers", |d| remove(d, "layer_7_strip_pointers"), Missing, 7, Opening),
    ("group does not fit the arrays", |d| d.layers[1]["group"] = 32.into(), Shape, 7, Opening),
    ("codebook of 15", |d| resize(d, "layer_2_codebook", &[15], 15), Shape, 7, Opening),
    ("strip without tail", |d| resize(d, "layer_3_codes", &[2, 64 * 18], 2 * 64 * 18), Shape, 7, Opening),
    ("fewer deltas than values", |d| resize(d, "layer_0_delta_indices", &[3], 3), Shape, 7, Opening),
    ("fewer primes than values", |d| resize(d, "layer_0_prime_indices", &[3], 6), Shape, 7, Opening),
    ("kept tensor at an odd place", |d| shift(d, "model.norm.weight"), Malformed, 8, Opening),
    ("scale not a number", |d| word(d, "layer_2_scales", 1, f32::NAN.to_bits()), Invalid, 9, Opening),
    ("infinite scale", |d| word(d, "layer_5_scales", 1, f32::INFINITY.to_bits()), Invalid, 9, Opening),
    ("huge scale", |d| word(d, "layer_0_scales", 0, 1.9e19f32.to_bits()), Invalid, 9, Opening),
    ("first row pointer not 0", |d| word(d, "layer_0_row_pointers", 0, 1), Invalid, 10, Opening),
    ("row pointers descend", |d| word(d, "layer_0_row_pointers", 1, 3), Invalid, 10, Opening),
    ("row pointers end early", |d| word(d, "layer_0_row_pointers", ROWS, 3), Invalid, 10, Opening),
    ("first strip pointer not 0", |d| word(d, "layer_6_strip_pointers", 0, 1), Invalid, 10, Opening),
    ("strip pointers descend", |d| word(d, "layer_7_strip_pointers", 1, 6), Invalid, 10, Opening),
    ("strip pointers end early", |d| word(d, "layer_6_strip_pointers", 2, 5), Invalid, 10, Opening),
    ("strip pointer far outside", |d| word(d, "layer_7_strip_pointers", 2, u32::MAX), Invalid, 10, Opening),
    ("column outside", |d| d.tensor("layer_0_delta_indices").bytes[1] = 70, Invalid, 11, FirstUse),
    ("column twice", |d| d.tensor("layer_0_delta_indices").bytes[1] = 0, Invalid, 11, FirstUse),
    ("prime index 10,000", |d| d.tensor("layer_0_prime_indices").bytes[4] = 0x10, Invalid, 12, FirstUse),
    ("bit too many", |d| bytes(d, "layer_6_bitmap", &[(0, 3)]), Invalid, 13, FirstUse),
    ("bit too few", |d| bytes(d, "layer_7_bitmap", &[(0, 0)]), Invalid, 13, FirstUse),
    ("bit in another strip", |d| bytes(d, "layer_6_bitmap", &[(63, 0), (1024, 15 << 4)]), Invalid, 13, FirstUse),
    ("bit in another word", |d| bytes(d, "layer_7_bitmap", &[(63, 0), (0, 3)]), Invalid, 13, FirstUse),
    ("bit past the columns of a tile", |d| bytes(d, "layer_6_bitmap", &[(544, 1 << 2)]), Invalid, 13, FirstUse),
    ("bit past the last tile", |d| bytes(d, "layer_7_bitmap", &[(544, 0), (576, 2)]), Invalid, 13, FirstUse),
    ("bits past the rows of a word", |d| bytes(d, "layer_6_bitmap", &[(1024, 0), (1025, 7)]), Invalid, 13, FirstUse),
    ("bits past the last word", |d| bytes(d, "layer_7_bitmap", &[(1024, 0), (1032, 7)]), Invalid, 13, FirstUse),
    ("kept tensor of integers", |d| kept(d, "x", Dtype::I32), Unsupported, 14, Opening),
    ("a table for levels that are computed", |d| stray(d, "layer_3_level_table"), Unsupported, 14, Opening),
    ("codes of a layer that has none", |d| stray(d, "layer_7_values"), Unsupported, 14, Opening),
    ("row pointers of a layer that has strips", |d| stray(d, "layer_7_row_pointers"), Unsupported, 14, Opening),
    ("array of no layer", |d| kept(d, "layer_9_values", Dtype::F32), Unsupported, 14, Opening),
    ("tensor with the name of a layer", |d| kept(d, "q8.weight", Dtype::F32), Unsupported, 14, Opening),
    ("tokenizer of floats", |d| retype(d, "tokenizer.json"), Unsupported, 14, Opening),
    ("one weight changed", |d| stale(d, "layer_1_values"), Checksum, 15, Verifying),
    ("tokenizer changed", |d| stale(d, "tokenizer.json"), Checksum, 15, Verifying),
    ("checksum missing", |d| set(d, "checksums", "{}"), Checksum, 15, Verifying),
    ("no text as a checksum", |d| set(d, "checksums", r#"{"tokenizer.json":[]}"#), Invalid, 15, Verifying),
    ("checksum twice", |d| set(d, "checksums", r#"{"tokenizer.json":"","tokenizer.json":""}"#), Invalid, 15, Verifying),
    ("checksums no JSON", |d| set(d, "checksums", "x"), Invalid, 15, Verifying),
];

fn set(d: &mut Draft, key: &str, value: &str) {
    d.metadata.insert(key.into(), value.into());
}

fn drop_field(d: &mut Draft, layer: usize, field: &str) {
    d.layers[layer].as_object_mut().unwrap().remove(field);
}

fn both(d: &mut Draft, layer: usize, n: usize) {
    d.layers[layer]["rows"] = n.into();
    d.layers[layer]["cols"] = n.into();
}

fn remove(d: &mut Draft, name: &str) {
    d.tensors.retain(|t| t.name != name);
}

fn resize(d: &mut Draft, name: &str, shape: &[usize], bytes: usize) {
    let tensor = d.tensor(name);
    tensor.shape = shape.to_vec();
    tensor.bytes.resize(bytes, 0);
}

fn word(d: &mut Draft, name: &str, index: usize, value: u32) {
    d.tensor(name).bytes[4 * index..4 * index + 4].copy_from_slice(&value.to_le_bytes());
}

fn bytes(d: &mut Draft, name: &str, values: &[(usize, u8)]) {
    let bytes = &mut d.tensor(name).bytes;
    values.iter().for_each(|&(at, value)| bytes[at] = value);
}

fn kept(d: &mut Draft, name: &str, dtype: Dtype) {
    let tensor = d.tensor("model.norm.weight");
    (tensor.name, tensor.dtype) = (name.into(), dtype);
}

/// Adds a tensor without dimensions.
fn stray(d: &mut Draft, name: &str) {
    let mut tensor = d.tensor("tokenizer.json").clone();
    (tensor.name, tensor.shape) = (name.into(), Vec::new());
    tensor.bytes.truncate(1);
    d.tensors.push(tensor);
}

/// Puts one byte before the tensor: `Draft::bytes` puts larger elements first.
fn shift(d: &mut Draft, name: &str) {
    let mut odd = d.tensor("tokenizer.json").clone();
    (odd.name, odd.dtype, odd.shape) = ("upg_pad_0".into(), Dtype::U8, vec![1]);
    odd.bytes.truncate(1);
    odd.before = Some(name.into());
    d.tensors.push(odd);
}

fn retype(d: &mut Draft, name: &str) {
    let tensor = d.tensor(name);
    (tensor.dtype, tensor.shape) = (Dtype::F16, vec![1]);
}

/// Changes a byte but not its recorded checksum.
fn stale(d: &mut Draft, name: &str) {
    let sums = d.sealed()["checksums"].clone();
    set(d, "checksums", &sums);
    d.tensor(name).bytes[0] ^= 1;
}

fn open(path: &Path, bytes: &[u8]) -> Result<UpgFile, Error> {
    // A new file each time: the old one may still be mapped.
    let _ = std::fs::remove_file(path);
    std::fs::write(path, bytes).unwrap();
    UpgFile::open(path)
}

/// Decodes every layer to f32 bits.
fn decode(file: &UpgFile) -> Result<Vec<Vec<u32>>, Error> {
    (0..file.layers().len())
        .map(|id| {
            Ok(file
                .matrix(id)?
                .to_dense()
                .iter()
                .map(|w| w.to_bits())
                .collect())
        })
        .collect()
}

#[test]
fn the_undamaged_file_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let file = open(&folder.path().join("f"), &Draft::good().bytes()).unwrap();
    file.verify(&|_| ()).unwrap();
    let layers = decode(&file).unwrap();
    assert_eq!(layers.len(), 8);
    assert!(layers.iter().all(|l| l.len() == ROWS * COLS));
    assert_eq!(
        file.kept().map(|(name, ..)| name).collect::<Vec<_>>(),
        ["model.norm.weight"]
    );
    assert_eq!(file.tokenizer_json(), Some(&b"{}"[..]));
    assert_eq!(file.tokenizer_text().unwrap().as_deref(), Some("{}"));
    let model = UPGDecompressor::from_safetensors(file.path()).unwrap();
    let by_name = model.decompress_layer("q4.weight").unwrap();
    let by_number = model.decompress_layer(2).unwrap();
    assert_eq!(by_name.dims(), [ROWS, COLS]);
    let bits = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
    assert_eq!(bits(&by_name), bits(&by_number));
}

#[test]
fn a_tokenizer_is_copied_only_if_it_is_text_within_the_cap() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    for (bytes, kind) in [
        (vec![0xFF; 2], Malformed),
        (vec![b' '; MAX_TOKENIZER_BYTES + 1], TooLarge),
    ] {
        let mut draft = Draft::good();
        let tokenizer = draft.tensor("tokenizer.json");
        (tokenizer.shape, tokenizer.bytes) = (vec![bytes.len()], bytes);
        let file = open(&path, &draft.bytes()).unwrap();
        let e = file.tokenizer_text().unwrap_err();
        assert_eq!(e.kind(), kind, "{e}");
    }
}

#[test]
fn every_rule_has_a_bad_file_and_its_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let mut rules = std::collections::BTreeSet::new();
    for &(name, damage, kind, rule, when) in TABLE {
        let mut draft = Draft::good();
        damage(&mut draft);
        let (found, error) = match open(&path, &draft.bytes()) {
            Err(e) => (Opening, e),
            Ok(file) => match decode(&file) {
                Err(e) => (FirstUse, e),
                Ok(_) => (Verifying, file.verify(&|_| ()).expect_err(name)),
            },
        };
        let what = format!("{name}: {error:?}");
        assert_eq!(
            (error.kind(), error.broken_rule(), found),
            (kind, Some(rule), when),
            "{what}"
        );
        assert!(!error.to_string().contains('\n'), "{what}");
        rules.insert(rule);
    }
    assert!(rules.into_iter().eq(1..=15));
}

#[test]
fn what_is_no_safetensors_file_breaks_rule_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let huge_header = [u64::MAX.to_le_bytes().as_slice(), b"{}"].concat();
    let huge_offsets = {
        let entry = |begin: u64| {
            format!(
                r#""dtype":"U8","shape":[{s}],"data_offsets":[{begin},{e}]"#,
                s = 1u64 << 60,
                e = begin + (1 << 60)
            )
        };
        let tensors: Vec<String> = (0..15)
            .map(|i| format!("\"t{i}\":{{{}}}", entry(i << 60)))
            .collect();
        let header = format!("{{{}}}", tensors.join(","));
        [
            (header.len() as u64).to_le_bytes().as_slice(),
            header.as_bytes(),
        ]
        .concat()
    };
    for bytes in [b"".as_slice(), b"GGUF", &huge_header, &huge_offsets] {
        let e = open(&path, bytes).map(drop).unwrap_err();
        assert_eq!((e.kind(), e.broken_rule()), (Malformed, Some(1)), "{e:?}");
    }
}

#[test]
fn truncated_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let good = Draft::good().bytes();
    for len in (0..good.len()).step_by(64).chain([good.len() - 1]) {
        let e = open(&path, &good[..len]).map(drop).unwrap_err();
        assert_eq!(e.kind(), Malformed, "{len}: {e:?}");
    }
    let longer = [good.as_slice(), &[0]].concat();
    assert_eq!(
        open(&path, &longer).map(drop).unwrap_err().kind(),
        Malformed
    );
}

#[test]
fn ten_thousand_byte_flips_give_an_error_or_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let good = Draft::good().bytes();
    let expected = decode(&open(&path, &good).unwrap()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (mut refused_open, mut refused_verify, mut same) = (0, 0, 0);
    for _ in 0..10_000 {
        let mut bytes = good.clone();
        let at = rng.next_u64() as usize % bytes.len();
        bytes[at] ^= 1 << (rng.next_u32() % 8);
        let Ok(file) = open(&path, &bytes) else {
            refused_open += 1;
            continue;
        };
        // Without verification the weights may differ, but nothing may panic.
        let decoded = decode(&file);
        if file.verify(&|_| ()).is_err() {
            refused_verify += 1;
        } else {
            assert_eq!(decoded.unwrap(), expected, "byte {at}");
            same += 1;
        }
    }
    println!(
        "{refused_open} refused at opening, {refused_verify} by verify, {same} without effect"
    );
    assert!(refused_open > 1000 && refused_verify > 100);
}

/// Damage with matching checksums reaches checks that the byte flips above cannot.
#[test]
fn ten_thousand_changes_with_new_checksums_give_an_error_or_weights() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f");
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (mut refused, mut decoded) = (0, 0);
    for _ in 0..10_000 {
        let mut draft = Draft::good();
        for _ in 0..1 + rng.next_u32() % 2 {
            change(&mut draft, &mut rng);
        }
        let weights = open(&path, &draft.bytes()).and_then(|file| {
            let weights = decode(&file)?;
            file.verify(&|_| ())?;
            Ok(weights)
        });
        match weights {
            Ok(weights) => {
                // Rule 9: nothing overflows for any codes.
                let finite = |bits: &u32| f32::from_bits(*bits).is_finite();
                assert!(weights.iter().flatten().all(finite));
                decoded += 1;
            }
            Err(e) => {
                assert!(e.broken_rule().is_some(), "{e:?}");
                refused += 1;
            }
        }
    }
    println!("{refused} refused, {decoded} decoded");
    assert!(refused > 1000 && decoded > 1000);
}

/// Makes one random change of a description, a name, a shape or data.
fn change(draft: &mut Draft, rng: &mut ChaCha8Rng) {
    const NUMBERS: [u64; 12] = [
        0,
        1,
        2,
        3,
        32,
        63,
        64,
        70,
        128,
        1 << 20,
        u32::MAX as u64,
        u64::MAX,
    ];
    const NAMES: [&str; 8] = [
        "",
        "__metadata__",
        "layer_0_values",
        "layer_3_codes",
        "tokenizer.json",
        "upg_pad_0",
        "w",
        "\u{85}",
    ];
    let mut pick = |n: usize| rng.next_u64() as usize % n;
    let number = NUMBERS[pick(NUMBERS.len())];
    let (layer, tensor) = (pick(draft.layers.len()), pick(draft.tensors.len()));
    match pick(8) {
        0 => {
            let field = ["rows", "cols", "group", "hadamard"][pick(4)];
            draft.layers[layer][field] = number.into();
        }
        1 => {
            let encoding = Encoding::ALL[pick(Encoding::ALL.len())];
            draft.layers[layer]["encoding"] = encoding.name().into();
        }
        2 => draft.layers[layer]["name"] = NAMES[pick(8)].into(),
        3 => draft.tensors[tensor].name = NAMES[pick(8)].into(),
        4 => {
            use Dtype::{BF16, F32, F64, I8, U8, U16, U32};
            draft.tensors[tensor].dtype = [BF16, F32, F64, I8, U8, U16, U32][pick(7)];
        }
        5 => {
            let shape = &mut draft.tensors[tensor].shape;
            match (pick(3), shape.len()) {
                (0, _) => shape.push(1),
                (1, 1..) => drop(shape.pop()),
                (_, 1..) => shape[0] = number as usize,
                (..) => {}
            }
        }
        6 => drop(draft.tensors.remove(tensor)),
        _ => {
            let bytes = &mut draft.tensors[tensor].bytes;
            let at = pick(bytes.len());
            bytes[at] = number as u8;
        }
    }
}

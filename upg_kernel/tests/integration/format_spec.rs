//! Examples of `upg_format_v2.md`, read from its text.

use safetensors::Dtype;
use std::collections::BTreeMap;
use upg_kernel::format::{Encoding, FileWriter, LayerInfo, UpgFile};
use upg_kernel::{LayerId, UPGDecompressor};

/// One fenced `example` block.
struct Example {
    info: LayerInfo,
    arrays: Vec<(String, Vec<u8>)>,
    weights: Vec<(usize, usize, f32)>,
}

fn parse(block: &str) -> Example {
    let mut lines = block.lines();
    let mut head = lines.next().unwrap().split_whitespace();
    let encoding: Encoding = head.next().unwrap().parse().unwrap();
    let mut number = || head.next().unwrap().parse().unwrap();
    let mut info = LayerInfo::new("w", number(), number(), encoding);
    for parameter in head {
        match parameter.split_once('=').unwrap() {
            ("group", value) => info.group = Some(value.parse().unwrap()),
            ("hadamard", value) => info.hadamard = Some(value.parse().unwrap()),
            other => panic!("{other:?}"),
        }
    }
    let mut example = Example {
        info,
        arrays: Vec::new(),
        weights: Vec::new(),
    };
    for line in lines {
        let (name, rest) = line.split_once(' ').unwrap();
        if name == "weights" {
            example.weights = rest.split_whitespace().map(parse_weight).collect();
        } else {
            example.arrays.push((name.to_owned(), parse_bytes(rest)));
        }
    }
    example
}

/// Parses bytes such as `00*61 7F`.
fn parse_bytes(text: &str) -> Vec<u8> {
    let run = |item: &str| {
        let (byte, times) = item.split_once('*').unwrap_or((item, "1"));
        vec![u8::from_str_radix(byte, 16).unwrap(); times.parse().unwrap()]
    };
    text.split_whitespace().flat_map(run).collect()
}

/// Parses `row,column=weight`.
fn parse_weight(text: &str) -> (usize, usize, f32) {
    let (place, weight) = text.split_once('=').unwrap();
    let (row, column) = place.split_once(',').unwrap();
    (
        row.parse().unwrap(),
        column.parse().unwrap(),
        weight.parse().unwrap(),
    )
}

/// Returns dtype and shape of an array according to rule 7.
fn described(info: &LayerInfo, name: &str, len: usize) -> (Dtype, Vec<usize>) {
    let encoding = info.encoding().unwrap();
    let strips = info.rows.div_ceil(64);
    let by_strip = vec![strips, len / strips];
    match (encoding, name) {
        (_, "scales") => (Dtype::F32, vec![info.rows]),
        (_, "row_pointers") => (Dtype::U32, vec![info.rows + 1]),
        (_, "strip_pointers") => (Dtype::U32, vec![strips + 1]),
        (_, "codebook") => (Dtype::I8, vec![len]),
        (_, "signs") => (Dtype::U8, vec![len]),
        (Encoding::MdCsr, "values") | (Encoding::S8, "values") => (Dtype::I8, vec![len]),
        (Encoding::MdCsr, "prime_indices") => (Dtype::U16, vec![len / 2]),
        (Encoding::MdCsr, "delta_indices") | (Encoding::S4, "codes") => (Dtype::U8, vec![len]),
        (Encoding::T2 | Encoding::T3 | Encoding::T4, "prime_indices") => (Dtype::U8, vec![len, 1]),
        (_, "values") => (Dtype::I8, by_strip),
        (_, "codes" | "bitmap") => (Dtype::U8, by_strip),
        (_, "prime_indices") => (Dtype::U8, vec![strips, len / strips / 64, 64]),
        other => panic!("{other:?}"),
    }
}

fn required_metadata() -> BTreeMap<String, String> {
    ["model", "compression_ratio", "bits_per_weight", "recipe"]
        .map(|key| (key.to_owned(), "{}".to_owned()))
        .into()
}

#[test]
fn every_encoding_has_an_example_that_decodes_as_it_says() {
    let text = include_str!("../../../upg_format_v2.md");
    let examples: Vec<Example> = text
        .split("```example ")
        .skip(1)
        .map(|rest| parse(rest.split("```").next().unwrap().trim_end()))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    for example in &examples {
        let path = folder.path().join("example.safetensors");
        let mut writer = FileWriter::create(&path, 8192).unwrap();
        for (name, bytes) in &example.arrays {
            let (dtype, shape) = described(&example.info, name, bytes.len());
            writer
                .tensor(&format!("layer_0_{name}"), dtype, &shape, bytes)
                .unwrap();
        }
        writer
            .finish(required_metadata(), std::slice::from_ref(&example.info))
            .unwrap();

        let mut expected = vec![0.0f32; example.info.rows * example.info.cols];
        for &(row, column, weight) in &example.weights {
            expected[row * example.info.cols + column] = weight;
        }
        let mut decoded = vec![f32::NAN; expected.len()];
        let model = UPGDecompressor::from_safetensors(&path).unwrap();
        model
            .decompress_layer_into(LayerId::Number(0), &mut decoded)
            .unwrap();
        let name = example.info.encoding_name();
        assert_eq!(decoded, expected, "{name}");
        UpgFile::open(&path).unwrap().verify(&|_| ()).unwrap();
        seen.push(name.to_owned());
    }
    seen.sort();
    seen.dedup();
    let mut all = Encoding::ALL.map(Encoding::name);
    all.sort();
    assert_eq!(seen, all);
}

//! Errors of decompressed weights, for real and Gaussian ones, with every encoding,
//! through a file.

use crate::common::{gaussian, layer, relative_error, smollm2_gguf};
use candle_core::DType;
use std::collections::BTreeMap;
use std::path::Path;
use upg_compress::encode::encode_matrix;
use upg_compress::source;
use upg_kernel::UPGDecompressor;
use upg_kernel::format::{Encoding, FileWriter, header_capacity};
use upg_kernel::matrix::Matrix;

/// Maximum error of `q8`, `s8` and `mdcsr` on every tensor.
const ONE_PERCENT: f64 = 0.01;

/// Maximum errors of Gaussian weights at 2, 3 and 4 bits, in dB of squared error.
///
/// The theoretical limits are -12.04, -18.06 and -24.08.
const TRELLIS_DECIBELS: [(Encoding, f64); 3] = [
    (Encoding::T2, -11.4),
    (Encoding::T3, -17.1),
    (Encoding::T4, -22.3),
];

/// Returns the relative Frobenius error on real weights that a change must not exceed.
///
/// Measured on the tensors below, the largest of each: see the table that the test prints.
fn largest_error(encoding: Encoding) -> f64 {
    match encoding {
        Encoding::MdCsr => 0.00002,
        Encoding::Q8 | Encoding::S8 => ONE_PERCENT,
        Encoding::Q4 => 0.095,
        Encoding::S4 => 0.1,
        Encoding::T2 => 0.29,
        Encoding::T3 => 0.17,
        Encoding::T4 => 0.11,
        other => panic!("no bound for {other}"),
    }
}

struct Weights {
    name: String,
    rows: usize,
    cols: usize,
    values: Vec<f32>,
}

impl Weights {
    /// Returns the weights with the smaller half of each row as exact zeros.
    fn pruned(&self) -> Self {
        let mut values = self.values.clone();
        for row in values.chunks_exact_mut(self.cols) {
            let mut sizes: Vec<f32> = row.iter().map(|w| w.abs()).collect();
            sizes.sort_by(f32::total_cmp);
            let median = sizes[self.cols / 2];
            row.iter_mut()
                .filter(|w| w.abs() < median)
                .for_each(|w| *w = 0.0);
        }
        Self {
            name: self.name.clone(),
            values,
            ..*self
        }
    }
}

/// Writes `weights` to a file in this encoding and reads them back.
fn through_a_file(folder: &Path, weights: &Weights, encoding: Encoding) -> Vec<f32> {
    let mut layer = layer(&weights.name, weights.rows, weights.cols, encoding);
    let matrix = encode_matrix(&weights.values, &layer, 0, None, &()).unwrap();
    if let Matrix::Trellis(m) = &matrix {
        layer.hadamard = Some(m.parts().rotation.size());
    }
    let metadata: BTreeMap<String, String> =
        ["model", "compression_ratio", "bits_per_weight", "recipe"]
            .map(|key| (key.to_owned(), "{}".to_owned()))
            .into();
    let path = folder.join("weights.safetensors");
    let layers = [layer];
    let capacity = header_capacity(&layers, [].into_iter(), &metadata).unwrap();
    let mut writer = FileWriter::create(&path, capacity).unwrap();
    writer.layer(0, &layers[0], &matrix).unwrap();
    writer.finish(metadata, &layers).unwrap();

    let file = UPGDecompressor::from_safetensors(&path).unwrap();
    let tensor = file
        .decompress_layer_as(weights.name.as_str(), DType::F32)
        .unwrap();
    assert_eq!(tensor.dims(), [weights.rows, weights.cols]);
    // By default it is the same, rounded to BF16.
    let rounded = file.decompress_layer(0).unwrap();
    let expected = tensor.to_dtype(DType::BF16).unwrap();
    let bits = |t: candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
    assert_eq!(bits(rounded), bits(expected));
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// One matrix of every kind, from an early and a late block, and rows of the embedding.
fn real_weights() -> Vec<Weights> {
    let source = source::open(smollm2_gguf()).unwrap();
    let wanted = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.29.mlp.gate_proj.weight",
        "model.layers.29.mlp.up_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
    ];
    let weights = |name: &&str| {
        let index = source.tensors().iter().position(|t| t.name == *name);
        let index = index.unwrap_or_else(|| panic!("no {name}"));
        let tensor = &source.tensors()[index];
        let rows = tensor.rows().min(1024);
        Weights {
            name: (*name).to_owned(),
            rows,
            cols: tensor.cols(),
            values: source.read_rows_f32(index, 0..rows).unwrap(),
        }
    };
    wanted.iter().map(weights).collect()
}

#[test]
fn test_decompress_accuracy() {
    let folder = tempfile::tempdir().unwrap();
    for weights in real_weights() {
        for encoding in Encoding::ALL {
            let weights = match encoding {
                Encoding::S8 | Encoding::S4 => weights.pruned(),
                _ => Weights {
                    name: weights.name.clone(),
                    values: weights.values.clone(),
                    ..weights
                },
            };
            let decoded = through_a_file(folder.path(), &weights, encoding);
            let found = relative_error(&decoded, &weights.values);
            println!(
                "{encoding:6} {:>8.4} %  {} [{}, {}]",
                100.0 * found,
                weights.name,
                weights.rows,
                weights.cols
            );
            assert!(
                found < largest_error(encoding),
                "{encoding} {}: {found}",
                weights.name
            );
            if matches!(encoding, Encoding::S8 | Encoding::S4 | Encoding::MdCsr) {
                let mut pairs = weights.values.iter().zip(&decoded);
                assert!(
                    pairs.all(|(&w, &d)| w != 0.0 || d == 0.0),
                    "{encoding}: a zero was lost"
                );
            }
        }
    }
}

#[test]
fn trellis_codes_reach_their_error_on_gaussian_weights() {
    let (rows, cols) = (256, 1024);
    let weights = Weights {
        name: "gaussian".into(),
        rows,
        cols,
        values: gaussian(rows * cols, 11),
    };
    let folder = tempfile::tempdir().unwrap();
    for (encoding, bound) in TRELLIS_DECIBELS {
        let decoded = through_a_file(folder.path(), &weights, encoding);
        let decibels = 20.0 * relative_error(&decoded, &weights.values).log10();
        println!("{encoding}: {decibels:.2} dB");
        assert!(decibels <= bound, "{encoding}: {decibels}");
    }
}

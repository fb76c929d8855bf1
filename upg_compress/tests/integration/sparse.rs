//! Models with many zeros, and models that are pruned.

use crate::common::{calibration, model_file};
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize};
use std::path::Path;
use upg_compress::{Choice, CompressOptions, CompressReport, Source, Sparse, compress, source};
use upg_kernel::format::{Encoding, UpgFile};
use upg_kernel::inference::LayerInput;
use upg_kernel::{Error, ErrorKind};

const UP: &str = "model.layers.0.mlp.up_proj.weight";
const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

/// Creates a tiny model with many zeros.
///
/// Every second weight of `UP` and every fourth one of `DOWN` is nonzero.
fn pruned(folder: &Path) -> Box<dyn Source> {
    std::fs::copy(
        model_file("qwen3", "config.json"),
        folder.join("config.json"),
    )
    .unwrap();
    let bytes = std::fs::read(model_file("qwen3", "model.safetensors")).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (name, tensor) in model.tensors() {
        let mut bytes = tensor.data().to_vec();
        let each = match name.as_str() {
            UP => 2,
            DOWN => 4,
            _ => 1,
        };
        let size = tensor.dtype().bitsize() / 8;
        for (i, weight) in bytes.chunks_exact_mut(size).enumerate() {
            if i % each != 0 {
                weight.fill(0);
            }
        }
        tensors.push((name, tensor.dtype(), tensor.shape().to_vec(), bytes));
    }
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let path = folder.join("model.safetensors");
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
    source::open(folder).unwrap()
}

fn run(source: &dyn Source, options: &CompressOptions) -> Result<(UpgFile, CompressReport), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.safetensors");
    let report = compress(source, &path, options, &())?;
    Ok((UpgFile::open(&path)?, report))
}

fn encoding(report: &CompressReport, name: &str) -> Encoding {
    let layer = report.layers.iter().find(|l| l.name == name).unwrap();
    layer.encoding().unwrap()
}

/// Returns which weights of a matrix are zero: in the source, and in the file.
fn zeros(source: &dyn Source, file: &UpgFile, name: &str) -> [Vec<bool>; 2] {
    let of = |w: Vec<f32>| w.iter().map(|w| *w == 0.0).collect();
    let index = source
        .tensors()
        .iter()
        .position(|t| t.name == name)
        .unwrap();
    let layer = file.layers().iter().position(|l| l.name == name).unwrap();
    [
        of(source.read_f32(index).unwrap()),
        of(file.matrix(layer).unwrap().to_dense()),
    ]
}

#[test]
fn matrices_with_many_zeros_are_stored_by_them() {
    let folder = tempfile::tempdir().unwrap();
    let source = pruned(folder.path());
    for (dense, sparse) in [(Encoding::Q8, Encoding::S8), (Encoding::Q4, Encoding::S4)] {
        let mut options = CompressOptions::new(Choice::Encode(dense));
        let (file, report) = run(source.as_ref(), &options).unwrap();
        for layer in &report.layers {
            let expected = match layer.name.as_str() {
                UP | DOWN => sparse,
                "model.embed_tokens.weight" | "lm_head.weight" => Encoding::Q8,
                _ => dense,
            };
            assert_eq!(layer.encoding().unwrap(), expected, "{}", layer.name);
        }
        for name in [UP, DOWN] {
            let [expected, found] = zeros(source.as_ref(), &file, name);
            assert_eq!(expected, found, "{name}");
        }
        let zeros = report.zeros.unwrap();
        assert_eq!((zeros.matrices, zeros.share()), (2, 0.625));
        assert!(
            file.metadata("recipe")
                .unwrap()
                .contains(r#""sparse":"auto""#)
        );

        options.sparse = Sparse::Never;
        let (_, report) = run(source.as_ref(), &options).unwrap();
        assert_eq!((encoding(&report, UP), report.zeros), (dense, None));
    }
    let options = CompressOptions::new(Choice::Encode(Encoding::T3));
    let (_, report) = run(source.as_ref(), &options).unwrap();
    assert_eq!(encoding(&report, UP), Encoding::T3);
}

#[test]
fn layers_are_pruned_to_a_share() {
    let folder = tempfile::tempdir().unwrap();
    let source = pruned(folder.path());
    let mut options = CompressOptions::new(Choice::Encode(Encoding::Q8));
    options.calibration = Some(calibration("qwen3"));
    options.overrides = vec!["*.1.self_attn.q_proj.weight=t3".parse().unwrap()];
    options.prune = Some(0.6);
    let (file, report) = run(source.as_ref(), &options).unwrap();
    for layer in &report.layers {
        let [before, after] = zeros(source.as_ref(), &file, &layer.name);
        let share = after.iter().filter(|zero| **zero).count() as f64 / after.len() as f64;
        match layer.encoding().unwrap() {
            Encoding::S8 => {
                let expected = if layer.name == DOWN { 0.75 } else { 0.6 };
                assert!((share - expected).abs() < 0.01, "{}: {share}", layer.name);
                assert!(
                    before.iter().zip(&after).all(|(b, a)| *a || !*b),
                    "{}",
                    layer.name
                );
                assert!(layer.error.unwrap() > 0.0, "{}", layer.name);
            }
            _ => {
                let exempt = LayerInput::of(&layer.name).is_none() || layer.name.contains("q_proj");
                assert!(exempt, "{}", layer.name);
            }
        }
    }
    assert!(file.metadata("recipe").unwrap().contains(r#""prune":0.6"#));
}

#[test]
fn pruning_that_cannot_be_done_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = pruned(folder.path());
    let calibration = calibration("qwen3");
    for (encoding, prune, calibrated, message) in [
        (Encoding::S8, 0.5, false, "without a calibration text"),
        (Encoding::S8, 1.5, true, "a share of 1.5"),
        (Encoding::T3, 0.5, true, "no matrix that is stored sparsely"),
    ] {
        let mut options = CompressOptions::new(Choice::Encode(encoding));
        options.calibration = calibrated.then(|| calibration.clone());
        options.prune = Some(prune);
        let e = run(source.as_ref(), &options).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Argument);
        assert!(e.to_string().contains(message), "{e}");
    }
}

/// A row of small weights with one large weight: with a level above 0 for each, all would be large.
#[test]
fn a_matrix_whose_row_an_outlier_would_ruin_stays_dense() {
    let folder = tempfile::tempdir().unwrap();
    drop(pruned(folder.path()));
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let model = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = model.tensor(UP).unwrap().data();
    // The last weight but one of the matrix is not zero.
    let at = tensor.as_ptr().addr() - bytes.as_ptr().addr() + tensor.len() - 4;
    let mut changed = bytes.clone();
    changed[at..at + 2].copy_from_slice(&bf16::from_f32(1e8).to_le_bytes());
    std::fs::write(&path, changed).unwrap();
    let source = source::open(folder.path()).unwrap();
    for (dense, sparse) in [(Encoding::Q4, Encoding::S4), (Encoding::Q8, Encoding::S8)] {
        let options = CompressOptions::new(Choice::Encode(dense));
        let (_, report) = run(source.as_ref(), &options).unwrap();
        assert_eq!(encoding(&report, UP), dense);
        assert_eq!(encoding(&report, DOWN), sparse);
    }
}

use super::*;
use crate::source::FloatType;
use safetensors::SafeTensors;

/// From the pruned weights of the witness, which computes in f64.
const TOLERANCE: f32 = 2e-4;

struct Witness {
    weights: Vec<f32>,
    pruned: Vec<f32>,
    hessian: Hessian,
}

const COLS: usize = 150;

/// `tests/data/make_sparsegpt.py`: SparseGPT as its authors wrote it.
fn witness() -> Witness {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/sparsegpt.safetensors"
    );
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str, float: FloatType| -> Vec<f32> {
        let bytes = tensors.tensor(name).unwrap().data();
        let mut values = vec![0.0; bytes.len() / float.size()];
        float.to_f32(bytes, &mut values).unwrap();
        values
    };
    let halves = |name: &str| floats(name, FloatType::F16);
    let mut hessian = Hessian::new(COLS);
    hessian.add(&halves("inputs")).unwrap();
    Witness {
        weights: halves("weights"),
        pruned: floats("pruned", FloatType::F32),
        hessian,
    }
}

fn zeros(weights: &[f32]) -> usize {
    weights.iter().filter(|w| **w == 0.0).count()
}

#[test]
fn weights_are_those_of_sparsegpt() {
    let Witness {
        weights,
        pruned,
        hessian,
    } = witness();
    let rows = weights.len() / COLS;
    let found = prune(&weights, rows, COLS, 0.5, &hessian).unwrap();
    // Half of the first 128 columns, half of the other 22.
    assert_eq!(zeros(&found), rows * COLS / 2);
    let same = found
        .iter()
        .zip(&pruned)
        .filter(|(a, b)| (**a == 0.0) == (**b == 0.0));
    assert_eq!(same.count(), weights.len());
    for (a, b) in found.iter().zip(&pruned) {
        assert!((a - b).abs() < TOLERANCE, "{a} {b}");
    }
}

#[test]
fn the_result_does_not_depend_on_threads() {
    let Witness {
        weights, hessian, ..
    } = witness();
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let prune = || prune(&weights, weights.len() / COLS, COLS, 0.7, &hessian).unwrap();
        pool.build().unwrap().install(prune)
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn zeros_stay_also_where_they_are_more_than_asked_for() {
    let Witness {
        mut weights,
        hessian,
        ..
    } = witness();
    let rows = weights.len() / COLS;
    for (i, weight) in weights.iter_mut().enumerate() {
        if i % 3 != 0 {
            *weight = 0.0;
        }
    }
    let pruned = prune(&weights, rows, COLS, 0.1, &hessian).unwrap();
    assert_eq!(pruned, weights);
    let pruned = prune(&weights, rows, COLS, 0.8, &hessian).unwrap();
    assert_eq!(zeros(&pruned), rows * COLS * 8 / 10);
    assert!(
        weights
            .iter()
            .zip(&pruned)
            .all(|(w, p)| *w != 0.0 || *p == 0.0)
    );
}

#[test]
fn what_cannot_be_pruned_is_refused() {
    let hessian = Hessian::new(8);
    for sparsity in [0.0, 1.0, -0.5, 50.0, f64::NAN] {
        let e = prune(&[1.0; 16], 2, 8, sparsity, &hessian).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument, "{e}");
    }
    for (weights, rows, cols) in [(15, 2, 8), (18, 2, 9)] {
        let e = prune(&vec![1.0; weights], rows, cols, 0.5, &hessian).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Shape, "{e}");
    }
    assert!(prune(&[], 0, 8, 0.5, &hessian).unwrap().is_empty());
}

use super::*;
use crate::kernels::Kernels;
use crate::matrix::{DenseMatrix, DenseValues};

fn dense(rows: usize, cols: usize, weights: &[f32], bias: Option<&[f32]>) -> Linear {
    let values = DenseValues::F32(weights.to_vec().into());
    Linear {
        weight: Matrix::Dense(DenseMatrix::new(rows, cols, values).unwrap()),
        bias: bias.map(<[f32]>::to_vec),
    }
}

#[test]
fn a_fused_matrix_gives_what_its_parts_give() {
    let weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    let bias = [0.5, -0.5, 10.0];
    let fused = vec![dense(3, 2, &weights, Some(&bias))];
    let split = vec![
        dense(2, 2, &weights[..4], Some(&bias[..2])),
        dense(1, 2, &weights[4..], Some(&bias[2..])),
    ];
    let cpu = Cpu::shared().unwrap();
    let x = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
    let expected = [1.5, 2.5, 15.0, 2.5, 3.5, 16.0, 3.5, 6.5, 21.0];
    for parts in [fused, split] {
        let mut out = [f32::NAN; 9];
        let scratch = &mut product::Scratch::default();
        linear(cpu, &parts, &x, 3, Write::Set, scratch, &mut out).unwrap();
        assert_eq!(out, expected);
    }
}

#[test]
fn a_product_is_added_to_what_is_there() {
    let part = [dense(2, 1, &[1.0, 2.0], Some(&[0.5, 0.25]))];
    let cpu = Cpu::shared().unwrap();
    let mut out = [10.0, 20.0];
    let scratch = &mut product::Scratch::default();
    linear(cpu, &part, &[3.0], 1, Write::Add, scratch, &mut out).unwrap();
    assert_eq!(out, [13.5, 26.25]);
}

#[test]
fn norm_and_silu_by_hand() {
    let norm = Norm {
        gain: vec![1.0, 2.0],
        eps: 0.5,
    };
    // Mean square 12.5, plus 0.5: a scale of 1 / sqrt(13).
    let scale = 13f32.sqrt();
    for kernels in Kernels::available() {
        let cpu = &Cpu::new(kernels, 2);
        let mut out = Vec::new();
        norm_rows(cpu, &norm, &[3.0, 4.0], &mut out);
        assert_eq!(out, [3.0 / scale, 8.0 / scale]);
        gated_silu(cpu, &[0.0, 1.0, -100.0, 5.0, 2.0, 3.0], 3, &mut out);
        assert_eq!(out[0], 0.0);
        assert!((out[1] - 2.0 * 0.731_058_6).abs() < 1e-6);
        assert!(out[2].abs() < 1e-30);
    }
}

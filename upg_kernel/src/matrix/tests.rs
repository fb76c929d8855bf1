//! Methods that all encodings share.

use super::*;
use crate::test_data::grouped;

fn q8(rows: usize, cols: usize) -> Matrix {
    let scales = vec![0.5; rows];
    Matrix::Grouped(grouped(rows, cols, 64, false))
        .with_scales(scales)
        .unwrap()
}

#[test]
fn rows_are_gathered_in_any_order_and_more_than_once() {
    let (rows, cols) = (70, 33);
    let dense: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
    let sparse = MdCSRMatrix::from_dense(&dense, rows, cols).unwrap();
    let dense = DenseMatrix::new(rows, cols, DenseValues::F32(dense.into())).unwrap();
    for matrix in [q8(rows, cols), Matrix::MdCsr(sparse), Matrix::Dense(dense)] {
        let all = matrix.to_dense();
        for numbers in [&[][..], &[69], &[3, 64, 3, 0, 63]] {
            let mut out = vec![f32::NAN; numbers.len() * cols];
            matrix.gather(numbers, &mut out).unwrap();
            for (row, out) in numbers.iter().zip(out.chunks(cols)) {
                assert_eq!(out, &all[*row as usize * cols..][..cols]);
            }
        }
    }
}

#[test]
fn rows_that_the_matrix_does_not_have_are_not_gathered() {
    let matrix = q8(70, 33);
    for (numbers, len) in [
        (&[70][..], 33),
        (&[u32::MAX], 33),
        (&[0], 32),
        (&[0, 1], 33),
    ] {
        let e = matrix.gather(numbers, &mut vec![0.0; len]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument);
    }
}

#[test]
fn scales_are_exchanged_and_checked() {
    let (rows, cols) = (70, 33);
    let dense: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
    let sparse = MdCSRMatrix::from_dense(&dense, rows, cols).unwrap();
    let scales: Vec<f32> = (0..rows).map(|row| row as f32 - 3.5).collect();
    for matrix in [q8(rows, cols), Matrix::MdCsr(sparse)] {
        let before = matrix.to_dense();
        let old = matrix.scales().unwrap().to_vec();
        let other = matrix.with_scales(scales.clone()).unwrap();
        assert_eq!(other.scales().unwrap()[..], scales[..]);
        let rows_of = other.to_dense();
        for (row, decoded) in rows_of.chunks_exact(cols).enumerate() {
            for (new, was) in decoded.iter().zip(&before[row * cols..]) {
                let expected = was / old[row] * scales[row];
                assert!((new - expected).abs() <= 1e-5 * expected.abs());
            }
        }
        // The one that it was made of is as before.
        assert_eq!(matrix.to_dense(), before);
        let kind = |scales: Vec<f32>| matrix.with_scales(scales).unwrap_err().kind();
        assert_eq!(kind(vec![1.0; rows - 1]), ErrorKind::Shape);
        assert_eq!(kind(vec![f32::NAN; rows]), ErrorKind::Invalid);
    }
    let dense = DenseMatrix::new(rows, cols, DenseValues::F32(dense.into())).unwrap();
    let e = Matrix::Dense(dense).with_scales(scales).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
}

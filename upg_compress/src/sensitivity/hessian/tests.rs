use super::*;
use crate::encode::rotation;

/// Dependent inputs: every value contains a part of the previous one.
fn inputs(n: usize, cols: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut noise = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut x = Vec::with_capacity(n * cols);
    for _ in 0..n {
        let mut last = 0.0;
        for _ in 0..cols {
            last = 0.8 * last + noise();
            x.push(last);
        }
    }
    x
}

fn of(x: &[f32], cols: usize) -> Hessian {
    let mut hessian = Hessian::new(cols);
    hessian.add(x).unwrap();
    hessian
}

#[track_caller]
fn assert_close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-5 * a.abs().max(b.abs()), "{a} and {b}");
}

#[test]
fn sums_of_products_by_hand() {
    let mut hessian = of(&[1.0, 2.0, 3.0, -1.0], 2);
    hessian.add(&[0.5, 0.0]).unwrap();
    assert_eq!((hessian.cols(), hessian.count()), (2, 3));
    let found = hessian.symmetric();
    let found = [found[(0, 0)], found[(0, 1)], found[(1, 0)], found[(1, 1)]];
    assert_eq!(found, [10.25, -1.0, -1.0, 5.0]);
    // (1, 2) H (1, 2)^T and (3, 0) H (3, 0)^T
    assert_close(hessian.cost(&[1.0, 2.0, 3.0, 0.0]), 26.25 + 92.25);
}

#[test]
fn sums_and_factors_do_not_depend_on_threads() {
    let cols = 300;
    let x = inputs(500, cols);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let hessian = of(&x, cols);
            let feedback = Feedback::new(&hessian, 4).unwrap();
            (hessian.symmetric(), feedback.shares, feedback.costs)
        })
    };
    let one = with(1);
    assert!([2, 3, 5].into_iter().all(|threads| with(threads) == one));
}

#[test]
fn what_is_no_input_is_refused() {
    let mut hessian = Hessian::new(3);
    assert_eq!(hessian.add(&[1.0; 4]).unwrap_err().kind(), ErrorKind::Shape);
    let e = hessian.add(&[0.0, 1.0, f32::INFINITY]).unwrap_err();
    assert!(
        e.kind() == ErrorKind::Invalid && e.to_string().contains("column 2"),
        "{e}"
    );
    assert_eq!(hessian.count(), 0);
    let e = Feedback::new(&hessian, 0).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
}

#[test]
fn a_rotated_one_is_that_of_rotated_inputs() {
    let (n, cols) = (40, 24);
    let rotation = rotation(cols, 7).unwrap();
    let x = inputs(n, cols);
    let mut rotated = x.clone();
    rotated
        .chunks_exact_mut(cols)
        .for_each(|x| rotation.apply(x));
    let (a, b) = (of(&x, cols).rotated(&rotation), of(&rotated, cols));
    for i in 0..cols {
        for j in 0..=i {
            let (a, b) = (f64::from(a.sums[(i, j)]), f64::from(b.sums[(i, j)]));
            assert!((a - b).abs() < 1e-3, "[{i}, {j}]: {a} and {b}");
        }
    }
}

#[test]
fn the_order_puts_large_inputs_first() {
    let hessian = of(&[1.0, 3.0, 2.0, 0.0, 1.0, 4.0], 3);
    assert_eq!(hessian.order(), [2, 1, 0]);
    let again = hessian.reordered(&[2, 1, 0]).symmetric();
    assert_eq!(
        [again[(0, 0)], again[(0, 1)], again[(2, 2)]],
        [20.0, 10.0, 1.0]
    );
}

#[test]
fn factors_of_two_columns_by_hand() {
    let hessian = of(&[2.0, 1.0, 0.0, 1.0, 1.0, 2.0], 2);
    // [[5, 4], [4, 6]] and 1 % of 5.5: the target of column 1 moves by 4 / 6.055 of the error of
    // column 0.
    let feedback = Feedback::new(&hessian, 1).unwrap();
    let (a, c) = (5.055, 6.055);
    assert_close(f64::from(feedback.shares[(0, 1)]), 4.0 / c);
    assert_eq!(feedback.shares[(1, 0)], 0.0);
    let left = a - 16.0 / c;
    let average = (left + c) / 2.0;
    assert_close(f64::from(feedback.costs[0]), left / average);
    assert_close(f64::from(feedback.costs[1]), c / average);
    // Within one block nothing is compensated.
    let feedback = Feedback::new(&hessian, 2).unwrap();
    assert_eq!(feedback.shares, Mat::<f32>::zeros(2, 2));
}

/// With fixed errors in the first columns, no later weights cost less than the targets.
#[test]
fn targets_are_the_cheapest() {
    let (cols, block) = (12, 4);
    let hessian = of(&inputs(200, cols), cols);
    let feedback = Feedback::new(&hessian, block).unwrap();
    let mut damped = hessian.clone();
    let average = (0..cols).map(|i| hessian.sums[(i, i)]).sum::<f32>() / cols as f32;
    (0..cols).for_each(|i| damped.sums[(i, i)] += DAMPING as f32 * average);
    // Errors of the first block, then errors of each later block that hit its targets.
    let mut errors = vec![0.0f32; cols];
    errors[..block].copy_from_slice(&[0.5, -1.0, 0.25, 2.0]);
    let best = |errors: &[f32], feedback: &Feedback| -> Vec<f32> {
        let mut errors = errors.to_vec();
        for k in block..cols {
            let before = k / block * block;
            // Hitting the target means e = w - q = -(feedback of the errors before).
            errors[k] = -(0..before)
                .map(|j| errors[j] * feedback.shares[(j, k)])
                .sum::<f32>();
        }
        errors
    };
    let found = best(&errors, &feedback);
    let cost = damped.cost(&found);
    assert!(cost < 0.9 * damped.cost(&errors), "{cost}");
    for k in block..cols {
        for step in [-0.01, 0.01] {
            let mut other = found.clone();
            other[k] += step;
            assert!(damped.cost(&other) >= cost, "column {k}");
        }
    }
}

#[test]
fn damping_grows_until_it_does_not_help() {
    let indefinite = |other: f32| {
        let mut hessian = Hessian::new(2);
        hessian.sums = Mat::from_fn(2, 2, |i, j| if i == j { 1.0 } else { other });
        hessian
    };
    // Positive definite from a damping above 9 on; that of the last attempt is 10.
    assert_eq!(cholesky(&indefinite(10.0), 0.01).unwrap().1, 10.0);
    let e = Feedback::new(&indefinite(100.0), 1).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Invalid);
}

#[test]
fn scales_of_rows_by_hand() {
    // H = [[5, 4], [4, 6]]
    let hessian = of(&[2.0, 1.0, 0.0, 1.0, 1.0, 2.0], 2);
    let feedback = Feedback::new(&hessian, 1).unwrap();
    let (mut weights, mut values) = (vec![0.0; 2 * STRIP_ROWS], vec![0.0; 2 * STRIP_ROWS]);
    let mut put = |row: usize, weight: [f32; 2], value: [f32; 2]| {
        for col in 0..2 {
            weights[col * STRIP_ROWS + row] = weight[col];
            values[col * STRIP_ROWS + row] = value[col];
        }
    };
    put(0, [1.0, -2.0], [2.0, -4.0]);
    // (1, 0) H (0, 1)^T = 4, (0, 1) H (0, 1)^T = 6 and 1 % of 5.5
    put(1, [1.0, 0.0], [0.0, 1.0]);
    put(2, [1.0, 1.0], [-1.0, -1.0]);
    let scales = feedback.scales_of_rows(&weights, &values);
    assert_close(scales[0].unwrap(), 0.5);
    assert_close(scales[1].unwrap(), 4.0 / 6.055);
    assert_eq!(scales[2..4], [Some(0.0), None]);
    weights[2] = f32::NAN;
    values[2] = f32::INFINITY;
    assert!(
        feedback.scales_of_rows(&weights, &values)[2]
            .unwrap()
            .is_nan()
    );
}

#[test]
fn inputs_of_zeros_move_nothing() {
    let feedback = Feedback::new(&Hessian::new(5), 4).unwrap();
    assert_eq!(feedback.shares, Mat::<f32>::zeros(5, 5));
    assert_eq!(feedback.costs, [1.0; 5]);
}

use super::*;

/// Relative tolerance; transformers computes in f32.
const FREQUENCY_TOLERANCE: f64 = 1e-6;

fn config(theta: f64, dim: usize, scaling: RopeScaling) -> RopeConfig {
    RopeConfig {
        theta,
        dim,
        scaling,
    }
}

/// Frequencies and attention factors as `ROPE_INIT_FUNCTIONS`
/// of transformers 5.23.0 computes them.
#[test]
fn frequencies_are_those_of_transformers() {
    let long_rope = RopeScaling::LongRope {
        short: vec![1.0, 1.25, 1.5, 2.0],
        long: vec![1.0, 4.0, 16.0, 64.0],
        original_context: 4096,
        attention_factor: 1.190_238_071_423_808_3,
    };
    let long_rope = config(10_000.0, 8, long_rope);
    let cases: [(RopeConfig, bool, &[f64]); 6] = [
        (
            config(
                500_000.0,
                16,
                RopeScaling::Llama3 {
                    factor: 32.0,
                    low: 1.0,
                    high: 4.0,
                    original_context: 8192,
                },
            ),
            false,
            &[
                1.0,
                0.193922758,
                0.0376060307,
                0.00729266508,
                0.000429556705,
                8.57025589e-06,
                1.66196742e-06,
                3.22293289e-07,
            ],
        ),
        (
            config(
                1_000_000.0,
                16,
                RopeScaling::Yarn {
                    factor: 4.0,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    truncate: true,
                    original_context: 32768,
                    attention_factor: 1.138629436111989,
                },
            ),
            false,
            &[
                1.0,
                0.177827939,
                0.0316227786,
                0.00421755994,
                0.000500000024,
                4.44569851e-05,
                7.90569356e-06,
                1.40585337e-06,
            ],
        ),
        (
            config(
                10_000.0,
                16,
                RopeScaling::Yarn {
                    factor: 16.0,
                    beta_fast: 16.0,
                    beta_slow: 2.0,
                    truncate: false,
                    original_context: 256,
                    attention_factor: 1.121751143713058,
                },
            ),
            false,
            &[
                1.0,
                0.285350084,
                0.0383304954,
                0.00197642366,
                0.000624999986,
                0.000197642366,
                6.2500003e-05,
                1.97642366e-05,
            ],
        ),
        (
            config(10_000.0, 16, RopeScaling::Linear { factor: 4.0 }),
            false,
            &[
                0.25,
                0.079056941,
                0.0250000004,
                0.00790569466,
                0.00249999994,
                0.000790569466,
                0.000250000012,
                7.90569466e-05,
            ],
        ),
        (
            long_rope.clone(),
            false,
            &[1.0, 0.0799999982, 0.00666666683, 0.000500000024],
        ),
        (
            long_rope,
            true,
            &[1.0, 0.0250000004, 0.000624999986, 1.56250007e-05],
        ),
    ];
    for (config, long, expected) in cases {
        let rope = Rope::new(&config);
        let found = rope.frequencies(long);
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!(
                (found / expected - 1.0).abs() < FREQUENCY_TOLERANCE,
                "{config:?}: {found} for {expected}"
            );
        }
    }
}

#[test]
fn only_longrope_has_a_switch_and_it_is_above_the_original_context() {
    let scaling = RopeScaling::LongRope {
        short: vec![1.0],
        long: vec![2.0],
        original_context: 32,
        attention_factor: 1.5,
    };
    let rope = Rope::new(&config(100.0, 2, scaling));
    assert_eq!(
        [31, 32, 33].map(|len| rope.is_long(len)),
        [false, false, true]
    );
    // Radians per position: 1 / 1 and 1 / 2; the attention factor applies to both.
    let angle = |long| rope.table(3, 1, long).cos[0];
    assert_eq!(angle(false), (1.5 * 3f64.cos()) as f32);
    assert_eq!(angle(true), (1.5 * 1.5f64.cos()) as f32);
    assert!(!Rope::new(&config(100.0, 2, RopeScaling::Default)).is_long(usize::MAX));
}

#[test]
fn turns_the_first_part_of_each_head_by_hand() {
    // Two positions from 5 on, two heads of 6, of which 4 are rotated: pairs (0, 2) and (1, 3).
    let rope = Rope::new(&config(16.0, 4, RopeScaling::Default));
    let mut x: Vec<f32> = (0..24).map(|i| i as f32).collect();
    let before = x.clone();
    let table = rope.table(5, 2, false);
    for (position, row) in x.chunks_exact_mut(12).enumerate() {
        table.apply(position, row, 6);
    }
    for (index, (head, old)) in x.chunks(6).zip(before.chunks(6)).enumerate() {
        let position = (5 + index / 2) as f64;
        for pair in 0..2 {
            // Frequencies 16^0 and 16^(-2/4).
            let (sin, cos) = (position * [1.0, 0.25][pair]).sin_cos();
            let (a, b) = (f64::from(old[pair]), f64::from(old[pair + 2]));
            assert!((f64::from(head[pair]) - (a * cos - b * sin)).abs() < 1e-5);
            assert!((f64::from(head[pair + 2]) - (b * cos + a * sin)).abs() < 1e-5);
        }
        assert_eq!(head[4..], old[4..]);
    }
}

#[test]
fn far_positions_keep_their_precision() {
    let rope = Rope::new(&config(10_000.0, 2, RopeScaling::Default));
    let table = rope.table(10_000_000, 1, false);
    // cos(10^7) to 7 digits.
    assert!((table.cos[0] - -0.907_270_4).abs() < 1e-7);
}

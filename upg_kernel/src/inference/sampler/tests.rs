use super::*;
use crate::inference::logits::LogitBias;

const INF: f32 = f32::INFINITY;

fn options() -> SamplingOptions {
    SamplingOptions {
        temperature: 1.0,
        ..SamplingOptions::default()
    }
}

/// Logits whose softmax is `p`.
fn of(p: &[f32]) -> Vec<f32> {
    p.iter().map(|p| p.ln()).collect()
}

/// Returns the ids that the filters keep, most probable first, with normalized probabilities.
fn kept(options: SamplingOptions, logits: &[f32], history: &[u32]) -> Vec<(u32, f32)> {
    let mut sampler = Sampler::new(options).unwrap();
    let mut logits = logits.to_vec();
    for processor in &mut sampler.processors {
        processor.process(history, &mut logits).unwrap();
    }
    let mut candidates: Vec<_> = (0u32..)
        .zip(logits)
        .map(|(id, l)| Candidate {
            id,
            weight: f64::from(l),
        })
        .collect();
    sampler.filter(&mut candidates);
    candidates.sort_by(more_likely);
    let total: f64 = candidates.iter().map(|c| c.weight).sum();
    candidates
        .iter()
        .map(|c| (c.id, (c.weight / total) as f32))
        .collect()
}

fn assert_kept(found: &[(u32, f32)], expected: &[(u32, f32)]) {
    let ids = |list: &[(u32, f32)]| list.iter().map(|x| x.0).collect::<Vec<_>>();
    assert_eq!(ids(found), ids(expected));
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found.1 - expected.1).abs() < 1e-6,
            "{found:?} {expected:?}"
        );
    }
}

#[test]
fn greedy_takes_the_lowest_id_among_equal_logits() {
    let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
    let mut choose = |logits: &[f32]| sampler.sample(logits, &[]).unwrap();
    assert_eq!(choose(&[1.0, 3.0, 2.0, 3.0]), 1);
    assert_eq!(choose(&[-0.0, 0.0]), 0);
    assert_eq!(choose(&[0.0, -0.0]), 0);
    assert_eq!(choose(&[-INF, -5.0]), 1);
}

#[test]
fn each_filter_by_hand() {
    let p = of(&[0.1, 0.4, 0.3, 0.2]);
    let all = [(1, 0.4), (2, 0.3), (3, 0.2), (0, 0.1)];
    assert_kept(&kept(options(), &p, &[]), &all);

    // Temperature 1/2 squares the probabilities: 16, 9, 4, 1 of 30.
    let cold = SamplingOptions {
        temperature: 0.5,
        ..options()
    };
    let squares = [
        (1, 16.0 / 30.0),
        (2, 9.0 / 30.0),
        (3, 4.0 / 30.0),
        (0, 1.0 / 30.0),
    ];
    assert_kept(&kept(cold, &p, &[]), &squares);

    let top_k = |top_k| SamplingOptions { top_k, ..options() };
    assert_kept(&kept(top_k(2), &p, &[]), &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
    assert_kept(&kept(top_k(9), &p, &[]), &all);
    // At a tie the lower ids stay.
    let equal = [(0, 0.5), (1, 0.5)];
    assert_kept(&kept(top_k(2), &[0.0; 5], &[]), &equal);

    let top_p = |top_p| SamplingOptions { top_p, ..options() };
    assert_kept(&kept(top_p(0.01), &p, &[]), &[(1, 1.0)]);
    assert_kept(
        &kept(top_p(0.65), &p, &[]),
        &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)],
    );
    let three = [(1, 4.0 / 9.0), (2, 3.0 / 9.0), (3, 2.0 / 9.0)];
    assert_kept(&kept(top_p(0.75), &p, &[]), &three);

    let min_p = |min_p| SamplingOptions { min_p, ..options() };
    // Relative to the largest: 0.25, 1, 0.75, 0.5.
    assert_kept(&kept(min_p(0.45), &p, &[]), &three);
    assert_kept(&kept(min_p(1.0), &p, &[]), &[(1, 1.0)]);
}

#[test]
fn the_order_of_the_filters_shows() {
    let p = of(&[0.1, 0.4, 0.3, 0.2]);
    // Temperature first: squared, 16/30 + 9/30 reach 0.8; at temperature 1, 0.4 + 0.3 would not.
    let mix = SamplingOptions {
        temperature: 0.5,
        top_p: 0.8,
        ..options()
    };
    assert_kept(&kept(mix, &p, &[]), &[(1, 0.64), (2, 0.36)]);
    // Top-k first: 4/7 of the kept probability reach 0.5; 0.4 of all would not.
    let mix = SamplingOptions {
        top_k: 2,
        top_p: 0.5,
        ..options()
    };
    assert_kept(&kept(mix, &p, &[]), &[(1, 1.0)]);
    // Top-p before min-p: 0.4 of all does not reach 0.55; 4/7 of what min-p keeps would.
    let mix = SamplingOptions {
        top_p: 0.55,
        min_p: 0.6,
        ..options()
    };
    assert_kept(&kept(mix, &p, &[]), &[(1, 4.0 / 7.0), (2, 3.0 / 7.0)]);
}

#[test]
fn processors_change_logits_one_after_the_other() {
    let bias = |biases| Box::new(LogitBias::new(biases).unwrap());
    let sampler = Sampler::new(SamplingOptions {
        frequency_penalty: 1.0,
        ..SamplingOptions::default()
    });
    let mut sampler = sampler
        .unwrap()
        .with_processor(bias(vec![(0, -INF)]))
        .with_processor(bias(vec![(3, 1.5)]));
    // Token 1 occurs twice, token 0 is excluded, and 1.0 + 1.5 is above 2.0.
    assert_eq!(
        sampler.sample(&[9.0, 3.5, 2.0, 1.0], &[1, 2, 1]).unwrap(),
        3
    );
    let none = vec![(0, -INF), (1, -INF)];
    let greedy = Sampler::new(SamplingOptions::default()).unwrap();
    let error = greedy.with_processor(bias(none)).sample(&[1.0, 2.0], &[]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn repetition_is_penalized_once_for_each_recent_token() {
    let penalty = |repeat_last_n| SamplingOptions {
        repetition_penalty: 2.0,
        repeat_last_n,
        ..SamplingOptions::default()
    };
    let choose = |n, logits: &[f32], history: &[u32]| {
        Sampler::new(penalty(n))
            .unwrap()
            .sample(logits, history)
            .unwrap()
    };
    // 3 / 2 is above 1.4, but would not be if it were divided twice;
    // ids beyond the vocabulary are ignored.
    assert_eq!(choose(64, &[3.0, 1.4], &[0, 0, 99]), 0);
    assert_eq!(choose(64, &[3.0, 1.6], &[0]), 1);
    // Negative logits are multiplied.
    assert_eq!(choose(64, &[-1.0, -1.5], &[0]), 1);
    assert_eq!(choose(1, &[3.0, 1.6], &[0, 1]), 0);
    assert_eq!(choose(0, &[3.0, 1.6], &[0]), 0);
}

#[test]
fn useless_logits_and_options_are_errors() {
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(SamplingOptions {
            temperature,
            ..options()
        })
        .unwrap();
        for logits in [&[0.0, f32::NAN][..], &[INF, 1.0], &[-INF, -INF], &[]] {
            let error = sampler.sample(logits, &[]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
    let bad = [
        SamplingOptions {
            temperature: -1.0,
            ..options()
        },
        SamplingOptions {
            temperature: f32::NAN,
            ..options()
        },
        SamplingOptions {
            top_p: 0.0,
            ..options()
        },
        SamplingOptions {
            top_p: 1.1,
            ..options()
        },
        SamplingOptions {
            min_p: -0.1,
            ..options()
        },
        SamplingOptions {
            min_p: f32::NAN,
            ..options()
        },
        SamplingOptions {
            repetition_penalty: 0.0,
            ..options()
        },
        SamplingOptions {
            repetition_penalty: INF,
            ..options()
        },
    ];
    for options in bad {
        assert_eq!(
            Sampler::new(options).unwrap_err().kind(),
            ErrorKind::Argument
        );
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    const DRAWS: u32 = 20_000;
    // Chi-square with 4 degrees of freedom: above 18.5 for one in 1,000 seeds.
    const LIMIT: f64 = 18.5;
    let p = [0.05, 0.5, 0.25, 0.15, 0.05];
    let orders = [
        options(),
        SamplingOptions {
            top_k: 5,
            seed: 1,
            ..options()
        },
        SamplingOptions {
            top_k: 50,
            min_p: 0.05,
            seed: 2,
            ..options()
        },
    ];
    for options in orders {
        let mut sampler = Sampler::new(options.clone()).unwrap();
        let mut counts = [0u32; 5];
        for _ in 0..DRAWS {
            counts[sampler.sample(&of(&p), &[]).unwrap() as usize] += 1;
        }
        let chi_square: f64 = counts
            .iter()
            .zip(p)
            .map(|(&count, p)| {
                let expected = f64::from(p) * f64::from(DRAWS);
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        assert!(chi_square < LIMIT, "{options:?}: {counts:?}, {chi_square}");
    }
}

#[test]
fn the_seed_decides() {
    let draw = |seed| {
        let mut sampler = Sampler::new(SamplingOptions { seed, ..options() }).unwrap();
        (0..32)
            .map(|_| sampler.sample(&[0.0; 100], &[]).unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(7), draw(7));
    assert_ne!(draw(7), draw(8));
    // The random numbers are guaranteed: another generator would give other text.
    assert_eq!(draw(7)[..4], [15, 16, 70, 72]);
}

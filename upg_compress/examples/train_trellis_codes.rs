//! Finds the codes of the trellis encodings and prints them as the constants of
//! `upg_kernel/src/trellis_code.rs`.
//!
//! ```text
//! cargo run --release -p upg_compress --example train_trellis_codes        # t2, t3, t4
//! cargo run --release -p upg_compress --example train_trellis_codes -- 4 7 # bits: weight, point
//! ```
//!
//! A level belongs to a point on a ring (see `upg_kernel::trellis_code`). There is no formula for a
//! good multiplier, so all are tried, each with levels at the quantiles of a Gaussian: the middles
//! of as many classes of equal probability as there are points. The best of them are trained
//! (Lloyd's iteration): Gaussian values are encoded, and every level moves to the mean of the
//! values it represented, as far as sums of a coarse and a fine part allow. The best one on other
//! values wins.
//!
//! Deterministic, up to the last bit of the machine's `ln` and `cos`. Takes about five minutes on
//! two cores.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use upg_compress::encode::trellis::{Code, Search, UNIT};
use upg_kernel::Result;
use upg_kernel::trellis_code::TrellisCode;

/// Points of half a ring, distinguished by 8 bits.
const DEPTHS: usize = 128;
const SURVIVORS: usize = 40;
const ROUNDS: usize = 8;
const TRIAL_VALUES: usize = 40_000;
const TRAINING_VALUES: usize = 100_000;
const TEST_VALUES: usize = 300_000;

fn main() -> Result<()> {
    let args: Vec<_> = std::env::args().skip(1).map(|a| a.parse()).collect();
    let codes = match args[..] {
        [] => vec![(2, 7), (3, 7), (4, 8)],
        [Ok(k @ 2..=4), Ok(bits @ 7..=8)] => vec![(k, bits)],
        _ => {
            eprintln!(
                "usage: train_trellis_codes [BITS_A_WEIGHT BITS_OF_A_POINT], 2 to 4 and 7 or 8"
            );
            std::process::exit(2);
        }
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let training = gaussian(&mut rng, TRAINING_VALUES);
    let test = gaussian(&mut rng, TEST_VALUES);
    let quantiles = Wanted::quantiles(&mut rng);
    for (k, bits) in codes {
        // Odd numbers times 8 or 4. Those of the upper half mirror the lower ones.
        let unit = 1u16 << (10 - bits);
        let mut tried = (0..(1u16 << 14) / unit)
            .into_par_iter()
            .map(|i| {
                let multiplier = (2 * i + 1) * unit;
                let code = fit(multiplier, &quantiles);
                let (error, _) = encode(k, code, &training[..TRIAL_VALUES])?;
                Ok((error, multiplier))
            })
            .collect::<Result<Vec<_>>>()?;
        tried.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let trained = tried[..SURVIVORS]
            .par_iter()
            .map(|&(_, multiplier)| {
                let code = train(k, multiplier, &quantiles, &training)?;
                Ok((encode(k, code, &test)?.0, code))
            })
            .collect::<Result<Vec<_>>>()?;
        for (error, code) in &trained {
            eprintln!("t{k}, multiplier {}: {error:.3} dB", code.multiplier());
        }
        if let Some((error, code)) = trained.iter().min_by(|a, b| a.0.total_cmp(&b.0)) {
            print_code(k, *error, code);
        }
    }
    Ok(())
}

/// Target level at each depth of the ring.
struct Wanted {
    /// Mean of `128 + level`, for the lower half of the ring and, mirrored, the upper one.
    means: Vec<f64>,
    /// Number of values at each depth.
    counts: Vec<f64>,
}

impl Wanted {
    /// Estimates the middles of classes of equal probability from a sample.
    fn quantiles(rng: &mut ChaCha8Rng) -> Self {
        const PER_CLASS: usize = 1001;
        let mut sample = gaussian(rng, 2 * DEPTHS * PER_CLASS);
        sample.sort_by(f64::total_cmp);
        let middle = |i: usize| sample[i * PER_CLASS + PER_CLASS / 2];
        let symmetric = |i| (middle(i) - middle(2 * DEPTHS - 1 - i)) / 2.0;
        Self {
            means: (0..DEPTHS)
                .map(|i| 127.5 + f64::from(UNIT) * symmetric(i))
                .collect(),
            counts: vec![1.0; DEPTHS],
        }
    }
}

fn train(k: u8, multiplier: u16, start: &Wanted, values: &[f64]) -> Result<TrellisCode> {
    let mut code = fit(multiplier, start);
    for _ in 0..ROUNDS {
        let (_, wanted) = encode(k, code, values)?;
        code = fit(multiplier, &wanted);
    }
    Ok(code)
}

/// Fits an integer code to the targets, by least squares for one part after the other.
fn fit(multiplier: u16, wanted: &Wanted) -> TrellisCode {
    // If 7 bits distinguish points, depths 2 i and 2 i + 1 are one.
    let together = if multiplier.is_multiple_of(8) { 2 } else { 1 };
    let places = |depth: usize| {
        let inner = if depth < 8 { 0 } else { 8 };
        let at = depth % 8 / together * together;
        (depth / 8, inner + at)
    };
    let average = |of: &dyn Fn(usize) -> usize, other: &dyn Fn(usize) -> f64| {
        let (mut sums, mut counts) = ([0.0; 16], [0.0; 16]);
        for depth in 0..DEPTHS {
            let count = wanted.counts[depth].max(1e-9);
            sums[of(depth)] += count * (wanted.means[depth] - other(depth));
            counts[of(depth)] += count;
        }
        std::array::from_fn::<f64, 16, _>(|i| {
            if counts[i] > 0.0 {
                sums[i] / counts[i]
            } else {
                0.0
            }
        })
    };
    let coarse_beside =
        |fine: [f64; 16]| average(&|depth| places(depth).0, &|depth| fine[places(depth).1]);
    let mut fine = [0.0; 16];
    for round in 0..200 {
        let coarse = coarse_beside(fine).map(|x| if round < 100 { x } else { x.round() });
        fine = average(&|depth| places(depth).1, &|depth| coarse[places(depth).0]);
        // A constant common to a fine part belongs to the coarse one.
        let least = [fine[0], fine[8]];
        fine = std::array::from_fn(|i| (fine[i / together * together] - least[i / 8]).max(0.0));
        fine = fine.map(|x| if round < 100 { x } else { x.round() });
    }
    let coarse = coarse_beside(fine);
    let [outer, inner] =
        [&fine[..8], &fine[8..]].map(|fine| fine.iter().fold(0.0, |a, &b| f64::max(a, b)));
    let most = |i: usize| 127.0 - if i == 0 { outer } else { inner };
    let coarse = std::array::from_fn(|i| coarse[i].round().clamp(0.0, most(i)) as u8);
    TrellisCode::new(multiplier, coarse, fine.map(|x| x as u8))
}

/// Encodes `values` in one chain.
///
/// Returns the error in dB relative to their energy, and the means of the values at each depth.
fn encode(k: u8, code: TrellisCode, values: &[f64]) -> Result<(f64, Wanted)> {
    let in_levels = values.iter().map(|x| x * f64::from(UNIT));
    let targets: Vec<f32> = in_levels.clone().map(|x| x as f32).collect();
    let mut states = vec![0; targets.len()];
    let search_code = Code::new(k, code, UNIT)?;
    Search::new(&search_code).run(None, &targets, &vec![1.0; targets.len()], &mut states)?;
    let (mut error, mut energy) = (0.0, 0.0);
    let (mut sums, mut counts) = (vec![0.0; DEPTHS], vec![0.0; DEPTHS]);
    for (x, &state) in in_levels.zip(&states) {
        error += (x - f64::from(code.level(state))).powi(2);
        energy += x * x;
        let point = usize::from(code.point(state));
        let (depth, value) = match point {
            0..DEPTHS => (point, x),
            _ => (2 * DEPTHS - 1 - point, -1.0 - x),
        };
        sums[depth] += 128.0 + value;
        counts[depth] += 1.0;
    }
    let means = sums
        .iter()
        .zip(&counts)
        .map(|(sum, n)| sum / f64::max(*n, 1.0));
    let wanted = Wanted {
        means: means.collect(),
        counts,
    };
    Ok((10.0 * f64::log10(error / energy), wanted))
}

fn print_code(k: u8, error: f64, code: &TrellisCode) {
    println!("/// {error:.2} dB on Gaussian weights.");
    println!("const T{k}: TrellisCode = TrellisCode::new(");
    println!("    {},", code.multiplier());
    println!("    {:?},", code.coarse());
    println!("    {:?},", code.fine());
    println!(");");
}

/// Returns independent values with mean 0 and variance 1 (Box and Muller).
fn gaussian(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / 4_294_967_296.0;
    std::iter::repeat_with(|| {
        (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    })
    .take(n)
    .collect()
}

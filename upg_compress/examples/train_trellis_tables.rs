//! Trains the tables of the trellis codes and prints them as the constants of `trellis/tables.rs`.
//!
//! ```text
//! cargo run --release -p upg_compress --example train_trellis_tables            # t2, t3, t4
//! cargo run --release -p upg_compress --example train_trellis_tables -- 4 128   # bits, levels
//! ```
//!
//! A state has 13 bits, the `k` newest on top; its level is `T[S[state & 63] + (state >> 6)]`. What
//! matters is which levels compete:
//! - A state has `2^k` successors, which differ in their top `k` bits: entries of `T` that stand
//!   `128 / 2^k` apart. They are drawn from `2^k` classes of equal probability, one from each, in
//!   random order, and such rings of entries take their members at evenly rising places inside of
//!   the classes.
//! - A state has `2^k` predecessors, which differ in their low `k` bits: entries of `S`. Their
//!   shifts stand `128 / 2^k` apart, too, in random order, and groups of them differ by offsets
//!   that fill the gaps evenly.
//!
//! Against a random `S` and `T` this gains 0.19 dB at two bits, 0.31 at three, 0.4 at four.
//! Then `T` is trained (Lloyd's iteration): encode Gaussian values, move every level to the mean of
//! what it stood for. Of several random seeds the best on other values wins.
//!
//! Deterministic, up to the last bit of the machine's `ln` and `cos`. About two minutes.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use upg_compress::trellis::{Code, Search};
use upg_kernel::Result;

/// Standard deviation of the weights in levels: the outermost level, at 3.4 times that, is 125.
const UNIT: f64 = 36.0;
/// Entries of the shift table.
const SHIFTS: usize = 64;
/// Values of the newest seven bits of a state.
const HIGH: usize = 128;
const SEEDS: u64 = 16;
const ROUNDS: usize = 10;
const TRAINING_VALUES: usize = 100_000;
const TEST_VALUES: usize = 300_000;

fn main() -> Result<()> {
    let args: Vec<usize> = std::env::args().skip(1).flat_map(|a| a.parse()).collect();
    let codes = match args[..] {
        [k, levels] => vec![(k, levels)],
        _ => vec![(2, 128), (3, 128), (4, 256)],
    };
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let training = gaussian(&mut rng, TRAINING_VALUES);
    let test = gaussian(&mut rng, TEST_VALUES);
    for (k, levels) in codes {
        let mut best: Option<(f64, Code)> = None;
        for seed in 0..SEEDS {
            let code = train(k, levels, seed, &training)?;
            let (error, _) = encode(&code, &test)?;
            eprintln!("t{k}, {levels} levels, seed {seed}: {error:.3} dB");
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, code));
            }
        }
        if let Some((error, code)) = best {
            print_code(error, &code);
        }
    }
    Ok(())
}

/// One code from one seed.
fn train(k: usize, levels: usize, seed: u64, values: &[f64]) -> Result<Code> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let shifts = make_shifts(&mut rng, 1 << k, levels);
    let mut table = make_levels(&mut rng, 1 << k, levels);
    let make = |table: &[f64]| {
        let rounded: Vec<i8> = table
            .iter()
            .map(|level| level.round().clamp(-127.0, 127.0) as i8)
            .collect();
        Code::new(k as u8, &shifts, &rounded, UNIT as f32)
    };
    let mut code = make(&table)?;
    for _ in 0..ROUNDS {
        let (_, means) = encode(&code, values)?;
        for (level, mean) in table.iter_mut().zip(means) {
            *level = mean.unwrap_or(*level);
        }
        code = make(&table)?;
    }
    Ok(code)
}

fn make_shifts(rng: &mut ChaCha8Rng, members: usize, levels: usize) -> Vec<u8> {
    let offsets = shuffled(rng, SHIFTS / members);
    let mut shifts = Vec::new();
    for offset in offsets {
        for place in shuffled(rng, members) {
            let half = below(rng, levels / HIGH);
            let shift = place * HIGH / members + offset * HIGH / SHIFTS + half * HIGH;
            shifts.push(shift as u8);
        }
    }
    shifts
}

fn make_levels(rng: &mut ChaCha8Rng, classes: usize, levels: usize) -> Vec<f64> {
    let quantiles = quantiles(rng, levels);
    let (rings, halves) = (HIGH / classes, levels / HIGH);
    let mut table = vec![0.0; levels];
    for ring in 0..rings {
        for (place, class) in shuffled(rng, classes).into_iter().enumerate() {
            for half in 0..halves {
                let member = class * rings * halves + ring * halves + half;
                table[half * HIGH + place * rings + ring] = quantiles[member] * UNIT;
            }
        }
    }
    table
}

/// Encodes `values` in one chain; returns the error in dB below their energy and the mean of the
/// values (in levels) that each entry of the level table stood for.
fn encode(code: &Code, values: &[f64]) -> Result<(f64, Vec<Option<f64>>)> {
    let targets: Vec<f32> = values.iter().map(|x| (x * UNIT) as f32).collect();
    let mut states = vec![0; targets.len()];
    Search::new(code).run(None, &targets, &vec![1.0; targets.len()], &mut states)?;
    let levels = code.levels().len();
    let (mut error, mut energy) = (0.0, 0.0);
    let mut sums = vec![(0.0, 0.0); levels];
    for (x, &state) in values.iter().map(|x| x * UNIT).zip(&states) {
        error += (x - f64::from(code.level(state))).powi(2);
        energy += x * x;
        let shift = usize::from(code.shifts()[usize::from(state) % SHIFTS]);
        let (sum, count) = &mut sums[(shift + usize::from(state) / SHIFTS) % levels];
        *sum += x;
        *count += 1.0;
    }
    let means = sums
        .into_iter()
        .map(|(sum, count)| (count > 0.0).then(|| sum / count));
    Ok((10.0 * f64::log10(error / energy), means.collect()))
}

fn print_code(error: f64, code: &Code) {
    let (k, levels) = (code.k(), code.levels());
    println!("/// {error:.2} dB on Gaussian weights.");
    println!("static T{k}: Tables<{}> = Tables {{", levels.len());
    println!("    unit: {UNIT:?},");
    println!("    shifts: {:?},", code.shifts());
    println!("    levels: {levels:?},");
    println!("}};");
}

/// Independent values with mean 0 and variance 1 (Box and Muller).
fn gaussian(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / 4_294_967_296.0;
    std::iter::repeat_with(|| {
        (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    })
    .take(n)
    .collect()
}

/// The middles of `n` classes of equal probability, estimated from a sample.
fn quantiles(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    const PER_CLASS: usize = 1001;
    let mut sample = gaussian(rng, n * PER_CLASS);
    sample.sort_by(f64::total_cmp);
    (0..n)
        .map(|i| sample[i * PER_CLASS + PER_CLASS / 2])
        .collect()
}

/// A number below `n`.
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u64::from(rng.next_u32()) * n as u64) >> 32) as usize
}

/// The numbers below `n` in random order.
fn shuffled(rng: &mut ChaCha8Rng, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, below(rng, i + 1));
    }
    order
}

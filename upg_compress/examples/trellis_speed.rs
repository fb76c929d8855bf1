//! Times the trellis search on Gaussian weights, on one thread, with every code path of this
//! machine.
//!
//! It also shows the gain from a longer look-ahead.
//!
//! ```text
//! cargo run --release -p upg_compress --example trellis_speed
//! ```

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::time::Instant;
use upg_compress::encode::trellis::{Code, Isa, Search};
use upg_kernel::Result;

const WEIGHTS: usize = 200_000;
/// Runs of which the fastest counts, because the machine may do other work.
const RUNS: usize = 3;

fn main() -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / 4_294_967_296.0;
    let weights: Vec<f64> = std::iter::repeat_with(|| {
        (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()
    })
    .take(WEIGHTS)
    .collect();
    for k in [2, 3, 4] {
        let code = Code::standard(k)?;
        println!("t{k}");
        for isa in Isa::available() {
            measure(isa.name(), Search::with_isa(&code, isa), &weights)?;
        }
        for look_ahead in [0, 16, 32, 64, 128, 192, 256, 512] {
            let search = Search::with(&code, Isa::best(), 256, look_ahead);
            measure(
                &format!("blocks of 256, {look_ahead} ahead"),
                search,
                &weights,
            )?;
        }
    }
    Ok(())
}

fn measure(name: &str, mut search: Search, weights: &[f64]) -> Result<()> {
    let code = search.code();
    let unit = f64::from(code.unit());
    let targets: Vec<f32> = weights.iter().map(|w| (w * unit) as f32).collect();
    let mut states = vec![0; targets.len()];
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        let start = Instant::now();
        search.run(None, &targets, &vec![1.0; targets.len()], &mut states)?;
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    let (mut error, mut energy) = (0.0, 0.0);
    for (w, &state) in weights.iter().zip(&states) {
        error += (w - f64::from(code.level(state)) / unit).powi(2);
        energy += w * w;
    }
    println!(
        "  {name:<28} {:.3} us a weight, {:.3} dB",
        1e6 * fastest / WEIGHTS as f64,
        10.0 * f64::log10(error / energy)
    );
    Ok(())
}

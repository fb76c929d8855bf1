//! scratch
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use upg_compress::trellis::{Code, Path, Search};

fn gaussian(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    let mut uniform = || (rng.next_u32() as f64 + 0.5) / 4294967296.0;
    let mut v = Vec::new();
    while v.len() < n {
        let (r, a) = (
            (-2.0 * uniform().ln()).sqrt(),
            uniform() * std::f64::consts::TAU,
        );
        v.push(r * a.cos());
        v.push(r * a.sin());
    }
    v.truncate(n);
    v
}

fn quantiles(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let mut v = gaussian(rng, n * 1001);
    v.sort_by(f64::total_cmp);
    (0..n).map(|i| v[i * 1001 + 500]).collect()
}
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (u64::from(rng.next_u32()) * n as u64 >> 32) as usize
}
fn shuffle<T>(rng: &mut ChaCha8Rng, v: &mut [T]) {
    for i in (1..v.len()).rev() {
        v.swap(i, below(rng, i + 1));
    }
}

fn measure(
    code: &Code,
    x: &[f64],
    path: Path,
    b: usize,
    la: usize,
    acc: Option<&mut Vec<(f64, f64)>>,
) -> f64 {
    let u = code.unit() as f64;
    let t: Vec<f32> = x.iter().map(|x| (x * u) as f32).collect();
    let w = vec![1.0; t.len()];
    let mut s = vec![0; t.len()];
    Search::with(code, path, b, la)
        .run(None, &t, &w, &mut s)
        .unwrap();
    for p in s.windows(2) {
        assert_eq!(p[0] >> code.k(), p[1] & ((1 << (13 - code.k())) - 1));
    }
    let (mut e, mut v) = (0.0, 0.0);
    for (x, &s) in x.iter().zip(&s) {
        let l = code.level(s) as f64;
        e += (x * u - l).powi(2);
        v += (x * u).powi(2);
    }
    if let Some(acc) = acc {
        for (x, &s) in x.iter().zip(&s) {
            let i = (code.shifts()[(s & 63) as usize] as usize + (s >> 6) as usize)
                & (code.levels().len() - 1);
            acc[i].0 += x * u;
            acc[i].1 += 1.0;
        }
    }
    10.0 * (e / v).log10()
}
fn quant(l: &[f64]) -> Vec<i8> {
    l.iter()
        .map(|l| l.round().clamp(-127.0, 127.0) as i8)
        .collect()
}

fn main() {
    let a: Vec<String> = std::env::args().collect();
    let get = |i: usize, d: f64| a.get(i).map_or(d, |v| v.parse().unwrap());
    let (k, n, unit, spread, seeds) = (
        get(1, 3.0) as u8,
        get(2, 128.0) as usize,
        get(3, 32.0),
        get(4, 0.0) as usize,
        get(5, 2.0) as u64,
    );
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    let train = gaussian(&mut rng, 60000);
    let valid = gaussian(&mut rng, 200000);
    for seed in 0..seeds {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let q = quantiles(n, &mut rng);
        let mut t = vec![0.0; n];
        if spread > 0 {
            // entries i + (128/2^k)*b : one from each of P quantile classes
            let p = spread;
            let h = n / p;
            let mut cls: Vec<Vec<f64>> = (0..p)
                .map(|c| {
                    let mut v = q[c * h..(c + 1) * h].to_vec();
                    shuffle(&mut rng, &mut v);
                    v
                })
                .collect();
            for i in 0..h {
                let mut order: Vec<usize> = (0..p).collect();
                shuffle(&mut rng, &mut order);
                for b in 0..p {
                    t[i + h * b] = cls[order[b]].pop().unwrap();
                }
            }
        } else {
            t.copy_from_slice(&q);
            shuffle(&mut rng, &mut t);
        }
        let mut levels: Vec<f64> = t.iter().map(|t| t * unit * 1.03).collect();
        let shifts: Vec<u8> = (0..64).map(|_| below(&mut rng, n) as u8).collect();
        let path = Path::best();
        let mut code = Code::new(k, &shifts, &quant(&levels), unit as f32).unwrap();
        print!(
            "seed {seed}: {:.3}",
            measure(&code, &valid, path, 256, 128, None)
        );
        for _ in 0..8 {
            let mut acc = vec![(0.0, 0.0); n];
            measure(&code, &train, path, 256, 128, Some(&mut acc));
            for (l, a) in levels.iter_mut().zip(&acc) {
                if a.1 > 0.0 {
                    *l = a.0 / a.1;
                }
            }
            code = Code::new(k, &shifts, &quant(&levels), unit as f32).unwrap();
        }
        println!(
            " -> {:.3} max {}",
            measure(&code, &valid, path, 256, 128, None),
            code.levels()
                .iter()
                .map(|l| (*l as i32).abs())
                .max()
                .unwrap()
        );
        if seed == 0 {
            for path in Path::available() {
                let t = std::time::Instant::now();
                let d = measure(&code, &valid, path, 256, 128, None);
                println!(
                    "{} {:.4} us/weight {d:.4}",
                    path.name(),
                    t.elapsed().as_secs_f64() * 1e6 / valid.len() as f64
                );
            }
            for (b, la) in [
                (256, 0),
                (256, 8),
                (256, 16),
                (256, 32),
                (256, 64),
                (256, 128),
                (256, 256),
                (128, 128),
                (512, 256),
            ] {
                let t = std::time::Instant::now();
                let d = measure(&code, &valid, path, b, la, None);
                println!(
                    "block {b} la {la}: {d:.4} {:.3} us",
                    t.elapsed().as_secs_f64() * 1e6 / valid.len() as f64
                );
            }
        }
    }
}

//! scratch
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use upg_compress::trellis::{Code, Path, Search};

fn gaussian(rng: &mut ChaCha8Rng, n: usize) -> Vec<f64> {
    let mut uniform = || (rng.next_u32() as f64 + 0.5) / 4294967296.0;
    let mut v = Vec::new();
    while v.len() < n {
        let (r, a) = ((-2.0 * uniform().ln()).sqrt(), uniform() * std::f64::consts::TAU);
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
fn below(rng: &mut ChaCha8Rng, n: usize) -> usize { (u64::from(rng.next_u32()) * n as u64 >> 32) as usize }
fn shuffle<T>(rng: &mut ChaCha8Rng, v: &mut [T]) { for i in (1..v.len()).rev() { v.swap(i, below(rng, i + 1)); } }

fn measure(code: &Code, x: &[f64], path: Path, b: usize, la: usize, acc: Option<&mut Vec<(f64, f64)>>) -> f64 {
    let u = code.unit() as f64;
    let t: Vec<f32> = x.iter().map(|x| (x * u) as f32).collect();
    let w = vec![1.0; t.len()];
    let mut s = vec![0; t.len()];
    Search::with(code, path, b, la).run(None, &t, &w, &mut s).unwrap();
    for p in s.windows(2) { assert_eq!(p[0] >> code.k(), p[1] & ((1 << (13 - code.k())) - 1)); }
    let (mut e, mut v) = (0.0, 0.0);
    for (x, &s) in x.iter().zip(&s) { let l = code.level(s) as f64; e += (x * u - l).powi(2); v += (x * u).powi(2); }
    if let Some(acc) = acc {
        for (x, &s) in x.iter().zip(&s) {
            let i = (code.shifts()[(s & 63) as usize] as usize + (s >> 6) as usize) & (code.levels().len() - 1);
            acc[i].0 += x * u; acc[i].1 += 1.0;
        }
    }
    10.0 * (e / v).log10()
}
fn quant(l: &[f64]) -> Vec<i8> { l.iter().map(|l| l.round().clamp(-127.0, 127.0) as i8).collect() }

fn main() {
    let a: Vec<String> = std::env::args().collect();
    let get = |i: usize, d: f64| a.get(i).map_or(d, |v| v.parse().unwrap());
    let (k, n, unit, spread, seeds) = (get(1, 3.0) as u8, get(2, 128.0) as usize, get(3, 32.0), get(4, 0.0) as usize, get(5, 2.0) as u64);
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    let train = gaussian(&mut rng, 60000);
    let valid = gaussian(&mut rng, 200000);
    for seed in 0..seeds {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let q = quantiles(n, &mut rng);
        let mut t = vec![0.0; n];
        let smode = a.get(7).map_or(0, |v| v.parse::<usize>().unwrap());
        if spread > 0 {
            let p = 1usize << k; let h = 128 / p; let reps = n / 128;
            // class c of ring i: ranks; ring i in 0..h, reps copies
            let per = n / p; // members per class = h*reps
            let mut perms: Vec<Vec<usize>> = (0..h).map(|_| { let mut o: Vec<usize> = (0..p).collect(); shuffle(&mut rng, &mut o); o }).collect();
            if spread == 2 || spread == 5 { for o in &mut perms { *o = (0..p).collect(); } }
            let mut cls: Vec<Vec<usize>> = (0..p).map(|_| { let mut v: Vec<usize> = (0..per).collect(); shuffle(&mut rng, &mut v); v }).collect();
            if spread == 3 { let c0 = cls[0].clone(); for c in &mut cls { *c = c0.clone(); } }
            if spread == 2 || spread == 4 { for c in &mut cls { *c = (0..per).collect(); } }
            for i in 0..h { for r in 0..reps { for b in 0..p {
                let c = perms[i][b];
                t[i + h * b + 128 * r] = q[c * per + cls[c][i * reps + r]];
            } } }
        } else { t.copy_from_slice(&q); shuffle(&mut rng, &mut t); }
        let mut levels: Vec<f64> = t.iter().map(|t| t * unit * 1.03).collect();
        let mut shifts: Vec<u8> = (0..64).map(|i| match smode { 0 => below(&mut rng, n), 1 => i * n / 64 + below(&mut rng, n / 64), 2 => i * n / 64, _ => i * 2 } as u8).collect();
        shuffle(&mut rng, &mut shifts);
        if smode >= 4 {
            let p = 1usize << k; let r = 64 / p;
            // offsets of r rows within a spacing n/p, per j
            let mut base: Vec<usize> = (0..r).collect(); shuffle(&mut rng, &mut base);
            for row in 0..r {
                let mut o: Vec<usize> = (0..p).collect(); shuffle(&mut rng, &mut o);
                for j in 0..p {
                    let fine = n / 64;
                    let off = match smode { 4 => base[row] * fine + below(&mut rng, fine), 5 => below(&mut rng, n / p), 6 => base[row] * fine, _ => ((base[row] + j) % r) * fine };
                    shifts[row * p + j] = match smode {
                        8 => o[j] * 128 / p + base[row] * (128 / 64) + 128 * below(&mut rng, 2),
                        9 => o[j] * 128 / p + base[row] * (128 / 64) + 128 * (o[j] & 1) + below(&mut rng, 2),
                        10 => o[j] * n / p + ((base[row] + o[j]) % r) * fine,
                        11 => o[j] * n / p + ((base[row] + o[j] / 2) % r) * fine,
                        12 => o[j] * n / p + ((base[row] + below(&mut rng, r)) % r) * fine,
                        13 => j * n / p + base[row] * fine,
                        14 => j * n / p + ((base[row] + j) % r) * fine,
                        _ => o[j] * n / p + off } as u8;
                }
            }
        }
        let path = Path::best();
        let mut code = Code::new(k, &shifts, &quant(&levels), unit as f32).unwrap();
        print!("seed {seed}: {:.3}", measure(&code, &valid, path, 256, 128, None));
        for _ in 0..8 {
            let mut acc = vec![(0.0, 0.0); n];
            measure(&code, &train, path, 256, 128, Some(&mut acc));
            for (l, a) in levels.iter_mut().zip(&acc) { if a.1 > 0.0 { *l = a.0 / a.1; } }
            code = Code::new(k, &shifts, &quant(&levels), unit as f32).unwrap();
        }
        println!(" -> {:.3} max {}", measure(&code, &valid, path, 256, 128, None), code.levels().iter().map(|l| (*l as i32).abs()).max().unwrap());
        if seed == 0 && a.len() <= 6 {
            for path in Path::available() {
                let t = cpu();
                let d = measure(&code, &valid, path, 256, 128, None);
                println!("{} {:.4} us/weight {d:.4}", path.name(), (cpu() - t) * 1e6 / valid.len() as f64);
            }
            for (b, la) in [(256,0),(256,8),(256,16),(256,32),(256,64),(256,128),(256,256),(128,128),(512,256),(448,64),(320,192)] {
                let t = cpu();
                let d = measure(&code, &valid, path, b, la, None);
                println!("block {b} la {la}: {d:.4} {:.3} us", (cpu() - t) * 1e6 / valid.len() as f64);
            }
        }
    }
}

fn cpu() -> f64 { std::fs::read_to_string("/proc/thread-self/schedstat").unwrap().split(' ').next().unwrap().parse::<f64>().unwrap() * 1e-9 }

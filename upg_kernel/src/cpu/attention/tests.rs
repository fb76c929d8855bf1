use super::*;
use crate::cpu::cache::CpuCache;
use crate::cpu::team::Team;
use crate::inference::cache::{BlockPool, BlockTables, CacheLayout, CacheType, LayerGroup};
use crate::inference::pass::Pass;
use std::sync::Arc;

/// Tolerance for averages of values up to 1; measured: 3e-7.
const TOLERANCE: f64 = 3e-6;

const SHAPE: Heads = Heads {
    queries: 4,
    kv: 2,
    dim: 2,
};

/// Elements per row of queries, keys and values.
const WIDTH: usize = 16;

const WINDOW: usize = 700;

/// Rows per sequence.
const MOST: usize = 40;

/// Queries, keys and values of a position, one row.
fn row(position: usize) -> [f32; 16] {
    std::array::from_fn(|i| ((position * 16 + i) * 7919 % 1009) as f32 / 504.5 - 1.0)
}

/// Creates a cache with sequences of these lengths, and the pass over their last positions.
/// The second of the two layers has a window.
fn caches(lens: &[usize]) -> (CpuCache, Pass) {
    let layout = Arc::new(CacheLayout {
        cache_type: CacheType::F32,
        kv_heads: SHAPE.kv,
        head_dim: SHAPE.dim,
        groups: [None, Some(WINDOW)]
            .map(|window| LayerGroup { window, layers: 1 })
            .into(),
        layers: vec![(0, 0), (1, 0)],
    });
    let pool = BlockPool::new(Arc::clone(&layout), None).unwrap();
    let (mut cache, team) = (CpuCache::new(&layout), Team::new(2));
    let mut tables = vec![BlockTables::new(&pool); lens.len()];
    let (mut pass, mut last) = (Pass::default(), Pass::default());
    let limits = (4096, 100);
    for (&len, tables) in lens.iter().zip(&mut tables) {
        let positions: Vec<_> = (0..len).collect();
        // A window keeps the positions that rows of the same pass attend to.
        let (before, end) = positions.split_at(len - MOST);
        for positions in before.chunks(100).chain([end]) {
            pass.clear();
            tables
                .reserve(&pool, positions.len(), limits, &mut pass)
                .unwrap();
            pass.segments.push(Segment {
                rows: 0..positions.len(),
                first: positions[0],
                long: false,
            });
            cache.begin(&pass).unwrap();
            let rows: Vec<f32> = positions.iter().flat_map(|&p| row(p)).collect();
            (0..2).for_each(|layer| cache.append(&team, layer, &rows, WIDTH));
            tables.commit(positions.len());
        }
        tables.reserve(&pool, 0, limits, &mut last).unwrap();
    }
    (cache, last)
}

/// Returns the expected output of query head `head` at a position, in f64.
fn expected(position: usize, first: usize, head: usize) -> [f64; 2] {
    let part = |p: usize, start: usize| [0, 1].map(|i| f64::from(row(p)[start + i]));
    let [a, b] = part(position, head * 2);
    let (mut sum, mut total) = ([0.0; 2], 0.0);
    for p in first..=position {
        let ([c, d], value) = (part(p, 8 + head / 2 * 2), part(p, 12 + head / 2 * 2));
        let weight = ((a * c + b * d) / 2f64.sqrt()).exp();
        total += weight;
        sum = [0, 1].map(|i| sum[i] + weight * value[i]);
    }
    sum.map(|sum| sum / total)
}

#[test]
fn pieces_and_tasks_do_not_change_a_result() {
    // Some queries of a task, or a whole group, may see no position of a piece.
    let lens = [
        1300,
        45,
        2 * PIECE,
        2 * PIECE + 1,
        2 * PIECE + 7,
        PIECE + 30,
    ];
    let (cache, last) = caches(&lens);
    for layer in 0..2 {
        let run = |cpu: &Cpu, n: usize, split: bool| {
            let segment = |i: usize| Segment {
                rows: i * n..(i + 1) * n,
                first: lens[i] - n,
                long: false,
            };
            let segments = [0, 1, 2, 3, 4, 5].map(segment);
            let pass = Pass {
                segments: segments.to_vec(),
                views: last.views.clone(),
                tables: last.tables.clone(),
                ..Pass::default()
            };
            let positions = lens.iter().flat_map(|&len| len - n..len);
            let queries: Vec<f32> = positions.flat_map(row).collect();
            let attention = Attention {
                cache: |i: usize| cache.view(&pass, i, layer),
                segments: &segments,
                queries: &queries,
                shape: SHAPE,
            };
            let mut plan = Tasks::default();
            plan.make(&segments, SHAPE);
            // Stale values must not matter.
            plan.sums = vec![f32::NAN; 1000];
            let mut out = vec![f32::NAN; lens.len() * n * SHAPE.query_size()];
            match split {
                true => attention.split(cpu, &mut plan, 3, &mut out),
                false => attention.whole(cpu, &plan, &mut out),
            }
            out
        };
        for kernels in Kernels::available() {
            let cpu = &Cpu::new(kernels, 2);
            let many = run(cpu, MOST, false);
            for n in [1, 3, 7, 8, 9, 12, 16, 17, 20, 33] {
                for split in [false, true] {
                    if split && n >= MANY {
                        continue;
                    }
                    let few = run(cpu, n, split);
                    for (i, few) in few.chunks_exact(n * SHAPE.query_size()).enumerate() {
                        let end = (i + 1) * MOST * SHAPE.query_size();
                        let name = kernels.name();
                        assert_eq!(few, &many[end - few.len()..end], "{name} {n} {split}");
                    }
                }
            }
            for (i, out) in many.chunks_exact(MOST * SHAPE.query_size()).enumerate() {
                for (row, out) in out.chunks_exact(SHAPE.query_size()).enumerate() {
                    let position = lens[i] - MOST + row;
                    let first = (position + 1).saturating_sub([4096, WINDOW][layer]);
                    for (head, found) in out.chunks_exact(2).enumerate() {
                        let expected = expected(position, first, head);
                        for (found, expected) in found.iter().zip(expected) {
                            let error = (f64::from(*found) - expected).abs();
                            assert!(error <= TOLERANCE, "{position} {head}: {error}");
                        }
                    }
                }
            }
        }
    }
}

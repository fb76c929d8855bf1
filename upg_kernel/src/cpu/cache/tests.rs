use super::*;
use crate::inference::cache::{BlockPool, BlockTables, LayerGroup};
use crate::inference::pass::Segment;
use std::sync::Arc;

/// Elements of a head: more than a scale group, and not a multiple of it.
const DIM: usize = 40;

/// One layer with two key/value heads.
fn layout(cache_type: CacheType) -> Arc<CacheLayout> {
    Arc::new(CacheLayout {
        cache_type,
        kv_heads: 2,
        head_dim: DIM,
        groups: vec![LayerGroup {
            window: None,
            layers: 1,
        }],
        layers: vec![(0, 0)],
    })
}

/// Cache with one sequence, which `append` extends.
struct Fixture {
    pool: BlockPool,
    tables: BlockTables,
    cache: CpuCache,
    pass: Pass,
}

impl Fixture {
    fn new(cache_type: CacheType) -> Self {
        let layout = layout(cache_type);
        let pool = BlockPool::new(Arc::clone(&layout), None).unwrap();
        Self {
            tables: BlockTables::new(&pool),
            pool,
            cache: CpuCache::new(&layout),
            pass: Pass::default(),
        }
    }

    /// Appends rows `[n, keys and values]` to `tables`.
    fn append(&mut self, rows: &[f32]) {
        let (n, width) = (rows.len() / (4 * DIM), 4 * DIM);
        self.pass.clear();
        let first = self.tables.len();
        let limits = (1000, 1000);
        self.tables
            .reserve(&self.pool, n, limits, &mut self.pass)
            .unwrap();
        self.pass.segments.push(Segment {
            rows: 0..n,
            first,
            long: false,
        });
        self.cache.begin(&self.pass).unwrap();
        self.cache.append(&Team::new(2), 0, rows, width);
        self.tables.commit(n);
    }

    /// Returns an element of the key or value of a head at an entry.
    fn element(&self, head: usize, entry: usize, is_key: bool, d: usize) -> f32 {
        let block = self.pass.tables[entry / BLOCK] as usize;
        let (slab, entry) = (block / SLAB, entry % BLOCK);
        let at = place_in_slab(head, is_key, block, BLOCK * DIM).start
            + match is_key {
                true => d * BLOCK + entry,
                false => entry * DIM + d,
            };
        match &self.cache.groups[0] {
            Blocks::F32(slabs) => slabs[slab].as_slice()[at],
            Blocks::F16(slabs) => slabs[slab].as_slice()[at].to_f32(),
            Blocks::Int8(slabs, scales) => {
                let groups = DIM.div_ceil(SCALED);
                let scale = place_in_slab(head, is_key, block, BLOCK * groups).start
                    + match is_key {
                        true => d / SCALED * BLOCK + entry,
                        false => entry * groups + d / SCALED,
                    };
                f32::from(slabs[slab].as_slice()[at]) * scales[slab].as_slice()[scale]
            }
        }
    }
}

/// Keys and values of both heads at a position.
/// The first of the 32 that share a scale is the largest.
fn row(position: usize) -> Vec<f32> {
    let value = |i: usize| {
        let size = if (i % DIM).is_multiple_of(SCALED) {
            1.0
        } else {
            0.3
        };
        size * (position as f32 + 0.1) * (1.0 - 0.01 * (i % 7) as f32)
    };
    (0..4 * DIM).map(value).collect()
}

#[test]
fn every_type_gives_back_what_was_stored() {
    // Half a step of 8, 11 and 24 bits of precision, for the largest value of a scale group.
    for (cache_type, step) in [
        (CacheType::Int8, 1.0 / 254.0),
        (CacheType::F16, 1.0 / 2048.0),
        (CacheType::F32, 0.0),
    ] {
        let mut fixture = Fixture::new(cache_type);
        let mut position = 0;
        for n in [1, 1, 20, 5, 16, 3] {
            let rows: Vec<f32> = (position..position + n).flat_map(row).collect();
            fixture.append(&rows);
            position += n;
        }
        for position in 0..position {
            let row = row(position);
            for (i, expected) in row.iter().enumerate() {
                let (is_key, head) = (i < 2 * DIM, i / DIM % 2);
                let found = fixture.element(head, position, is_key, i % DIM);
                let largest = row[i / DIM * DIM + i % DIM / SCALED * SCALED];
                let error = (found - expected).abs();
                assert!(
                    error <= 1.001 * step * largest,
                    "{cache_type:?} {position} {i}: {error}"
                );
            }
        }
    }
}

#[test]
fn int8_keeps_zeros_and_what_is_not_a_number() {
    let mut fixture = Fixture::new(CacheType::Int8);
    let mut row = vec![0.0; 4 * DIM];
    row[1] = 1e-44;
    row[DIM] = f32::NAN;
    row[DIM + SCALED] = 5.0;
    fixture.append(&row);
    assert!((0..DIM).all(|d| fixture.element(0, 0, true, d) == 0.0));
    assert!((0..SCALED).all(|d| fixture.element(1, 0, true, d).is_nan()));
    // Only values with the same scale change.
    assert_eq!(fixture.element(1, 0, true, SCALED), 5.0);
}

#[test]
fn a_fork_writes_to_a_block_of_its_own() {
    // The last block is copied within a slab, and to the next slab.
    for (positions, blocks) in [(20, 2), (250, 16)] {
        for cache_type in [CacheType::F16, CacheType::F32] {
            let mut fixture = Fixture::new(cache_type);
            let rows: Vec<f32> = (0..positions).flat_map(row).collect();
            fixture.append(&rows);
            let used = fixture.pool.used_bytes();
            let original = fixture.tables.clone();
            assert_eq!(fixture.pool.used_bytes(), used);
            fixture.append(&row(77));
            // Only the last block is no longer shared.
            assert_eq!(fixture.pool.used_bytes(), used / blocks * (blocks + 1));
            let stored = |position: usize, i: usize| match cache_type {
                CacheType::F16 => f16::from_f32(row(position)[i]).to_f32(),
                _ => row(position)[i],
            };
            let last = positions - 1;
            assert_eq!(fixture.element(0, last, true, 3), stored(last, 3));
            assert_eq!(fixture.element(0, positions, true, 3), stored(77, 3));
            fixture.tables = original;
            fixture.append(&row(55));
            for (is_key, part) in [(true, 0), (false, 2 * DIM)] {
                let found = |position| fixture.element(1, position, is_key, 3);
                assert_eq!(found(last), stored(last, part + DIM + 3));
                assert_eq!(found(positions), stored(55, part + DIM + 3));
                assert_eq!(found(0), stored(0, part + DIM + 3));
            }
            assert_eq!(fixture.pool.used_bytes(), used);
        }
    }
}

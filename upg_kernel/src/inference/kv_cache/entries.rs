//! The memory of keys or values, in blocks as [`Entries`] describes them.
#![forbid(unsafe_code)]

use super::CacheType;
use crate::kernels::attention::{BLOCK, Entries};
use half::f16;

/// What is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Keys,
    Values,
}

/// Keys or values of one head.
#[derive(Debug)]
pub(super) struct Stored {
    kind: Kind,
    dim: usize,
    values: Values,
}

#[derive(Debug)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Int8 { values: Vec<i8>, scales: Vec<f32> },
}

impl Stored {
    pub(super) fn new(cache_type: CacheType, kind: Kind, dim: usize) -> Self {
        let values = match cache_type {
            CacheType::F32 => Values::F32(Vec::new()),
            CacheType::F16 => Values::F16(Vec::new()),
            CacheType::Int8 => Values::Int8 {
                values: Vec::new(),
                scales: Vec::new(),
            },
        };
        Self { kind, dim, values }
    }

    /// Bytes of a position of one head, keys or values. `None`: overflow.
    pub(super) fn position_bytes(cache_type: CacheType, dim: usize) -> Option<usize> {
        match cache_type {
            CacheType::F32 => dim.checked_mul(4),
            CacheType::F16 => dim.checked_mul(2),
            CacheType::Int8 => dim.checked_add(4),
        }
    }

    /// Room for `needed` positions in all; doubles, but not beyond `most`. `None`: out of memory.
    pub(super) fn reserve(&mut self, needed: usize, most: usize) -> Option<()> {
        let needed = needed.checked_next_multiple_of(BLOCK)?;
        let dim = self.dim;
        match &mut self.values {
            Values::F32(values) => reserve(values, needed, most, dim),
            Values::F16(values) => reserve(values, needed, most, dim),
            Values::Int8 { values, scales } => {
                reserve(values, needed, most, dim)?;
                reserve(scales, needed, most, 1)
            }
        }
    }

    /// Stores what belongs to a position for which there is room.
    pub(super) fn set(&mut self, position: usize, x: &[f32]) {
        let block = position / BLOCK * BLOCK * self.dim;
        let lane = position % BLOCK;
        let (start, step) = match self.kind {
            Kind::Keys => (block + lane, BLOCK),
            Kind::Values => (block + lane * self.dim, 1),
        };
        let places = (start..).step_by(step).zip(x);
        match &mut self.values {
            Values::F32(values) => places.for_each(|(at, x)| values[at] = *x),
            Values::F16(values) => places.for_each(|(at, x)| values[at] = f16::from_f32(*x)),
            Values::Int8 { values, scales } => {
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let scale = largest / 127.0;
                // A scale of which there is no inverse belongs to values that are as good as 0.
                let inverse = match scale >= f32::MIN_POSITIVE {
                    true => 1.0 / scale,
                    false => 0.0,
                };
                // What is not finite stays so.
                scales[position] = match x.iter().all(|x| x.is_finite()) {
                    true => scale,
                    false => f32::NAN,
                };
                places.for_each(|(at, x)| values[at] = (x * inverse).round_ties_even() as i8);
            }
        }
    }

    /// Drops the first blocks.
    pub(super) fn drop_blocks(&mut self, blocks: usize) {
        let positions = blocks * BLOCK;
        let dropped = positions * self.dim;
        match &mut self.values {
            Values::F32(values) => drop(values.drain(..dropped)),
            Values::F16(values) => drop(values.drain(..dropped)),
            Values::Int8 { values, scales } => {
                values.drain(..dropped);
                scales.drain(..positions);
            }
        }
    }

    pub(super) fn entries(&self) -> Entries<'_> {
        match &self.values {
            Values::F32(values) => Entries::F32(values),
            Values::F16(values) => Entries::F16(values),
            Values::Int8 { values, scales } => Entries::Int8(values, scales),
        }
    }

    /// Positions for which there is memory.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        let elements = match &self.values {
            Values::F32(values) => values.capacity(),
            Values::F16(values) => values.capacity(),
            Values::Int8 { values, .. } => values.capacity(),
        };
        elements / self.dim
    }
}

/// Makes `values` at least as long as `needed` positions of `size` elements.
fn reserve<T: Default + Clone>(
    values: &mut Vec<T>,
    needed: usize,
    most: usize,
    size: usize,
) -> Option<()> {
    let wanted = needed.checked_mul(size)?;
    if wanted > values.capacity() {
        let doubled = values.capacity().saturating_mul(2);
        let target = doubled.min(most.checked_mul(size)?).max(wanted);
        values.try_reserve_exact(target - values.len()).ok()?;
    }
    if wanted > values.len() {
        values.resize(wanted, T::default());
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was stored, in rows `[positions, dim]`.
    fn rows(stored: &Stored, positions: usize) -> Vec<Vec<f32>> {
        let dim = stored.dim;
        let place = |p: usize, d: usize| {
            let block = p / BLOCK * BLOCK * dim;
            match stored.kind {
                Kind::Keys => block + d * BLOCK + p % BLOCK,
                Kind::Values => block + p % BLOCK * dim + d,
            }
        };
        let value = |p, d| match stored.entries() {
            Entries::F32(values) => values[place(p, d)],
            Entries::F16(values) => values[place(p, d)].to_f32(),
            Entries::Int8(values, scales) => f32::from(values[place(p, d)]) * scales[p],
        };
        (0..positions)
            .map(|p| (0..dim).map(|d| value(p, d)).collect())
            .collect()
    }

    #[test]
    fn every_type_gives_back_what_was_stored() {
        let x = |p: usize| [p as f32 + 0.1, -0.3 * p as f32, 1e-3];
        for kind in [Kind::Keys, Kind::Values] {
            // Half a step of 8, 11 and 24 bits of precision, for the largest of three values.
            for (cache_type, step) in [
                (CacheType::Int8, 1.0 / 254.0),
                (CacheType::F16, 1.0 / 2048.0),
                (CacheType::F32, 0.0),
            ] {
                let mut stored = Stored::new(cache_type, kind, 3);
                for p in 0..40 {
                    stored.reserve(p + 1, 48).unwrap();
                    stored.set(p, &x(p));
                }
                assert!(stored.capacity() <= 48);
                stored.drop_blocks(1);
                for (p, row) in rows(&stored, 24).iter().enumerate() {
                    let x = x(p + 16);
                    for (found, expected) in row.iter().zip(x) {
                        let error = (found - expected).abs();
                        assert!(error <= 1.001 * step * x[0], "{cache_type:?} {p} {error}");
                    }
                }
            }
        }
    }

    #[test]
    fn int8_keeps_zeros_and_what_is_not_a_number() {
        let mut stored = Stored::new(CacheType::Int8, Kind::Values, 2);
        stored.reserve(2, 16).unwrap();
        stored.set(0, &[0.0, 1e-44]);
        stored.set(1, &[f32::NAN, 1.0]);
        let rows = rows(&stored, 2);
        assert_eq!(rows[0], [0.0, 0.0]);
        assert!(rows[1].iter().all(|x| x.is_nan()));
    }
}

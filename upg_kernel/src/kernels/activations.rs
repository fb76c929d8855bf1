//! Quantized activations.
#![forbid(unsafe_code)]

/// Columns that share a scale.
pub(crate) const GROUP: usize = 64;

/// Largest magnitude of a quantized activation, `128 * 63 + 63`.
///
/// Both planes are then within -64 and 63, so that instructions that add two products
/// `level * plane` in int16 never saturate.
const LARGEST: f32 = 8_127.0;

/// Block of 64 quantized activations: 64 bytes per plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// High plane; the value is `128 * high + low`.
    pub high: [i8; GROUP],
    pub low: [i8; GROUP],
}

impl Block {
    const ZERO: Self = Self {
        high: [0; GROUP],
        low: [0; GROUP],
    };
}

/// Vector of activations, quantized to 14 bits with one scale per 64 columns.
///
/// Two planes of int8 let every kernel use dot products of bytes. The error (at most 1/16,254 of
/// the largest of 64 neighbours) is far below that of any encoding.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activations {
    /// Blocks; values past the last column are 0.
    pub blocks: Vec<Block>,
    /// Corrections: -128 times the sum of each half of a block, for kernels that read levels as
    /// `level + 128`.
    pub offsets: Vec<[i32; 2]>,
    /// Scale of each block.
    pub scales: Vec<f32>,
}

impl Activations {
    /// Runs [`quantize`] into new memory.
    #[cfg(test)]
    pub(crate) fn new(x: &[f32]) -> Self {
        let mut activations = Self::default();
        quantize(x, &mut activations);
        activations
    }

    /// Resizes every part for this many columns; values past them are 0, all others arbitrary.
    pub(super) fn resize(&mut self, cols: usize) {
        let blocks = cols.div_ceil(GROUP);
        self.blocks.resize(blocks, Block::ZERO);
        if !cols.is_multiple_of(GROUP) {
            self.blocks[blocks - 1] = Block::ZERO;
        }
        self.offsets.resize(blocks, [0; 2]);
        self.scales.resize(blocks, 0.0);
    }
}

/// Rounds `x` to nearest, ties to even. Non-finite values give non-finite results.
#[inline(always)]
pub(super) fn quantize(x: &[f32], out: &mut Activations) {
    out.resize(x.len());
    let blocks = out.blocks.iter_mut().zip(&mut out.offsets);
    for ((x, (block, offsets)), scale) in x.chunks(GROUP).zip(blocks).zip(&mut out.scales) {
        let mut values = [0; GROUP];
        *scale = quantize_group(x, &mut values);
        for (i, &value) in values.iter().enumerate() {
            let high = (value + 64) >> 7;
            block.high[i] = high as i8;
            block.low[i] = (value - (high << 7)) as i8;
        }
        let (first, second) = values.split_at(GROUP / 2);
        *offsets = [first, second].map(|half| {
            let sum: i32 = half.iter().map(|&value| i32::from(value)).sum();
            -128 * sum
        });
    }
}

/// Returns the factors from integers to values and back.
///
/// `None` if all activations of a group are practically 0.
pub(super) fn scales_for(largest: f32) -> Option<(f32, f32)> {
    let scale = largest / LARGEST;
    // The inverse of a subnormal scale is infinite.
    (scale >= f32::MIN_POSITIVE).then(|| (scale, 1.0 / scale))
}

/// Rounds one group; returns its scale.
#[inline(always)]
fn quantize_group(x: &[f32], values: &mut [i16]) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction. Every vector unit has these two additions.
    const NO_FRACTION: f32 = 12_582_912.0;
    if !x.iter().all(|x| x.is_finite()) {
        return f32::NAN;
    }
    let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let Some((scale, inverse)) = scales_for(largest) else {
        return 0.0;
    };
    for (value, x) in values.iter_mut().zip(x) {
        *value = ((x * inverse + NO_FRACTION) - NO_FRACTION) as i16;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that values are within half a step, and that zeros follow the last.
    #[test]
    fn both_planes_give_the_values_back() {
        // One buffer, to show that nothing of a longer vector is left.
        let mut a = Activations::default();
        for cols in [576usize, 200, 128, 65, 64, 63, 1] {
            let x: Vec<f32> = (0..cols)
                .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3)
                .collect();
            quantize(&x, &mut a);
            let blocks = cols.div_ceil(GROUP);
            let lengths = [a.blocks.len(), a.offsets.len(), a.scales.len()];
            assert_eq!(lengths, [blocks; 3]);
            for (i, block) in a.blocks.iter().enumerate() {
                let values: Vec<i32> = (block.high.iter().zip(&block.low))
                    .map(|(&high, &low)| 128 * i32::from(high) + i32::from(low))
                    .collect();
                let planes = block.high.iter().chain(&block.low);
                assert!(planes.into_iter().all(|plane| (-64..64).contains(plane)));
                let (scale, x) = (a.scales[i], &x[i * GROUP..cols.min((i + 1) * GROUP)]);
                for (value, x) in values.iter().zip(x) {
                    assert!(
                        (*value as f32 * scale - x).abs() <= 0.5001 * scale,
                        "{cols}"
                    );
                }
                assert!(values[x.len()..].iter().all(|&value| value == 0), "{cols}");
                let halves = values.chunks(GROUP / 2);
                let sums: Vec<i32> = halves.map(|half| -128 * half.iter().sum::<i32>()).collect();
                assert_eq!(a.offsets[i].as_slice(), sums);
            }
        }
    }

    #[test]
    fn tiny_values_vanish_and_wild_ones_stay_wild() {
        assert_eq!(Activations::new(&[1e-44, -1e-44]).scales[0], 0.0);
        for wild in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Activations::new(&[wild, 1.0]).scales[0].is_nan());
            assert!(Activations::new(&[wild, 1e-44]).scales[0].is_nan());
        }
    }
}

//! Activations as integers, in the order in which a kernel meets them.
#![forbid(unsafe_code)]

/// Columns that share a scale.
pub(crate) const GROUP: usize = 64;

/// The largest magnitude of a quantized activation, `128 * 63 + 63`: both planes are within -64 and 63, so
/// that instructions that add up two products `level * plane` in int16 never saturate.
const LARGEST: f32 = 8_127.0;

/// The column of each slot of a register of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Slot `s` is column `s`.
    Natural,
    /// As 4-bit codes lie in bytes: 64 bytes hold 64 columns in their low and 64 in their high
    /// halves, which are the two halves of each group of so many columns.
    Nibbles(usize),
}

impl Order {
    /// The slot of `column`. 16 columns from a multiple of 16 on are 16 slots.
    pub(super) fn slot(self, column: usize) -> usize {
        match self {
            Self::Natural => column,
            Self::Nibbles(group) => {
                let (register, column) = (column / (2 * GROUP), column % (2 * GROUP));
                let (in_group, half) = (column % group, group / 2);
                let byte = column / group * half + in_group % half;
                register * 2 * GROUP + in_group / half * GROUP + byte
            }
        }
    }
}

/// 64 slots of quantized activations: one register of int8 values for each plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// The value is `128 * high + low`.
    pub high: [i8; GROUP],
    pub low: [i8; GROUP],
    /// -128 times the sum of four values: what is too much when levels are read as `level + 128`.
    pub offset: [i32; GROUP / 4],
}

impl Block {
    const ZERO: Self = Self {
        high: [0; GROUP],
        low: [0; GROUP],
        offset: [0; GROUP / 4],
    };
}

/// A vector of activations, quantized to 14 bits with one scale for each 64 columns.
///
/// Two planes of int8 let every kernel use dot products of bytes; the error (at most 1/16,254 of the
/// largest of 64 neighbours) is far below that of any encoding.
#[derive(Debug, Clone, Default)]
pub(crate) struct Activations {
    /// Whole registers: slots past the last column are 0.
    pub blocks: Vec<Block>,
    /// The sums of the offsets in both halves of each block.
    pub offsets: Vec<[i32; 2]>,
    /// One for each 64 columns, a multiple of 32 of them, 0 past the last column.
    pub scales: Vec<f32>,
}

impl Activations {
    /// [`quantize`] into new memory.
    #[cfg(test)]
    pub(crate) fn new(x: &[f32], order: Order) -> Self {
        let mut activations = Self::default();
        quantize(x, order, &mut activations);
        activations
    }

    /// Gives every part the length for so many columns; what is past them is 0, all else anything.
    pub(super) fn resize(&mut self, cols: usize) {
        let blocks = cols.div_ceil(2 * GROUP) * 2;
        self.blocks.resize(blocks, Block::ZERO);
        self.blocks[cols / GROUP / 2 * 2..].fill(Block::ZERO);
        self.offsets.clear();
        self.offsets.resize(blocks, [0; 2]);
        self.scales.clear();
        self.scales
            .resize(cols.div_ceil(GROUP).next_multiple_of(32), 0.0);
    }
}

/// Rounds `x` to nearest, ties to even. Values that are not finite give results that are not.
#[inline(always)]
pub(super) fn quantize(x: &[f32], order: Order, out: &mut Activations) {
    out.resize(x.len());
    for (group, (x, scale)) in x.chunks(GROUP).zip(&mut out.scales).enumerate() {
        let mut values = [0; GROUP];
        *scale = quantize_group(x, &mut values);
        for (i, value) in values.into_iter().enumerate() {
            let slot = order.slot(group * GROUP + i);
            let block = &mut out.blocks[slot / GROUP];
            let high = (value + 64) >> 7;
            block.high[slot % GROUP] = high as i8;
            block.low[slot % GROUP] = (value - (high << 7)) as i8;
        }
    }
    for (block, sums) in out.blocks.iter_mut().zip(&mut out.offsets) {
        let planes = block.high.chunks_exact(4).zip(block.low.chunks_exact(4));
        for (offset, (high, low)) in block.offset.iter_mut().zip(planes) {
            let sum = |plane: &[i8]| plane.iter().map(|&x| i32::from(x)).sum::<i32>();
            *offset = -128 * (128 * sum(high) + sum(low));
        }
        let (first, second) = block.offset.split_at(GROUP / 8);
        *sums = [first, second].map(|half| half.iter().sum());
    }
}

/// The factor from values to activations, and the one that goes back; `None` where all activations of
/// a group are as good as 0.
pub(super) fn scales_for(largest: f32) -> Option<(f32, f32)> {
    let scale = largest / LARGEST;
    // The inverse of a subnormal scale is infinite.
    (scale >= f32::MIN_POSITIVE).then(|| (scale, 1.0 / scale))
}

/// Rounds one group; returns its scale.
#[inline(always)]
fn quantize_group(x: &[f32], values: &mut [i16]) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction: two additions that every vector unit has.
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

    /// Every column once, in any order, and the values within half a step.
    #[test]
    fn both_planes_give_the_values_back() {
        for order in [Order::Natural, Order::Nibbles(32), Order::Nibbles(64)] {
            for cols in [1usize, 63, 64, 65, 128, 200, 576] {
                let x: Vec<f32> = (0..cols)
                    .map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.3)
                    .collect();
                let a = Activations::new(&x, order);
                assert_eq!(a.blocks.len() * GROUP, cols.next_multiple_of(128));
                let mut seen = vec![0; a.blocks.len() * GROUP];
                for column in 0..seen.len() {
                    let slot = order.slot(column);
                    let (block, i) = (&a.blocks[slot / GROUP], slot % GROUP);
                    let value = 128 * i32::from(block.high[i]) + i32::from(block.low[i]);
                    seen[slot] += 1;
                    let (x, scale) = match column < cols {
                        true => (x[column], a.scales[column / GROUP]),
                        false => (0.0, 1.0),
                    };
                    assert!(
                        (value as f32 * scale - x).abs() <= 0.5001 * scale,
                        "{order:?} {column}"
                    );
                }
                assert!(seen.iter().all(|&n| n == 1), "{order:?}");
                let planes = a.blocks.iter().flat_map(|b| b.high.iter().chain(&b.low));
                assert!(planes.into_iter().all(|plane| (-64..64).contains(plane)));
                let block = a.blocks[0];
                for (four, offset) in block.offset.iter().enumerate() {
                    let sum: i32 = (4 * four..4 * four + 4)
                        .map(|i| 128 * i32::from(block.high[i]) + i32::from(block.low[i]))
                        .sum();
                    assert_eq!(*offset, -128 * sum);
                }
            }
        }
    }

    #[test]
    fn a_nibble_order_by_hand() {
        // Columns 33 and 49 are in the two halves of byte 17: the second of the second group of 32.
        assert_eq!(Order::Nibbles(32).slot(33), 17);
        assert_eq!(Order::Nibbles(32).slot(49), 64 + 17);
        assert_eq!(Order::Nibbles(64).slot(65), 33);
        assert_eq!(Order::Nibbles(64).slot(128 + 97), 128 + 64 + 33);
    }

    #[test]
    fn tiny_values_vanish_and_wild_ones_stay_wild() {
        assert_eq!(
            Activations::new(&[1e-44, -1e-44], Order::Natural).scales[0],
            0.0
        );
        for wild in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(Activations::new(&[wild, 1.0], Order::Natural).scales[0].is_nan());
            assert!(Activations::new(&[wild, 1e-44], Order::Natural).scales[0].is_nan());
        }
    }
}

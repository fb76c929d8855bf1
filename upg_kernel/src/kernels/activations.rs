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
    /// The column of slot `slot`.
    pub(super) fn column(self, slot: usize) -> usize {
        match self {
            Self::Natural => slot,
            Self::Nibbles(group) => {
                let (register, slot) = (slot / (2 * GROUP), slot % (2 * GROUP));
                let (is_high, byte) = (slot / GROUP, slot % GROUP);
                let half = group / 2;
                let in_register = byte / half * group + is_high * half + byte % half;
                register * 2 * GROUP + in_register
            }
        }
    }
}

/// 64 slots of quantized activations: one register of int8 values for each plane.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Block {
    /// The value is `128 * high + low`.
    pub high: [i8; GROUP],
    pub low: [i8; GROUP],
    /// -128 times the sum of four values: what is too much when levels are read as `level + 128`.
    pub offset: [i32; GROUP / 4],
}

/// A vector of activations, quantized to 14 bits with one scale for each 64 columns.
///
/// Two planes of int8 let every kernel use dot products of bytes; the error (at most 1/16,254 of the
/// largest of 64 neighbours) is far below that of any encoding.
#[derive(Debug, Clone)]
pub(crate) struct Activations {
    /// Whole registers: slots past the last column are 0.
    pub blocks: Vec<Block>,
    /// The sum of the offsets of each block.
    pub offsets: Vec<i32>,
    /// One for each 64 columns, a multiple of 32 of them, 0 past the last column.
    pub scales: Vec<f32>,
}

impl Activations {
    /// Rounds `x` to nearest, ties to even. Values that are not finite give results that are not.
    pub(crate) fn new(x: &[f32], order: Order) -> Self {
        let registers = x.len().div_ceil(2 * GROUP);
        let mut values = vec![0i16; registers * 2 * GROUP];
        let mut scales = vec![0.0; x.len().div_ceil(GROUP).next_multiple_of(32)];
        let groups = x.chunks(GROUP).zip(values.chunks_mut(GROUP));
        for ((x, values), scale) in groups.zip(&mut scales) {
            *scale = quantize(x, values);
        }
        let block = |index: usize| {
            let value = |i: usize| values[order.column(index * GROUP + i)];
            let mut block = Block {
                high: [0; GROUP],
                low: [0; GROUP],
                offset: [0; GROUP / 4],
            };
            for i in 0..GROUP {
                let value = value(i);
                let high = (value + 64) >> 7;
                block.high[i] = high as i8;
                block.low[i] = (value - (high << 7)) as i8;
                block.offset[i / 4] -= 128 * i32::from(value);
            }
            block
        };
        let blocks: Vec<Block> = (0..registers * 2).map(block).collect();
        Self {
            offsets: blocks.iter().map(|b| b.offset.iter().sum()).collect(),
            blocks,
            scales,
        }
    }
}

/// Rounds one group; returns its scale.
fn quantize(x: &[f32], values: &mut [i16]) -> f32 {
    // Adding 1.5 * 2^23 leaves no bits for a fraction: two additions that every vector unit has.
    const NO_FRACTION: f32 = 12_582_912.0;
    let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let scale = largest / LARGEST;
    // The inverse of a subnormal scale is infinite; such activations are as good as 0.
    if scale < f32::MIN_POSITIVE {
        // A NaN gets lost in `max` and must not get lost in the result.
        return x.iter().sum::<f32>() * 0.0;
    }
    let inverse = 1.0 / scale;
    for (value, x) in values.iter_mut().zip(x) {
        *value = ((x * inverse + NO_FRACTION) - NO_FRACTION) as i16;
    }
    match x.iter().all(|x| x.is_finite()) {
        true => scale,
        false => f32::NAN,
    }
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
                for slot in 0..seen.len() {
                    let (block, i) = (&a.blocks[slot / GROUP], slot % GROUP);
                    let value = 128 * i32::from(block.high[i]) + i32::from(block.low[i]);
                    let column = order.column(slot);
                    seen[column] += 1;
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
        // Byte 17 of a register is the second of the second group of 32: columns 33 and 49.
        assert_eq!(Order::Nibbles(32).column(17), 33);
        assert_eq!(Order::Nibbles(32).column(64 + 17), 49);
        assert_eq!(Order::Nibbles(64).column(33), 65);
        assert_eq!(Order::Nibbles(64).column(128 + 64 + 33), 128 + 97);
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

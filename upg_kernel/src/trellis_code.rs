//! Levels of the states of the trellis encodings, computed with one multiplication.
//!
//! A state has 13 bits, the newest on top. `state * multiplier` in 16 bits is a point on a ring.
//! States that differ in their newest `k` bits are equidistant on it (about equidistant with 4), as
//! the successors of a state should be. The multiplier spreads states that differ in their oldest
//! bits. The upper byte of the product then becomes a level that is close to the quantile of a
//! Gaussian at that point.
//!
//! Sources: the trellis and computed codes are those of QTIP (arXiv 2406.11235); this
//! code is our own. It needs 16 bits and shuffles of 16 bytes. It also equals
//! `T[(S[state % 64] + state / 64) % len]` with two tables, which is faster where
//! registers hold them.
#![forbid(unsafe_code)]

/// Bits of the stream that select one level.
pub const STATE_BITS: u32 = 13;

/// Number of states.
pub const STATES: usize = 1 << STATE_BITS;

/// Entries of [`TrellisCode::shift_table`]: one for each value
/// of the oldest six bits of a state.
pub const SHIFTS: usize = 64;

/// Code of a trellis encoding: the level of each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrellisCode {
    multiplier: u16,
    coarse: [u8; 16],
    fine: [u8; 16],
}

impl TrellisCode {
    /// Creates a code from its parts.
    ///
    /// - `multiplier` is 8 or 4 times an odd number, for levels that depend on 7 or 8 bits of a
    ///   point.
    /// - `coarse[depth / 8] + fine[..]` is `128 + level` at a depth of 0 (outermost) to 127. The
    ///   first 8 entries of `fine` are for depths below 8, the others for the rest.
    ///
    /// Panics, at compile time as an error, if the multiplier is another, a sum is above 127, or
    /// depths that differ only beyond 7 bits have different levels.
    pub const fn new(multiplier: u16, coarse: [u8; 16], fine: [u8; 16]) -> Self {
        let zeros = multiplier.trailing_zeros();
        assert!(zeros == 2 || zeros == 3);
        let mut depth = 0;
        while depth < 128 {
            let (coarse, fine) = (coarse[depth / 8], fine[fine_index(depth as u8)]);
            assert!(coarse as u32 + fine as u32 <= 127);
            depth += 1;
        }
        let code = Self {
            multiplier,
            coarse,
            fine,
        };
        let mut i = 0;
        while i < 16 {
            assert!(code.bits() == 8 || fine[i] == fine[i + 1]);
            i += 2;
        }
        code
    }

    /// Returns the code of the encoding with `k` bits per weight; `None` if `k` is not 2, 3 or 4.
    pub const fn of(k: u8) -> Option<&'static Self> {
        match k {
            2 => Some(&T2),
            3 => Some(&T3),
            4 => Some(&T4),
            _ => None,
        }
    }

    /// Returns the level of a state; its upper three bits are ignored. This is the reference.
    pub const fn level(&self, state: u16) -> i8 {
        self.level_at(self.point(state))
    }

    /// Returns the point of a state on the ring: the upper byte of its product.
    pub const fn point(&self, state: u16) -> u8 {
        let state = state % STATES as u16;
        (state.wrapping_mul(self.multiplier) >> 8) as u8
    }

    /// Returns the level at a point of the ring, given by its upper 8 bits.
    pub(crate) const fn level_at(&self, point: u8) -> i8 {
        let mirror = if point < 128 { 0 } else { 255 };
        let depth = point ^ mirror;
        let level = self.coarse[depth as usize / 8] + self.fine[fine_index(depth)];
        (level ^ mirror ^ 128) as i8
    }

    /// Returns the multiplier of a state.
    pub const fn multiplier(&self) -> u16 {
        self.multiplier
    }

    /// Returns `128 + level` at depths 0, 8, ... 120, less the part in [`Self::fine`].
    pub const fn coarse(&self) -> &[u8; 16] {
        &self.coarse
    }

    /// Returns the part of the low three bits of a depth: the first eight entries below 8, else
    /// the others.
    pub const fn fine(&self) -> &[u8; 16] {
        &self.fine
    }

    /// Returns the number of bits of a point that its level depends on: 7 or 8.
    pub const fn bits(&self) -> u32 {
        10 - self.multiplier.trailing_zeros()
    }

    /// Returns the number of entries of the [`Self::level_table`]: 128 or 256.
    pub const fn levels(&self) -> usize {
        1 << self.bits()
    }

    /// Returns `S` of `level = T[(S[state % 64] + state / 64) % len]`.
    pub const fn shift_table(&self) -> [u8; SHIFTS] {
        let mut table = [0; SHIFTS];
        let mut low = 0;
        let inverse = self.inverse();
        while low < SHIFTS {
            let point = (low as u16).wrapping_mul(self.multiplier) >> (16 - self.bits());
            // In units of the new bits, by the inverse of their step.
            let shift = point as usize * inverse % self.levels();
            table[low] = shift as u8;
            low += 1;
        }
        table
    }

    /// Returns `T` of the same, in its first [`Self::levels`] entries.
    pub const fn level_table(&self) -> [i8; 256] {
        let mut table = [0; 256];
        let mut i = 0;
        while i < self.levels() {
            let point = i * self.step() % self.levels();
            table[i] = self.level_at((point << (8 - self.bits())) as u8);
            i += 1;
        }
        table
    }

    /// Returns the distance on the ring between states whose seven newest bits differ by 1.
    const fn step(&self) -> usize {
        (self.multiplier << 6 >> (16 - self.bits())) as usize
    }

    /// Returns the inverse of the step modulo the number of levels.
    const fn inverse(&self) -> usize {
        let mut inverse = 1;
        while inverse * self.step() % self.levels() != 1 {
            inverse += 2;
        }
        inverse
    }

    const fn all_levels(&self) -> [i8; STATES] {
        let mut levels = [0; STATES];
        let mut state = 0;
        while state < STATES {
            levels[state] = self.level(state as u16);
            state += 1;
        }
        levels
    }
}

const fn fine_index(depth: u8) -> usize {
    let inner = if depth < 8 { 0 } else { 8 };
    (depth % 8) as usize + inner
}

// Found by `upg_compress/examples/train_trellis_codes.rs`.

/// Code of `t2`: -11.61 dB on Gaussian weights.
const T2: TrellisCode = TrellisCode::new(
    16920,
    [
        16, 56, 69, 76, 82, 88, 92, 95, 100, 104, 108, 111, 114, 118, 121, 123,
    ],
    [0, 0, 23, 23, 27, 27, 34, 34, 0, 0, 1, 1, 3, 3, 4, 4],
);

/// Code of `t3`: -17.46 dB on Gaussian weights.
const T3: TrellisCode = TrellisCode::new(
    8680,
    [
        9, 57, 69, 76, 82, 88, 92, 96, 100, 104, 108, 111, 114, 118, 121, 123,
    ],
    [0, 0, 21, 21, 33, 33, 38, 38, 0, 0, 1, 1, 3, 3, 4, 4],
);

/// Code of `t4`: -23.19 dB on Gaussian weights.
const T4: TrellisCode = TrellisCode::new(
    4292,
    [
        0, 58, 68, 76, 82, 87, 92, 96, 100, 104, 107, 111, 114, 117, 121, 123,
    ],
    [0, 21, 32, 39, 44, 48, 51, 52, 0, 1, 1, 2, 3, 3, 4, 4],
);

/// Returns the code of the encoding with `K` = 2, 3 or 4 bits per weight, for kernels.
pub(crate) const fn code<const K: usize>() -> &'static TrellisCode {
    TrellisCode::of(K as u8).expect("2, 3 or 4 bits")
}

/// Level of every state.
static LEVELS: [[i8; STATES]; 3] = [T2.all_levels(), T3.all_levels(), T4.all_levels()];

/// Returns the level of every state with `k` bits per weight; `None` if `k` is not 2, 3 or 4.
pub fn levels(k: u8) -> Option<&'static [i8; STATES]> {
    LEVELS.get(usize::from(k).checked_sub(2)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODES: [(u8, TrellisCode); 3] = [(2, T2), (3, T3), (4, T4)];

    #[test]
    fn a_level_by_hand() {
        let mut coarse = [100; 16];
        (coarse[0], coarse[3]) = (10, 70);
        let mut fine = [20; 16];
        (fine[5], fine[8 + 5]) = (3, 7);
        let code = TrellisCode::new(4, coarse, fine);
        // The product is 4 * state: its upper byte is state / 64.
        assert_eq!(code.level(5 * 64 + 9), -115, "depth 5: 10 + 3 - 128");
        assert_eq!(code.level(29 * 64), -51, "depth 3 * 8 + 5: 70 + 7 - 128");
        assert_eq!(code.level(28 * 64), -38, "depth 3 * 8 + 4: 70 + 20 - 128");
        let code = TrellisCode::new(12, coarse, fine);
        // 12 * 5414 = 64968, upper byte 253, which mirrors depth 2: 10 + 20 - 128 = -98
        assert_eq!(code.level(5414), 97);
    }

    #[test]
    fn the_upper_bits_of_a_state_mean_nothing() {
        for (k, code) in CODES {
            for state in 0..STATES as u16 {
                assert_eq!(code.level(state), code.level(state | 0xE000), "t{k}");
            }
        }
    }

    #[test]
    fn tables_and_all_levels_agree_with_the_formula() {
        for (k, code) in CODES {
            let (shifts, table) = (code.shift_table(), code.level_table());
            for state in 0..STATES {
                let expected = code.level(state as u16);
                let index = usize::from(shifts[state % 64]) + state / 64;
                assert_eq!(table[index % code.levels()], expected, "t{k} {state}");
                assert_eq!(levels(k).unwrap()[state], expected, "t{k} {state}");
            }
        }
        assert_eq!(CODES.map(|(_, code)| code.levels()), [128, 128, 256]);
        assert!([0, 1, 5, 255].iter().all(|&k| levels(k).is_none()));
        assert!([0, 1, 5, 255].iter().all(|&k| TrellisCode::of(k).is_none()));
    }

    #[test]
    fn the_codes_are_those_of_the_format() {
        let levels = CODES.map(|(_, code)| [0, 1, 72, 577, 8191].map(|state| code.level(state)));
        let expected = [
            [-112, -27, 9, 77, 26],
            [-119, -46, 2, -9, 45],
            [-128, -60, 23, 31, -7],
        ];
        assert_eq!(levels, expected);
    }
}

//! The tables of the trellis codes: which level a state means.
#![forbid(unsafe_code)]

use upg_kernel::matrix::trellis::{SHIFT_TABLE_LEN, level};
use upg_kernel::{Error, ErrorKind, Result};

/// A trellis code of `k` bits a weight: `level = T[(S[state & 63] + (state >> 6)) & (len - 1)]`.
#[derive(Debug, Clone)]
pub struct Code {
    k: u8,
    shifts: [u8; SHIFT_TABLE_LEN],
    levels: Vec<i8>,
    float_levels: Vec<f32>,
    unit: f32,
}

impl Code {
    /// A code with the shift table `S` and the level table `T` of 128 or 256 entries, made for
    /// weights with a standard deviation of `unit` levels.
    ///
    /// Shifts are stored modulo the number of levels. Errors (`Argument`): `k` is not 2, 3 or 4,
    /// a table has another length, or `unit` is not positive and finite.
    pub fn new(k: u8, shifts: &[u8], levels: &[i8], unit: f32) -> Result<Self> {
        let wrong = |message: String| Err(Error::new(ErrorKind::Argument, message));
        if !(2..=4).contains(&k) {
            return wrong(format!(
                "{k} bits a weight, the trellis codes have 2, 3 or 4"
            ));
        }
        if ![128, 256].contains(&levels.len()) {
            return wrong(format!("{} levels, expected 128 or 256", levels.len()));
        }
        if !(unit > 0.0 && unit.is_finite()) {
            return wrong(format!("a standard deviation of {unit} levels"));
        }
        let Ok(mut shifts) = <[u8; SHIFT_TABLE_LEN]>::try_from(shifts) else {
            return wrong(format!(
                "{} shifts, expected {SHIFT_TABLE_LEN}",
                shifts.len()
            ));
        };
        for shift in &mut shifts {
            *shift = (usize::from(*shift) % levels.len()) as u8;
        }
        Ok(Self {
            k,
            shifts,
            levels: levels.to_vec(),
            float_levels: levels.iter().map(|&level| f32::from(level)).collect(),
            unit,
        })
    }

    /// The built-in code of `k` bits, trained on Gaussian weights by
    /// `examples/train_trellis_tables.rs`.
    ///
    /// Errors (`Argument`): `k` is not 2, 3 or 4.
    pub fn standard(k: u8) -> Result<Self> {
        match k {
            2 => Self::new(k, &T2.shifts, &T2.levels, T2.unit),
            3 => Self::new(k, &T3.shifts, &T3.levels, T3.unit),
            4 => Self::new(k, &T4.shifts, &T4.levels, T4.unit),
            _ => Self::new(k, &[], &[], 1.0),
        }
    }

    /// Bits a weight.
    pub fn k(&self) -> u8 {
        self.k
    }

    /// The shift table `S`.
    pub fn shifts(&self) -> &[u8; SHIFT_TABLE_LEN] {
        &self.shifts
    }

    /// The level table `T`.
    pub fn levels(&self) -> &[i8] {
        &self.levels
    }

    /// The standard deviation, in levels, of the weights that the levels are made for.
    pub fn unit(&self) -> f32 {
        self.unit
    }

    /// The level of `state`.
    pub fn level(&self, state: u16) -> i8 {
        level(state, &self.shifts, &self.levels)
    }

    pub(super) fn float_levels(&self) -> &[f32] {
        &self.float_levels
    }
}

/// What [`Code::new`] takes. The constants are the output of `examples/train_trellis_tables.rs`.
struct Tables<const N: usize> {
    unit: f32,
    shifts: [u8; SHIFT_TABLE_LEN],
    levels: [i8; N],
}
/// -11.67 dB on Gaussian weights.
static T2: Tables<128> = Tables {
    unit: 36.0,
    shifts: [
        64, 32, 96, 0, 22, 86, 54, 118, 72, 8, 104, 40, 46, 14, 78, 110, 114, 82, 18, 50, 74, 106,
        10, 42, 62, 94, 126, 30, 116, 84, 20, 52, 56, 120, 24, 88, 102, 70, 38, 6, 92, 28, 60, 124,
        100, 68, 36, 4, 98, 66, 34, 2, 26, 58, 122, 90, 108, 44, 12, 76, 16, 80, 48, 112,
    ],
    levels: [
        -101, 28, 0, -69, -65, 30, -19, -18, -16, 34, 7, -48, 10, -44, 11, -42, -43, 44, -38, -39,
        15, 15, -7, 57, 56, 58, -31, -3, -28, 73, -1, 24, 25, -24, -22, 2, 29, 6, 30, 5, -55, -53,
        35, 36, 39, 9, -42, 41, 11, 12, -15, 47, 48, -8, -34, -6, 18, -5, -4, 21, -3, -2, -26, -1,
        -24, 0, 30, 27, 3, -63, 2, -55, 6, -17, -50, -15, -15, 38, 39, -12, -11, -42, 11, 14, -8,
        50, 52, -33, -32, -31, 21, -29, 21, 22, 81, -25, 1, -83, -72, -22, -21, -20, -61, 31, 32,
        6, -16, 8, -46, -12, -13, 11, 42, -11, 45, -9, -36, -35, 14, 17, -6, 19, 63, 63, 71, -27,
        23, 98,
    ],
};
/// -17.50 dB on Gaussian weights.
static T3: Tables<128> = Tables {
    unit: 36.0,
    shifts: [
        12, 44, 76, 124, 92, 60, 108, 28, 68, 4, 84, 100, 36, 52, 116, 20, 2, 18, 82, 114, 34, 98,
        66, 50, 94, 30, 126, 46, 14, 78, 110, 62, 6, 54, 70, 118, 102, 86, 38, 22, 58, 42, 122, 10,
        106, 74, 26, 90, 32, 48, 96, 112, 80, 0, 16, 64, 88, 104, 120, 56, 72, 24, 40, 8,
    ],
    levels: [
        0, -11, 45, 47, 28, -34, 4, -6, -57, -5, -4, -3, 9, -45, -1, -42, -41, 1, -38, -21, 3, -65,
        30, -56, 18, -52, 7, 68, 37, -2, -26, 24, 42, 44, 13, 14, 49, 50, -7, -33, -31, 7, -50,
        -28, -28, 10, -13, 11, -24, -23, 2, 28, -65, -8, -59, -18, 32, -16, 35, 20, -14, -13, 23,
        -12, 12, 13, 27, -72, -8, 16, -33, 31, -17, 35, 20, -15, -46, -27, 85, 104, -109, -88, -10,
        -9, -20, 4, 16, 17, 58, 59, -16, 8, 21, 39, 10, 0, -12, -39, -76, -37, -36, -20, -19, 5,
        -5, -30, 62, -48, 69, 75, -43, 41, 25, 26, -22, 2, 15, 31, 52, 54, 6, 19, -29, 36, -3, 22,
        40, -25,
    ],
};
/// -23.31 dB on Gaussian weights.
static T4: Tables<256> = Tables {
    unit: 36.0,
    shifts: [
        128, 72, 152, 112, 32, 248, 80, 96, 192, 16, 232, 176, 88, 40, 56, 8, 68, 12, 92, 212, 108,
        100, 20, 188, 156, 172, 52, 116, 36, 204, 252, 4, 142, 22, 254, 6, 102, 190, 238, 78, 94,
        86, 158, 174, 198, 118, 182, 38, 106, 50, 162, 2, 218, 58, 170, 250, 98, 242, 66, 74, 10,
        146, 26, 210,
    ],
    levels: [
        42, 25, 14, 27, 68, -45, 30, 5, -32, -31, -30, 14, -14, 22, 39, -33, 0, -52, -10, 36, -47,
        -2, -44, -12, -11, -88, 7, 46, 48, -27, 10, -18, -24, 13, 26, 20, 28, 73, 23, -25, 32, 33,
        34, -37, 9, 38, 16, 24, -41, 7, -50, 8, -20, -63, -34, 11, -119, 59, 2, -9, -3, -35, -60,
        -42, -55, -23, 20, -21, -8, -13, -7, 98, 12, -10, 61, -49, 37, 16, 52, 17, 6, -16, -16,
        -15, -36, -20, 4, 54, 18, 43, -38, -29, -66, 4, -19, 40, 56, 1, -76, -70, 15, 29, -13, 31,
        25, -5, -4, 65, 3, 50, -26, -57, -17, -40, 45, -3, 21, 10, -1, -6, -4, 19, -22, 2, -28, -8,
        81, 0, 43, 26, 14, 28, 70, -45, 31, 6, -31, -30, -29, 14, -14, 22, 40, -32, 1, -51, -9, 36,
        -46, -2, -43, -12, -11, -81, 8, 47, 49, -26, 11, -18, -24, 13, 27, 21, 29, 76, 23, -24, 33,
        34, 35, -37, 9, 39, 17, 24, -40, 7, -50, 8, -20, -61, -33, 11, -100, 60, 2, -9, -2, -34,
        -58, -42, -54, -23, 20, -21, -8, -13, -6, 117, 12, -10, 63, -48, 37, 16, 53, 18, 6, -16,
        -15, -15, -35, -19, 5, 55, 18, 44, -38, -28, -64, 4, -18, 41, 57, 1, -73, -68, 15, 30, -12,
        32, 25, -4, -4, 66, 3, 51, -25, -56, -17, -39, 46, -3, 22, 10, -1, -6, -5, 19, -22, 3, -27,
        -7, 87, 0,
    ],
};

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

struct Tables<const N: usize> {
    unit: f32,
    shifts: [u8; SHIFT_TABLE_LEN],
    levels: [i8; N],
}
static T2: Tables<128> = Tables {
    unit: 32.0,
    shifts: [0; 64],
    levels: [0; 128],
};
static T3: Tables<128> = Tables {
    unit: 32.0,
    shifts: [0; 64],
    levels: [0; 128],
};
static T4: Tables<128> = Tables {
    unit: 32.0,
    shifts: [0; 64],
    levels: [0; 128],
};

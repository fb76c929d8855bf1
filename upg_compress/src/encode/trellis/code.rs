//! The codes of the trellis encodings as the search wants them.
#![forbid(unsafe_code)]

use upg_kernel::trellis_code::{SHIFTS, TrellisCode};
use upg_kernel::{Error, ErrorKind, Result};

/// Standard deviation, in levels, of the weights that the codes of the encodings are made for.
pub const UNIT: f32 = 40.0;

/// A trellis code of `k` bits a weight: `level = T[(S[state & 63] + (state >> 6)) & (len - 1)]`.
#[derive(Debug, Clone)]
pub struct Code {
    k: u8,
    code: TrellisCode,
    shifts: [u8; SHIFTS],
    float_levels: Vec<f32>,
    unit: f32,
}

impl Code {
    /// A code with `k` bits a weight, made for weights with a standard deviation of `unit` levels.
    ///
    /// Errors (`Argument`): `k` is not 2, 3 or 4, or `unit` is not positive and finite.
    pub fn new(k: u8, code: TrellisCode, unit: f32) -> Result<Self> {
        if !(2..=4).contains(&k) {
            return Err(no_code(k));
        }
        if !(unit > 0.0 && unit.is_finite()) {
            let message = format!("a standard deviation of {unit} levels");
            return Err(Error::new(ErrorKind::Argument, message));
        }
        let levels = &code.level_table()[..code.levels()];
        Ok(Self {
            k,
            code,
            shifts: code.shift_table(),
            float_levels: levels.iter().map(|&level| f32::from(level)).collect(),
            unit,
        })
    }

    /// The code of the encoding with `k` bits a weight, found by `examples/train_trellis_codes.rs`.
    ///
    /// Errors (`Argument`): `k` is not 2, 3 or 4.
    pub fn standard(k: u8) -> Result<Self> {
        let code = TrellisCode::of(k).ok_or_else(|| no_code(k))?;
        Self::new(k, *code, UNIT)
    }

    /// Bits a weight.
    pub fn k(&self) -> u8 {
        self.k
    }

    /// The standard deviation, in levels, of the weights that the levels are made for.
    pub fn unit(&self) -> f32 {
        self.unit
    }

    /// The level of `state`.
    pub fn level(&self, state: u16) -> i8 {
        self.code.level(state)
    }

    /// The shift table `S`, whose entries are below the number of levels.
    pub(super) fn shifts(&self) -> &[u8; SHIFTS] {
        &self.shifts
    }

    /// The level table `T`: 128 or 256 entries.
    pub(super) fn float_levels(&self) -> &[f32] {
        &self.float_levels
    }
}

fn no_code(k: u8) -> Error {
    let message = format!("{k} bits a weight, the trellis codes have 2, 3 or 4");
    Error::new(ErrorKind::Argument, message)
}

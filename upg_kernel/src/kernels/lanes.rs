//! Vectors of sixteen numbers.
#![forbid(unsafe_code)]

use half::f16;

/// Vector of sixteen f32, in as many registers as the instruction set needs.
pub(crate) trait Lanes: Copy {
    /// Proof that this machine has the instructions.
    type Proof: Copy;

    /// Returns the same number in every lane.
    fn splat(proof: Self::Proof, value: f32) -> Self;

    /// Loads numbers from memory.
    fn load(proof: Self::Proof, values: &[f32; 16]) -> Self;

    /// Loads numbers from memory and widens them from half precision.
    fn widen(proof: Self::Proof, values: &[f16; 16]) -> Self;

    /// Computes `self * b + c`; the instruction set determines whether the product is rounded.
    fn mul_add(self, b: Self, c: Self) -> Self;

    /// Stores the numbers to memory.
    fn store(self, out: &mut [f32; 16]);
}

impl Lanes for [f32; 16] {
    type Proof = ();

    #[inline(always)]
    fn splat((): (), value: f32) -> Self {
        [value; 16]
    }

    #[inline(always)]
    fn load((): (), values: &[f32; 16]) -> Self {
        *values
    }

    #[inline(always)]
    fn widen((): (), values: &[f16; 16]) -> Self {
        values.map(f16::to_f32)
    }

    #[inline(always)]
    fn mul_add(mut self, b: Self, c: Self) -> Self {
        for lane in 0..16 {
            self[lane] = self[lane] * b[lane] + c[lane];
        }
        self
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        *out = self;
    }
}

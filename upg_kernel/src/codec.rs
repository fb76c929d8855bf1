//! The encodings and their table.
//!
//! Each has one file with its arrays, checks, sizes and reference decoder.
#![forbid(unsafe_code)]

pub(crate) mod bitmap;
pub(crate) mod dense;
pub(crate) mod encoding;
pub(crate) mod grouped;
pub(crate) mod layer;
pub(crate) mod levels;
pub(crate) mod mdcsr;
pub(crate) mod stored;
pub mod strips;
pub mod trellis;

use crate::error::{Error, ErrorKind, Result};
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use crate::matrix::Matrix;
use encoding::Encoding;
use layer::{ArraySpec, LayerInfo};

/// Makes the methods of [`LayerInfo`] that the codec of its encoding has.
macro_rules! codecs {
    ($($encoding:ident, $codec:path, $matrix:ident;)*) => {
        impl LayerInfo {
            /// Checks the parameters (rule 6).
            fn check_parameters(&self) -> Result<()> {
                match self.encoding().map_err(|e| e.rule(rules::ENCODING))? {
                    $(Encoding::$encoding => ($codec.check)(self),)*
                }
            }

            /// Returns the arrays in the order in which they are written (rule 7).
            pub(crate) fn arrays(&self) -> Result<Vec<ArraySpec>> {
                match self.encoding()? {$(Encoding::$encoding => ($codec.arrays)(self),)*}
            }

            /// Checks scales and pointers (rules 9 and 10).
            pub(crate) fn check_opened(&self, arrays: &LayerArrays<'_>) -> Result<()> {
                match self.encoding()? {
                    $(Encoding::$encoding => ($codec.check_opened)(self, arrays),)*
                }
            }

            /// Makes and checks the matrix. Reads the bits and columns of sparse matrices.
            pub(crate) fn matrix(&self, arrays: &LayerArrays<'_>) -> Result<Matrix> {
                Ok(match self.encoding()? {
                    $(Encoding::$encoding => Matrix::$matrix(($codec.matrix)(self, arrays)?),)*
                })
            }
        }
    };
}

// The table: an encoding, its codec, and how a `Matrix` holds it.
codecs! {
    MdCsr, mdcsr::MDCSR, MdCsr;
    Q8, grouped::Q8, Grouped;
    Q4, grouped::Q4, Grouped;
    T2, trellis::T2, Trellis;
    T3, trellis::T3, Trellis;
    T4, trellis::T4, Trellis;
    S8, bitmap::S8, Bitmap;
    S4, bitmap::S4, Bitmap;
}

impl LayerInfo {
    /// Checks name, sizes and parameters (rules 5 and 6), as opening a file does.
    ///
    /// Errors: `Invalid`, `TooLarge` or `Unsupported` with the rule.
    pub fn check(&self) -> Result<()> {
        rules::name(&self.name, rules::LAYERS)?;
        self.encoding().map_err(|e| e.rule(rules::ENCODING))?;
        let (rows, cols) = (self.rows, self.cols);
        let fits = (1..=rules::MOST_ROWS).contains(&rows) && (1..=rules::MOST_COLS).contains(&cols);
        let weights = rows.checked_mul(cols);
        if !fits || weights.is_none_or(|n| n > rules::LARGEST_MATRIX) {
            let message = format!("a matrix [{rows}, {cols}] is outside the limits");
            return Err(Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS));
        }
        self.check_parameters()
    }

    /// Bytes of each of its arrays, in the order of writing.
    ///
    /// An upper bound for the arrays of `mdcsr`, `s8` and `s4` with a value for each stored weight:
    /// they are counted as if every weight were stored.
    ///
    /// Errors: those of [`LayerInfo::check`].
    pub fn array_bytes(&self) -> Result<Vec<u64>> {
        self.check()?;
        Ok(self.arrays()?.iter().map(ArraySpec::most_bytes).collect())
    }
}

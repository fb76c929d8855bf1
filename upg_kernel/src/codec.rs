//! The encodings and their table.
//!
//! Each has one file with its arrays, checks, sizes and reference decoder.
#![forbid(unsafe_code)]

pub(crate) mod bitmap;
pub(crate) mod dense;
pub(crate) mod grouped;
pub(crate) mod layer;
pub(crate) mod levels;
pub(crate) mod mdcsr;
pub(crate) mod stored;
pub mod strips;
pub mod trellis;

use crate::error::{Error, ErrorKind, Result};
use crate::format::json;
use crate::format::rules;
use crate::format::tensors::LayerArrays;
use crate::matrix::Matrix;
use layer::{ArraySpec, LayerInfo};
use std::fmt;
use std::str::FromStr;

/// Makes the enum and its methods from the table.
macro_rules! encodings {
    ($($(#[$doc:meta])* $encoding:ident, $codec:path, $matrix:ident;)*) => {
        /// Encoding of the weights of a matrix.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Encoding {$($(#[$doc])* $encoding,)*}

        impl Encoding {
            /// Every encoding, in the order of the specification.
            pub const ALL: [Self; [$($codec.minor),*].len()] = [$(Self::$encoding),*];

            /// The name in files and on the command line.
            pub const fn name(self) -> &'static str {
                match self {$(Self::$encoding => $codec.name,)*}
            }

            /// Bits of a trellis code, if it is one of the trellis encodings.
            pub const fn trellis_bits(self) -> Option<u8> {
                match self {$(Self::$encoding => $codec.trellis_bits,)*}
            }

            /// The first minor version of the format that has it.
            pub(crate) fn minor(self) -> u16 {
                match self {$(Self::$encoding => $codec.minor,)*}
            }
        }

        impl LayerInfo {
            fn check_parameters(&self, encoding: Encoding) -> Result<()> {
                match encoding {$(Encoding::$encoding => ($codec.check)(self),)*}
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
encodings! {
    /// Delta-compressed sparse rows with a prime for every weight; 32 bits a weight, nearly
    /// lossless.
    MdCsr, mdcsr::MDCSR, MdCsr;
    /// int8 levels, a prime for every 64 columns; 8.13 bits a weight.
    Q8, grouped::Q8, Grouped;
    /// 4-bit codes into a codebook, a prime for every 32 columns; 4.26 bits a weight.
    Q4, grouped::Q4, Grouped;
    /// Trellis codes of 2 bits in a rotated basis; 2.01 bits a weight with 5120 columns.
    T2, trellis::T2, Trellis;
    /// Trellis codes of 3 bits; otherwise like `t2`.
    T3, trellis::T3, Trellis;
    /// Trellis codes of 4 bits; otherwise like `t2`.
    T4, trellis::T4, Trellis;
    /// `q8` levels of the weights that a bitmap names; the others are exactly zero. 1.13 bits a
    /// weight, and 8 for each stored weight.
    S8, bitmap::S8, Bitmap;
    /// `q4` codes of the weights that a bitmap names; about 1.16 bits a weight, and 4 for each
    /// stored weight.
    S4, bitmap::S4, Bitmap;
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Encoding {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|e| e.name() == name);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(" ");
            let name = json::cut(name);
            Error::new(ErrorKind::Unsupported, format!("unknown encoding '{name}'"))
                .hint(format!("known encodings: {known}"))
        })
    }
}

impl LayerInfo {
    /// Describes a layer, without parameters or error.
    pub fn new(name: impl Into<String>, rows: usize, cols: usize, encoding: Encoding) -> Self {
        Self {
            name: name.into(),
            rows,
            cols,
            encoding_name: encoding.name().to_owned(),
            group: None,
            hadamard: None,
            error: None,
        }
    }

    /// The name of the encoding.
    pub fn encoding_name(&self) -> &str {
        &self.encoding_name
    }

    /// The encoding; a layer of an open file always has a known one.
    pub fn encoding(&self) -> Result<Encoding> {
        self.encoding_name.parse()
    }

    /// Checks name, sizes and parameters (rules 5 and 6), as opening a file does.
    ///
    /// Errors: `Invalid`, `TooLarge` or `Unsupported` with the rule.
    pub fn check(&self) -> Result<()> {
        rules::name(&self.name, rules::LAYERS)?;
        let encoding = self.encoding().map_err(|e| e.rule(rules::ENCODING))?;
        let (rows, cols) = (self.rows, self.cols);
        let fits = (1..=rules::MOST_ROWS).contains(&rows) && (1..=rules::MOST_COLS).contains(&cols);
        let weights = rows.checked_mul(cols);
        if !fits || weights.is_none_or(|n| n > rules::LARGEST_MATRIX) {
            let message = format!("a matrix [{rows}, {cols}] is outside the limits");
            return Err(Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS));
        }
        self.check_parameters(encoding)
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

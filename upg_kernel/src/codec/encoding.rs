//! The names of the encodings.
#![forbid(unsafe_code)]

use crate::error::{Error, ErrorKind, Result};
use crate::format::json;
use std::fmt;
use std::str::FromStr;

/// Makes the enum, the list and the properties of its values.
macro_rules! encodings {
    ($($(#[$doc:meta])* $encoding:ident = $name:literal, $minor:literal;)*) => {
        /// Encoding of the weights of a matrix.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Encoding {$($(#[$doc])* $encoding,)*}

        impl Encoding {
            /// Every encoding, in the order of the specification.
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$encoding),*];

            /// The name in files and on the command line.
            pub const fn name(self) -> &'static str {
                match self {$(Self::$encoding => $name,)*}
            }

            /// The first minor version of the format that has it.
            pub(crate) fn minor(self) -> u16 {
                match self {$(Self::$encoding => $minor,)*}
            }
        }
    };
}

// Encoding = name, first minor version of the format.
encodings! {
    /// Delta-compressed sparse rows with a prime for every weight; 32 bits a weight, nearly
    /// lossless.
    MdCsr = "mdcsr", 0;
    /// int8 levels, a prime for every 64 columns; 8.13 bits a weight.
    Q8 = "q8", 1;
    /// 4-bit codes into a codebook, a prime for every 32 columns; 4.26 bits a weight.
    Q4 = "q4", 1;
    /// Trellis codes of 2 bits in a rotated basis; 2.01 bits a weight with 5120 columns.
    T2 = "t2", 1;
    /// Trellis codes of 3 bits; otherwise like `t2`.
    T3 = "t3", 1;
    /// Trellis codes of 4 bits; otherwise like `t2`.
    T4 = "t4", 1;
    /// `q8` levels of the weights that a bitmap names; the others are exactly zero. 1.13 bits a
    /// weight, and 8 for each stored weight.
    S8 = "s8", 1;
    /// `q4` codes of the weights that a bitmap names; about 1.16 bits a weight, and 4 for each
    /// stored weight.
    S4 = "s4", 1;
}

impl Encoding {
    /// Bits of a trellis code, if it is one of the trellis encodings.
    pub const fn trellis_bits(self) -> Option<u8> {
        match self {
            Self::T2 => Some(2),
            Self::T3 => Some(3),
            Self::T4 => Some(4),
            Self::MdCsr | Self::Q8 | Self::Q4 | Self::S8 | Self::S4 => None,
        }
    }
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

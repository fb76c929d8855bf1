//! Types of GGUF tensors, and decoding of the supported ones.
//!
//! Checked against the `gguf` package of llama.cpp (see the tests).
#![forbid(unsafe_code)]

use crate::source::model::{FloatType, SourceDtype};
use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use std::borrow::Cow;
use upg_kernel::{Error, ErrorKind, Result};

/// Supported tensor type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GgmlType {
    Float(FloatType),
    /// 32 values of 4 bits with a power of two as scale.
    Mxfp4,
    /// Quantized type, decoded by candle.
    Quantized(GgmlDType),
}

impl GgmlType {
    /// Returns the type by its number in the file.
    ///
    /// Errors (`Unsupported`): an unsupported type, with its name if it is known.
    pub(super) fn from_number(number: u32) -> Result<Self> {
        Ok(Self::Quantized(match number {
            0 => return Ok(Self::Float(FloatType::F32)),
            1 => return Ok(Self::Float(FloatType::F16)),
            30 => return Ok(Self::Float(FloatType::Bf16)),
            39 => return Ok(Self::Mxfp4),
            2 => GgmlDType::Q4_0,
            3 => GgmlDType::Q4_1,
            6 => GgmlDType::Q5_0,
            7 => GgmlDType::Q5_1,
            8 => GgmlDType::Q8_0,
            10 => GgmlDType::Q2K,
            11 => GgmlDType::Q3K,
            12 => GgmlDType::Q4K,
            13 => GgmlDType::Q5K,
            14 => GgmlDType::Q6K,
            15 => GgmlDType::Q8K,
            _ => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("GGUF type {}", unread_name(number)),
                )
                .hint(
                    "take a file with F16, BF16, Q8_0, Q4_0, MXFP4 or K-quant types (Q2_K to Q6_K)",
                ));
            }
        }))
    }

    /// Returns its name in llama.cpp.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Float(FloatType::F32) => "F32",
            Self::Float(FloatType::F16) => "F16",
            Self::Float(FloatType::Bf16) => "BF16",
            Self::Mxfp4 => "MXFP4",
            Self::Quantized(dtype) => match dtype {
                GgmlDType::Q4_0 => "Q4_0",
                GgmlDType::Q4_1 => "Q4_1",
                GgmlDType::Q5_0 => "Q5_0",
                GgmlDType::Q5_1 => "Q5_1",
                GgmlDType::Q8_0 => "Q8_0",
                GgmlDType::Q2K => "Q2_K",
                GgmlDType::Q3K => "Q3_K",
                GgmlDType::Q4K => "Q4_K",
                GgmlDType::Q5K => "Q5_K",
                GgmlDType::Q6K => "Q6_K",
                GgmlDType::Q8K => "Q8_K",
                _ => "?",
            },
        }
    }

    pub(super) fn source_dtype(self) -> SourceDtype {
        match self {
            Self::Float(float) => SourceDtype::Float(float),
            Self::Mxfp4 | Self::Quantized(_) => SourceDtype::Quantized(self.name()),
        }
    }

    /// Returns the values of one block; at least 1.
    pub(super) fn block_values(self) -> usize {
        match self {
            Self::Float(_) => 1,
            Self::Mxfp4 => 32,
            Self::Quantized(dtype) => dtype.block_size(),
        }
    }

    /// Returns the bytes of one block.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Float(float) => float.size(),
            Self::Mxfp4 => 17,
            Self::Quantized(dtype) => dtype.type_size(),
        }
    }

    /// Returns the bytes of `values` values, which are whole blocks.
    pub(super) fn bytes_of(self, values: usize) -> usize {
        values / self.block_values() * self.block_bytes()
    }

    /// Decodes whole blocks into `out`.
    ///
    /// Cost for quantized types: a copy of the blocks and of the values, so callers pass a few rows
    /// at a time.
    ///
    /// Errors (`Malformed`): `bytes` are not the blocks of `out.len()` values.
    pub(super) fn to_f32(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        let wrong_size = || {
            Error::new(
                ErrorKind::Malformed,
                format!(
                    "{} bytes for {} {} values",
                    bytes.len(),
                    out.len(),
                    self.name()
                ),
            )
        };
        let blocks = out.len() / self.block_values();
        if blocks * self.block_values() != out.len()
            || blocks.checked_mul(self.block_bytes()) != Some(bytes.len())
        {
            return Err(wrong_size());
        }
        let dtype = match self {
            Self::Float(float) => return float.to_f32(bytes, out),
            Self::Mxfp4 => {
                mxfp4_to_f32(bytes, out);
                return Ok(());
            }
            Self::Quantized(dtype) => dtype,
        };
        // candle casts the bytes to its blocks and asserts their alignment (2 bytes, Q8_K: 4). The
        // header guarantees it for mapped tensors; other callers get a copy.
        let align = if dtype == GgmlDType::Q8K { 4 } else { 2 };
        let mut aligned = Vec::new();
        let bytes = if bytes.as_ptr().addr().is_multiple_of(align) {
            bytes
        } else {
            aligned.resize(bytes.len().div_ceil(8), 0u64);
            let copy = bytemuck::cast_slice_mut::<u64, u8>(&mut aligned);
            let copy = copy.get_mut(..bytes.len()).ok_or_else(wrong_size)?;
            copy.copy_from_slice(bytes);
            &*copy
        };
        match dtype
            .from_data(Cow::Borrowed(bytes))
            .dequantize(out.len())?
        {
            CpuStorage::F32(values) if values.len() == out.len() => out.copy_from_slice(&values),
            _ => return Err(wrong_size()),
        }
        Ok(())
    }
}

/// Levels of MXFP4: twice those of a float with two bits of exponent and one of mantissa.
const MXFP4_LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Decodes whole blocks of MXFP4 (ggml-quants.c, `dequantize_row_mxfp4`).
///
/// A block is an exponent and 16 bytes, whose lower halves come before the upper ones.
fn mxfp4_to_f32(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytes.as_chunks::<17>().0.iter();
    for ([exponent, codes @ ..], out) in blocks.zip(out.as_chunks_mut::<32>().0) {
        // Half of the scale, because the levels are doubled; exact in f64 and f32.
        let scale = 2f64.powi(i32::from(*exponent) - 128) as f32;
        let level = |code: u8| f32::from(MXFP4_LEVELS[usize::from(code)]) * scale;
        for (i, code) in codes.iter().enumerate() {
            out[i] = level(code & 15);
            out[i + 16] = level(code >> 4);
        }
    }
}

/// Returns the name of an unsupported type (ggml.h, `enum ggml_type`).
fn unread_name(number: u32) -> String {
    let name = match number {
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        _ => return format!("number {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks, decoded by hand.
    #[test]
    fn mxfp4_values() {
        let kind = GgmlType::from_number(39).unwrap();
        assert_eq!((kind.block_values(), kind.block_bytes()), (32, 17));
        let mut bytes = vec![128];
        bytes.extend((0..16).map(|code: u8| code | (15 - code) << 4));
        bytes.push(0);
        bytes.extend([0x21; 16]);
        let mut out = [0.0; 64];
        kind.to_f32(&bytes, &mut out).unwrap();
        let levels = [
            0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.,
        ];
        assert_eq!(out[..16], levels);
        assert!(out[16..32].iter().eq(levels.iter().rev()));
        let smallest = 2f32.powi(-127) / 2.0;
        assert_eq!(out[32..48], [smallest; 16]);
        assert_eq!(out[48..], [2.0 * smallest; 16]);
        assert!(kind.to_f32(&bytes[1..], &mut out).is_err());
        assert!(kind.to_f32(&bytes, &mut out[1..]).is_err());
    }
}

//! Rebuilding whole matrices from a UPG file.
#![forbid(unsafe_code)]

use crate::cpu::Cpu;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{LayerInfo, UpgFile};
use crate::kernels::Float;
use crate::matrix::Matrix;
use crate::matrix::decode::Decode;
use crate::matrix::strips::STRIP_ROWS;
use crate::prime_lut::PrimeIndex;
#[cfg(feature = "candle")]
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;

/// From so many bytes on a matrix is written past the caches: it would not stay in them, and memory
/// that is only overwritten need not be read. Few processors have more cache than that for a core.
const STREAMED: usize = 8 << 20;

/// A weight type that a matrix can be decompressed to: `f32`, `f16` or `bf16`.
pub trait WeightFloat: Float + Decode + Into<f32> + Send + Sync {
    /// The nearest value of each weight, ties to even. Errors: those of [`Cpu::shared`]. Panics if
    /// the lengths differ.
    fn from_weights(weights: &[f32], out: &mut [Self]) -> Result<()> {
        Self::round(Cpu::shared()?.kernels(), weights, out);
        Ok(())
    }
}

impl WeightFloat for f32 {}
impl WeightFloat for f16 {}
impl WeightFloat for bf16 {}

/// A layer by its number or by the name of its source tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerId<'a> {
    /// Position in the list of layers.
    Number(usize),
    /// Hugging Face name, for example `model.layers.0.mlp.down_proj.weight`.
    Name(&'a str),
}

impl From<usize> for LayerId<'_> {
    fn from(number: usize) -> Self {
        Self::Number(number)
    }
}

impl<'a> From<&'a str> for LayerId<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

/// The weight of value 1: `scale * PRIME_LUT[prime_index]`, rounded to f16 (infinite from 65,520
/// on).
pub fn reconstruct_weight(prime_index: PrimeIndex, scale: f32) -> f16 {
    f16::from_f32(scale * prime_index.prime() as f32)
}

/// Decompresses the layers of one UPG file; cheap to clone, safe to share between threads.
#[derive(Clone)]
pub struct UPGDecompressor {
    file: Arc<UpgFile>,
}

impl UPGDecompressor {
    /// Opens and checks a UPG file; see [`UpgFile::open`] for cost and errors.
    ///
    /// ```no_run
    /// # fn main() -> upg_kernel::Result<()> {
    /// let model = upg_kernel::UPGDecompressor::from_safetensors("model.safetensors")?;
    /// let (info, matrix) = model.layer("model.layers.0.mlp.down_proj.weight")?;
    /// let mut weights = vec![0.0f32; info.rows * info.cols];
    /// model.decompress_layer_into(0, &mut weights)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn from_safetensors(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::new(Arc::new(UpgFile::open(path)?)))
    }

    /// Decompresses from a file that is already open.
    pub fn new(file: Arc<UpgFile>) -> Self {
        Self { file }
    }

    /// The open file.
    pub fn file(&self) -> &Arc<UpgFile> {
        &self.file
    }

    /// Number of compressed layers.
    pub fn num_layers(&self) -> usize {
        self.file.layers().len()
    }

    /// Fills `out` (`rows * cols` values, row by row) with layer `id`; allocates only one tile of
    /// 64 rows per thread. Errors: `Argument` for an unknown layer or another length of `out`, and
    /// those of [`UpgFile::matrix`].
    pub fn decompress_layer_into<'a, T: WeightFloat>(
        &self,
        id: impl Into<LayerId<'a>>,
        out: &mut [T],
    ) -> Result<()> {
        let (_, matrix) = self.layer(id.into())?;
        fill(matrix, out)
    }

    /// Description and matrix of a layer. Errors: `Argument` for an unknown layer, and those of
    /// [`UpgFile::matrix`].
    pub fn layer<'a>(&self, id: impl Into<LayerId<'a>>) -> Result<(&LayerInfo, &Matrix)> {
        let number = match id.into() {
            LayerId::Number(number) => number,
            LayerId::Name(name) => self.file.layer_id(name).ok_or_else(|| {
                Error::new(ErrorKind::Argument, "no compressed layer of this name")
                    .tensor(name)
                    .at(self.file.path())
                    .hint("`upg inspect` lists the names")
            })?,
        };
        let matrix = self.file.matrix(number)?;
        Ok((&self.file.layers()[number], matrix))
    }
}

#[cfg(feature = "candle")]
impl UPGDecompressor {
    /// Layer `id` as a BF16 tensor `[rows, cols]` on the CPU.
    ///
    /// Allocates 2 bytes a weight; tiles of 64 rows are decoded in parallel. Errors: `Argument` for
    /// an unknown layer, `TooLarge` if the memory is not to be had, and those of
    /// [`UpgFile::matrix`].
    pub fn decompress_layer<'a>(&self, id: impl Into<LayerId<'a>>) -> Result<Tensor> {
        self.decompress_layer_as(id, DType::BF16)
    }

    /// [`UPGDecompressor::decompress_layer`] as BF16, F16 or F32, rounded to nearest, ties to even.
    /// F16 overflows to infinity from 65,520 on. Errors: `Argument` for any other type.
    pub fn decompress_layer_as<'a>(
        &self,
        id: impl Into<LayerId<'a>>,
        dtype: DType,
    ) -> Result<Tensor> {
        let id = id.into();
        match dtype {
            DType::BF16 => self.tensor::<bf16>(id),
            DType::F16 => self.tensor::<f16>(id),
            DType::F32 => self.tensor::<f32>(id),
            other => Err(Error::new(
                ErrorKind::Argument,
                format!("weights cannot be decompressed to {other:?}"),
            )
            .hint("use BF16, F16 or F32")),
        }
    }

    fn tensor<T: WeightFloat + WithDType>(&self, id: LayerId<'_>) -> Result<Tensor> {
        let (info, matrix) = self.layer(id)?;
        let (rows, cols) = (info.rows, info.cols);
        let mut out: Vec<T> = Vec::new();
        out.try_reserve_exact(rows * cols).map_err(|e| {
            Error::new(
                ErrorKind::TooLarge,
                format!("no memory for [{rows}, {cols}]: {e}"),
            )
            .tensor(&info.name)
        })?;
        out.resize(rows * cols, T::default());
        fill(matrix, &mut out)?;
        Ok(Tensor::from_vec(out, (rows, cols), &Device::Cpu)?)
    }
}

fn fill<T: WeightFloat>(matrix: &Matrix, out: &mut [T]) -> Result<()> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    if rows.checked_mul(cols) != Some(out.len()) {
        return Err(Error::new(
            ErrorKind::Argument,
            format!(
                "a buffer of {} values for a matrix [{rows}, {cols}]",
                out.len()
            ),
        ));
    }
    if out.is_empty() {
        return Ok(());
    }
    let kernels = Cpu::shared()?.kernels();
    let streamed = size_of_val(out) >= STREAMED;
    out.par_chunks_mut(STRIP_ROWS * cols)
        .enumerate()
        .for_each_init(Vec::new, |scratch, (strip, out)| {
            matrix.decode(kernels, strip * STRIP_ROWS, streamed, out, scratch);
        });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_scale_times_prime() {
        let index = |i| PrimeIndex::new(i).unwrap();
        assert_eq!(reconstruct_weight(index(0), 0.5), f16::from_f32(1.0));
        assert_eq!(reconstruct_weight(index(3), -0.25), f16::from_f32(-1.75));
        // 104,729 has 17 bits, a half has 11: the nearest is a multiple of 64.
        let largest = reconstruct_weight(index(9_999), 0.5);
        assert_eq!(largest.to_f32(), 52_352.0);
        assert_eq!(reconstruct_weight(index(9_999), 1.0), f16::INFINITY);
    }
}

//! Linear layer for candle whose weights stay compressed.

use crate::error::{Error, ErrorKind, Result};
use crate::matrix::Matrix;
#[cfg(all(feature = "metal", target_vendor = "apple"))]
use crate::metal_kernels::OnMetal;
use crate::upg_decompress::{LayerId, UPGDecompressor, WeightFloat};
use candle_core::{
    CpuStorage, CustomOp1, DType, Layout, MetalStorage, Module, Result as CandleResult, Shape,
    Tensor,
};
use half::{bf16, f16};
use std::sync::Arc;

/// Linear layer `y = W x + b` for candle models, like `candle_nn::Linear`, with `W` in a UPG
/// encoding.
///
/// The input is `[.., cols]` in F32, F16 or BF16, the output `[.., rows]` in the same type; sums
/// are in f32. On the CPU products are those of [`Matrix::spmm`] (`docs/numerics.md`). On candle's
/// Metal device, with the feature `metal`, they are those of [`crate::metal_kernels`], which need a
/// compressed matrix. Nothing is decompressed. There is no gradient. Clones share the weights.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use candle_core::{DType, Device, Module, Tensor};
/// use upg_kernel::{Matrix, UpgLinear, sparse::MdCSRMatrix};
///
/// let w = MdCSRMatrix::from_dense(&[0.5, 0.0, 0.0, -2.0, 0.0, 1.0], 2, 3)?;
/// let layer = UpgLinear::new(Matrix::MdCsr(w), None)?;
/// let x = Tensor::ones((4, 7, 3), DType::F32, &Device::Cpu)?; // batch, position, column
/// assert_eq!(layer.forward(&x)?.dims(), [4, 7, 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct UpgLinear {
    product: Arc<Product>,
    bias: Option<Tensor>,
}

impl UpgLinear {
    /// Creates a layer of this matrix. A matrix of a mapped file stays there.
    ///
    /// Errors (`Shape`): `bias` is not `[rows]`.
    pub fn new(matrix: Matrix, bias: Option<Tensor>) -> Result<Self> {
        if let Some(bias) = &bias
            && bias.dims() != [matrix.rows()]
        {
            let message = format!("a bias {:?} for {} rows", bias.dims(), matrix.rows());
            return Err(Error::new(ErrorKind::Shape, message));
        }
        let product = Product {
            matrix,
            #[cfg(all(feature = "metal", target_vendor = "apple"))]
            on_metal: OnMetal::default(),
        };
        Ok(Self {
            product: Arc::new(product),
            bias,
        })
    }

    /// Creates a layer from layer `id` of an open file, without a bias.
    ///
    /// Errors: those of [`UPGDecompressor::layer`].
    pub fn from_file<'a>(file: &UPGDecompressor, id: impl Into<LayerId<'a>>) -> Result<Self> {
        let (_, matrix) = file.layer(id)?;
        Self::new(matrix.clone(), None)
    }

    /// Returns the weights.
    pub fn matrix(&self) -> &Matrix {
        &self.product.matrix
    }

    /// Returns the bias.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for UpgLinear {
    /// Computes `W x + b`.
    ///
    /// Errors: the last dimension is not the columns of the matrix, a type other than F32, F16 and
    /// BF16, and those of the device.
    fn forward(&self, x: &Tensor) -> CandleResult<Tensor> {
        let cols = self.product.matrix.cols();
        if x.dims().last() != Some(&cols) {
            let dims = x.dims();
            candle_core::bail!(
                "an input {dims:?} for a layer of {cols} columns, expected [.., {cols}]"
            );
        }
        if x.elem_count() == 0 {
            let mut dims = x.dims().to_vec();
            *dims.last_mut().expect("checked above") = self.product.matrix.rows();
            return Tensor::zeros(dims, x.dtype(), x.device());
        }
        // GPU kernels have no bf16.
        let dtype = x.dtype();
        let is_wide = x.device().is_metal() && dtype == DType::BF16;
        let x = if is_wide {
            x.to_dtype(DType::F32)?
        } else {
            x.clone()
        };
        let y = x.contiguous()?.apply_op1_no_bwd(&*self.product)?;
        let y = if is_wide { y.to_dtype(dtype)? } else { y };
        match &self.bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(bias),
        }
    }
}

#[derive(Debug)]
struct Product {
    matrix: Matrix,
    #[cfg(all(feature = "metal", target_vendor = "apple"))]
    on_metal: OnMetal,
}

impl Product {
    fn shape(&self, layout: &Layout) -> Shape {
        let mut dims = layout.dims().to_vec();
        *dims.last_mut().expect("a last dimension") = self.matrix.rows();
        Shape::from(dims)
    }

    /// Computes `[vectors, rows]`, rounded to the type of `x`.
    fn on_cpu<T: WeightFloat>(&self, x: &[T], layout: &Layout) -> CandleResult<Vec<T>> {
        let (start, end) = layout.contiguous_offsets().expect("made contiguous before");
        let x: Vec<f32> = x[start..end].iter().map(|&x| x.into()).collect();
        let vectors = x.len() / self.matrix.cols();
        let sums = self
            .matrix
            .spmm(&x, vectors)
            .map_err(candle_core::Error::wrap)?;
        let mut y = vec![T::default(); sums.len()];
        T::from_weights(&sums, &mut y).map_err(candle_core::Error::wrap)?;
        Ok(y)
    }
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "upg-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> CandleResult<(CpuStorage, Shape)> {
        let y = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.on_cpu::<f32>(x, layout)?),
            CpuStorage::F16(x) => CpuStorage::F16(self.on_cpu::<f16>(x, layout)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.on_cpu::<bf16>(x, layout)?),
            other => {
                use candle_core::backend::BackendStorage;
                let dtype = other.dtype();
                candle_core::bail!("an input of {dtype:?}, expected F32, F16 or BF16")
            }
        };
        Ok((y, self.shape(layout)))
    }

    #[cfg(all(feature = "metal", target_vendor = "apple"))]
    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        let y = self.on_metal.product(&self.matrix, x, layout);
        Ok((y.map_err(candle_core::Error::wrap)?, self.shape(layout)))
    }

    #[cfg(not(all(feature = "metal", target_vendor = "apple")))]
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> CandleResult<(MetalStorage, Shape)> {
        candle_core::bail!("upg_kernel was built without its feature `metal`")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::{grouped, trellis};
    use candle_core::Device;

    fn layers() -> [UpgLinear; 2] {
        let (rows, cols) = (67, 130);
        let q8 = Matrix::Grouped(grouped(rows, cols, 64, false));
        let t3 = Matrix::Trellis(trellis(rows, cols, 3, 128));
        // Like the scales of trained weights; those of the test data have any size.
        let scales: Vec<f32> = (0..rows).map(|r| 1e-6 * (1 + r % 7) as f32).collect();
        [q8, t3].map(|m| UpgLinear::new(m.with_scales(scales.clone()).unwrap(), None).unwrap())
    }

    fn input() -> Tensor {
        let values: Vec<f32> = (0..2 * 3 * 130).map(|i| (i as f32 * 0.37).sin()).collect();
        Tensor::from_vec(values, (2, 3, 130), &Device::Cpu).unwrap()
    }

    #[test]
    fn is_a_product_with_the_decompressed_matrix_in_every_type() {
        for layer in layers() {
            let (rows, cols) = (layer.matrix().rows(), layer.matrix().cols());
            let w =
                Tensor::from_vec(layer.matrix().to_dense(), (rows, cols), &Device::Cpu).unwrap();
            for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::F16, 2e-3), (DType::BF16, 1e-2)]
            {
                let x = input().to_dtype(dtype).unwrap();
                let y = layer.forward(&x).unwrap();
                assert_eq!((y.dims(), y.dtype()), (&[2, 3, rows][..], dtype));
                let x = x.to_dtype(DType::F32).unwrap();
                let expected = x.broadcast_matmul(&w.t().unwrap()).unwrap();
                let norm = |t: &Tensor| {
                    let squares = t.sqr().unwrap().sum_all().unwrap();
                    squares.to_scalar::<f32>().unwrap().sqrt()
                };
                let error = norm(&(y.to_dtype(DType::F32).unwrap() - &expected).unwrap());
                assert!(error <= tolerance * norm(&expected), "{dtype:?}: {error}");
            }
        }
    }

    #[test]
    fn takes_parts_and_transposed_inputs() {
        let [layer, _] = layers();
        let all: Vec<Vec<Vec<f32>>> = layer.forward(&input()).unwrap().to_vec3().unwrap();
        let part = input().narrow(0, 1, 1).unwrap();
        let part: Vec<Vec<Vec<f32>>> = layer.forward(&part).unwrap().to_vec3().unwrap();
        assert_eq!(part[0], all[1]);
        let swapped = input().transpose(0, 1).unwrap();
        let swapped: Vec<Vec<Vec<f32>>> = layer.forward(&swapped).unwrap().to_vec3().unwrap();
        assert_eq!(swapped[2][1], all[1][2]);
    }

    #[test]
    fn adds_its_bias() {
        let [layer, _] = layers();
        let x = Tensor::zeros((2, 130), DType::F32, &Device::Cpu).unwrap();
        let values: Vec<f32> = (0..67).map(|i| i as f32).collect();
        let bias = Tensor::new(values.as_slice(), &Device::Cpu).unwrap();
        let layer = UpgLinear::new(layer.matrix().clone(), Some(bias)).unwrap();
        let y: Vec<Vec<f32>> = layer.forward(&x).unwrap().to_vec2().unwrap();
        assert_eq!(y, [values.clone(), values]);
    }

    #[test]
    fn other_shapes_and_types_are_refused() {
        let [layer, _] = layers();
        let error = |x: Tensor| layer.forward(&x).unwrap_err().to_string();
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        assert!(error(zeros(&[2, 131], DType::F32)).contains("[.., 130]"));
        assert!(error(zeros(&[], DType::F32)).contains("[.., 130]"));
        assert!(error(zeros(&[2, 130], DType::I64)).contains("F32, F16 or BF16"));
        let bias = Some(zeros(&[66], DType::F32));
        let bias = UpgLinear::new(layer.matrix().clone(), bias);
        assert_eq!(bias.err().unwrap().kind(), ErrorKind::Shape);
    }

    #[test]
    fn no_vectors_make_no_outputs() {
        let [layer, _] = layers();
        let x = Tensor::zeros((0, 130), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(layer.forward(&x).unwrap().dims(), [0, 67]);
    }
}

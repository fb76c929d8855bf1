//! Model that is read tensor by tensor: the trait [`Source`] and its tensors.
#![forbid(unsafe_code)]

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use upg_kernel::inference::model_dir::ModelFiles;
use upg_kernel::inference::weights::shape_mismatch;
use upg_kernel::inference::{Model, WeightSource};
use upg_kernel::matrix::{DenseMatrix, DenseValues, Matrix};
use upg_kernel::{Error, ErrorKind, Result};

/// Floating-point type of uncompressed tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FloatType {
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl FloatType {
    /// Returns the bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Returns the name that transformers writes as `torch_dtype`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// Converts little-endian `bytes` into `out`, exactly.
    ///
    /// Errors (`Malformed`): `bytes` are not `out.len()` values.
    pub fn to_f32(self, bytes: &[u8], out: &mut [f32]) -> Result<()> {
        if out.len().checked_mul(self.size()) != Some(bytes.len()) {
            return Err(Error::new(
                ErrorKind::Malformed,
                format!("{} bytes for {} {self} values", bytes.len(), out.len()),
            ));
        }
        match self {
            Self::F32 => {
                for (y, x) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *y = f32::from_le_bytes(*x);
                }
            }
            Self::F16 => {
                for (y, x) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *y = f16::from_le_bytes(*x).to_f32();
                }
            }
            Self::Bf16 => {
                for (y, x) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *y = bf16::from_le_bytes(*x).to_f32();
                }
            }
        }
        Ok(())
    }
}

impl From<FloatType> for Dtype {
    fn from(float: FloatType) -> Self {
        match float {
            FloatType::Bf16 => Self::BF16,
            FloatType::F16 => Self::F16,
            FloatType::F32 => Self::F32,
        }
    }
}

impl fmt::Display for FloatType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        })
    }
}

/// Type in which the source stores a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SourceDtype {
    /// Plain values.
    Float(FloatType),
    /// Quantized: a GGUF type by its name in llama.cpp (for example `Q4_K`), or a format of
    /// `compressed-tensors`.
    Quantized(&'static str),
}

impl fmt::Display for SourceDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(float) => float.fmt(f),
            Self::Quantized(name) => f.write_str(name),
        }
    }
}

/// Tensor of a source model, under its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Hugging Face name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Shape: `[rows, cols]` of a matrix, `[n]` of a vector.
    pub shape: Vec<usize>,
    /// Type in which the source stores it.
    pub dtype: SourceDtype,
}

impl TensorInfo {
    /// Describes a tensor of shape `[rows, cols]` or `[n]`.
    pub fn new(name: impl Into<String>, shape: Vec<usize>, dtype: SourceDtype) -> Self {
        Self {
            name: name.into(),
            shape,
            dtype,
        }
    }

    /// Returns the number of weights. Sources check at open that it fits a `usize`.
    pub fn weights(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the first dimension; 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Returns the type in which [`Source::read_raw`] returns it.
    pub fn raw_dtype(&self) -> FloatType {
        match self.dtype {
            SourceDtype::Float(float) => float,
            SourceDtype::Quantized(_) => FloatType::F32,
        }
    }

    /// Returns the columns of a matrix, 1 for a vector.
    pub fn cols(&self) -> usize {
        self.shape.iter().skip(1).product()
    }
}

/// Tensor of the source that is not part of the model, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SkippedTensor {
    /// Name in the source.
    pub name: String,
    /// Reason in one phrase, for example `computed from the config`.
    pub reason: &'static str,
}

impl SkippedTensor {
    /// Describes a tensor `name` that is skipped for this `reason`.
    pub fn new(name: impl Into<String>, reason: &'static str) -> Self {
        Self {
            name: name.into(),
            reason,
        }
    }
}

/// Bytes of an uncompressed tensor.
#[derive(Debug)]
#[non_exhaustive]
pub struct RawTensor<'a> {
    /// Type of the values.
    pub dtype: FloatType,
    /// Values row by row, little-endian.
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> RawTensor<'a> {
    /// Wraps bytes of values of type `dtype`, row by row, little-endian.
    pub fn new(dtype: FloatType, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        Self {
            dtype,
            bytes: bytes.into(),
        }
    }

    /// Copies dequantized values.
    pub(super) fn of_f32(values: &[f32]) -> Self {
        Self {
            dtype: FloatType::F32,
            bytes: Cow::Owned(bytemuck::cast_slice(values).to_vec()),
        }
    }
}

/// Model whose weights can be read tensor by tensor.
pub trait Source: Send + Sync {
    /// Returns a display name: that of the directory, or the one recorded in the file.
    fn model_name(&self) -> &str;

    /// Returns the config, the tokenizer and the chat template.
    fn files(&self) -> &ModelFiles;

    /// Returns every tensor, in the order of [`sort_key`]:
    /// embeddings, layers, the rest, output head.
    fn tensors(&self) -> &[TensorInfo];

    /// Returns the tensors that the source has besides [`Source::tensors`].
    fn skipped(&self) -> &[SkippedTensor];

    /// Returns every file that belongs to the source, read or not.
    ///
    /// None of them may be overwritten.
    fn own_files(&self) -> Vec<PathBuf>;

    /// Reads rows `rows` of tensor `index` as f32, exactly as stored or as dequantized.
    ///
    /// A vector `[n]` has n rows of one value. Cost: 4 bytes per weight; uses all threads.
    ///
    /// Errors: `Argument` if there is no such tensor or row; `Invalid` for sparse and packed
    /// weights whose bits do not match their sizes.
    fn read_rows_f32(&self, index: usize, rows: Range<usize>) -> Result<Vec<f32>>;

    /// Reads the bytes of tensor `index` for uncompressed storage.
    ///
    /// They have their own type if that is BF16, F16 or F32,
    /// and are dequantized to F32 if quantized.
    ///
    /// Cost: none for plain Hugging Face tensors and unquantized GGUF ones whose rows are in order,
    /// else a copy. Errors: as [`Source::read_rows_f32`].
    fn read_raw(&self, index: usize) -> Result<RawTensor<'_>>;

    /// Reads the whole tensor `index` as f32, row by row. Cost and errors as
    /// [`Source::read_rows_f32`].
    fn read_f32(&self, index: usize) -> Result<Vec<f32>> {
        let rows = tensor_at(self.tensors(), index)?.rows();
        self.read_rows_f32(index, 0..rows)
    }

    /// Loads the uncompressed model, the reference for its compressed files.
    /// All weights become f32.
    ///
    /// Memory: 4 bytes per weight. Errors: those of the source and of [`Model::load`].
    fn load_model(&self) -> Result<Model> {
        Model::load(self.files().config()?, &SourceWeights(self))
    }

    /// Returns the number of weights of the whole model.
    fn total_weights(&self) -> u64 {
        self.tensors().iter().map(|t| t.weights() as u64).sum()
    }
}

/// Returns a key that sorts tensor names into the order of a model.
///
/// The order is embeddings, layers by number, everything else, the output head; names within a
/// layer in byte order.
pub fn sort_key(name: &str) -> (u8, u64, &str) {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| {
        let (number, rest) = rest.split_once('.')?;
        Some((number.parse().ok()?, rest))
    });
    match layer {
        Some((number, rest)) => (1, number, rest),
        None if name.starts_with("model.embed_tokens.") => (0, 0, name),
        None if name.starts_with("lm_head.") => (3, 0, name),
        None => (2, 0, name),
    }
}

/// Returns tensor `index`, or an `Argument` error.
pub(super) fn tensor_at(tensors: &[TensorInfo], index: usize) -> Result<&TensorInfo> {
    tensors.get(index).ok_or_else(|| {
        Error::new(
            ErrorKind::Argument,
            format!("tensor {index} of {}", tensors.len()),
        )
    })
}

/// Checks that `rows` are rows of `tensor`. Errors (`Argument`): they are not.
pub(super) fn check_rows(tensor: &TensorInfo, rows: &Range<usize>) -> Result<()> {
    if rows.start <= rows.end && rows.end <= tensor.rows() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Argument,
        format!("rows {rows:?} of a tensor of {} rows", tensor.rows()),
    )
    .tensor(&tensor.name))
}

/// Values per conversion task: large enough to pay for the task,
/// small enough to stay in cache.
const CHUNK_VALUES: usize = 1 << 15;

/// Fills `rows` x `cols` values in parallel.
///
/// `fill(first_row, out)` gets whole rows, at most `max_rows` at once.
pub(super) fn fill_rows(
    rows: Range<usize>,
    cols: usize,
    max_rows: usize,
    fill: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let mut out = vec![0f32; rows.len() * cols];
    let step = (CHUNK_VALUES / cols.max(1)).clamp(1, max_rows);
    out.par_chunks_mut((step * cols).max(1))
        .enumerate()
        .try_for_each(|(i, chunk)| fill(rows.start + i * step, chunk))?;
    Ok(out)
}

/// Weights of a source as f32.
pub(crate) struct SourceWeights<'a, S: ?Sized>(pub(crate) &'a S);

impl<S: Source + ?Sized> SourceWeights<'_, S> {
    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let tensors = self.0.tensors();
        let index = tensors
            .iter()
            .position(|t| t.name == name)
            .ok_or_else(|| Error::new(ErrorKind::Missing, "is not in the model").tensor(name))?;
        match tensors[index].shape == shape {
            true => self.0.read_f32(index),
            false => Err(shape_mismatch(name, &tensors[index].shape, shape)),
        }
    }
}

impl<S: Source + ?Sized> WeightSource for SourceWeights<'_, S> {
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Matrix> {
        let values = DenseValues::F32(self.read(name, &[rows, cols])?.into());
        Ok(Matrix::Dense(DenseMatrix::new(rows, cols, values)?))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.read(name, &[len])
    }

    fn contains(&self, name: &str) -> bool {
        self.0.tensors().iter().any(|t| t.name == name)
    }
}

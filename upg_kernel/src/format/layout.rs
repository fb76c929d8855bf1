//! Which arrays a layer of each encoding has: names, dtypes and shapes (rule 7).
#![forbid(unsafe_code)]

use super::container::Entry;
use super::index::{Encoding, LayerInfo};
use super::rules::{self, LAYER_PREFIX};
use super::tensors::Tensors;
use crate::array::Array;
use crate::error::{Error, ErrorKind, Result};
use crate::matrix::{
    BITMAP_GROUP, BitmapArrays, BitmapMatrix, GroupedMatrix, Levels, Matrix, TrellisMatrix,
    TrellisParts,
};
use crate::matrix::{
    strips::{self, STRIP_ROWS},
    trellis,
};
use crate::rotation::Rotation;
use crate::sparse::{MdCSRArrays, MdCSRMatrix};
use bytemuck::Pod;
use safetensors::Dtype;

/// One array of a layer: `layer_{i}_{suffix}`. `None` stands for a length that depends on the content.
pub(super) struct ArraySpec {
    pub suffix: &'static str,
    pub dtype: Dtype,
    pub shape: Vec<Option<usize>>,
}

impl ArraySpec {
    /// Whether an array of this encoding can have this shape.
    pub fn allows(&self, shape: &[usize]) -> bool {
        let mut sizes = self.shape.iter().zip(shape);
        self.shape.len() == shape.len() && sizes.all(|(want, &n)| want.is_none_or(|want| want == n))
    }
}

fn spec(suffix: &'static str, dtype: Dtype, shape: &[usize]) -> ArraySpec {
    ArraySpec {
        suffix,
        dtype,
        shape: shape.iter().map(|&n| Some(n)).collect(),
    }
}

fn counted(suffix: &'static str, dtype: Dtype) -> ArraySpec {
    ArraySpec {
        suffix,
        dtype,
        shape: vec![None],
    }
}

/// The arrays of `layer`, in the order in which they are written.
pub(super) fn arrays(layer: &LayerInfo) -> Result<Vec<ArraySpec>> {
    let encoding = layer.encoding()?;
    let (rows, cols) = (layer.rows, layer.cols);
    let group = layer.group.unwrap_or(BITMAP_GROUP);
    let groups = cols.div_ceil(group);
    let strips = strips::count(rows);
    let weights = strips::padded_weights(cols, group).map_err(|e| e.rule(rules::LAYERS))?;
    let prime_indices = spec("prime_indices", Dtype::U8, &[strips, groups, STRIP_ROWS]);
    let scales = spec("scales", Dtype::F32, &[rows]);
    let row_pointers = spec("row_pointers", Dtype::U32, &[rows + 1]);
    let strip_pointers = spec("strip_pointers", Dtype::U32, &[strips + 1]);
    let codebook = spec("codebook", Dtype::I8, &[16]);
    let bitmap = spec("bitmap", Dtype::U8, &[strips, weights / 8]);
    Ok(match encoding {
        Encoding::MdCsr => vec![
            counted("values", Dtype::I8),
            counted("delta_indices", Dtype::U8),
            row_pointers,
            counted("prime_indices", Dtype::U16),
            scales,
        ],
        Encoding::Q8 => vec![
            spec("values", Dtype::I8, &[strips, weights]),
            prime_indices,
            scales,
        ],
        Encoding::Q4 => vec![
            spec("codes", Dtype::U8, &[strips, weights / 2]),
            prime_indices,
            scales,
            codebook,
        ],
        Encoding::S8 => vec![
            bitmap,
            counted("values", Dtype::I8),
            strip_pointers,
            prime_indices,
            scales,
        ],
        Encoding::S4 => vec![
            bitmap,
            counted("codes", Dtype::U8),
            strip_pointers,
            prime_indices,
            scales,
            codebook,
        ],
        Encoding::T2 | Encoding::T3 | Encoding::T4 => {
            let k = encoding.trellis_bits().unwrap_or_default();
            let strip = trellis::strip_bytes(cols, k).ok_or_else(|| {
                let message = format!("a trellis matrix of {cols} columns");
                Error::new(ErrorKind::TooLarge, message).rule(rules::LAYERS)
            })?;
            vec![
                spec("codes", Dtype::U8, &[strips, strip]),
                spec("prime_indices", Dtype::U8, &[rows, 1]),
                scales,
                spec(
                    "signs",
                    Dtype::U8,
                    &[layer.hadamard.unwrap_or(1).div_ceil(8)],
                ),
            ]
        }
    })
}

/// `layer_{index}_{suffix}`.
pub(super) fn array_name(index: usize, suffix: &str) -> String {
    format!("{LAYER_PREFIX}{index}_{suffix}")
}

/// Checks presence, dtype and shape of every array of a layer. Reads no tensor data.
pub(super) fn check(tensors: &Tensors, index: usize, layer: &LayerInfo) -> Result<()> {
    for spec in arrays(layer)? {
        let name = array_name(index, spec.suffix);
        let entry = tensors.entry(&name).ok_or_else(|| {
            let message = format!(
                "not in the file, {} '{}' needs it",
                layer.encoding_name(),
                layer.name
            );
            Error::new(ErrorKind::Missing, message)
                .rule(rules::ARRAYS)
                .tensor(&name)
        })?;
        check_entry(&entry, &spec).map_err(|e| e.tensor(&name))?;
    }
    if layer.encoding()? != Encoding::MdCsr {
        return Ok(());
    }
    let count = |suffix| {
        let entry = tensors.entry(&array_name(index, suffix));
        entry.map_or(0, |t| t.shape.iter().product::<usize>())
    };
    let nnz = count("values");
    match ["delta_indices", "prime_indices"]
        .into_iter()
        .find(|suffix| count(suffix) != nnz)
    {
        None => Ok(()),
        Some(suffix) => Err(
            rules::shape(format!("{} elements for {nnz} values", count(suffix)))
                .tensor(array_name(index, suffix)),
        ),
    }
}

fn check_entry(entry: &Entry<'_>, spec: &ArraySpec) -> Result<()> {
    if entry.dtype == spec.dtype && spec.allows(entry.shape) {
        return Ok(());
    }
    let expected: Vec<String> = spec
        .shape
        .iter()
        .map(|n| n.map_or("any".into(), |n| n.to_string()))
        .collect();
    Err(rules::shape(format!(
        "{} {:?}, expected {} [{}]",
        entry.dtype,
        entry.shape,
        spec.dtype,
        expected.join(", ")
    )))
}

/// The matrix of a layer; checks what its encoding asks for (the bits and columns of the sparse ones
/// are read here for the first time).
pub(super) fn matrix(tensors: &Tensors, index: usize, layer: &LayerInfo) -> Result<Matrix> {
    let encoding = layer.encoding()?;
    let (rows, cols) = (layer.rows, layer.cols);
    let group = layer.group.unwrap_or(BITMAP_GROUP);
    let get = Arrays { tensors, index };
    let nibbles = || -> Result<Levels> {
        Ok(Levels::Nibbles {
            codes: get.array("codes")?,
            codebook: get.array("codebook")?,
        })
    };
    let grouped = |levels| {
        GroupedMatrix::new(
            rows,
            cols,
            group,
            levels,
            get.array("prime_indices")?,
            get.array("scales")?,
        )
    };
    let bitmap = |levels| {
        let arrays = BitmapArrays {
            bitmap: get.array("bitmap")?,
            levels,
            strip_pointers: get.array("strip_pointers")?,
            prime_indices: get.array("prime_indices")?,
            scales: get.array("scales")?,
        };
        BitmapMatrix::new(rows, cols, arrays)
    };
    Ok(match encoding {
        Encoding::MdCsr => Matrix::MdCsr(MdCSRMatrix::new(
            rows,
            cols,
            MdCSRArrays {
                values: get.array("values")?,
                delta_indices: get.array("delta_indices")?,
                row_pointers: get.array("row_pointers")?,
                prime_indices: get.array("prime_indices")?,
                scales: get.array("scales")?,
            },
        )?),
        Encoding::Q8 => Matrix::Grouped(grouped(Levels::Bytes(get.array("values")?))?),
        Encoding::Q4 => Matrix::Grouped(grouped(nibbles()?)?),
        Encoding::S8 => Matrix::Bitmap(bitmap(Levels::Bytes(get.array("values")?))?),
        Encoding::S4 => Matrix::Bitmap(bitmap(nibbles()?)?),
        Encoding::T2 | Encoding::T3 | Encoding::T4 => {
            let parts = TrellisParts {
                codes: get.array("codes")?,
                prime_indices: get.array("prime_indices")?,
                scales: get.array("scales")?,
                rotation: Rotation::new(cols, layer.hadamard.unwrap_or(1), get.array("signs")?)?,
            };
            let k = encoding.trellis_bits().unwrap_or_default();
            Matrix::Trellis(TrellisMatrix::new(rows, cols, k, parts)?)
        }
    })
}

struct Arrays<'a> {
    tensors: &'a Tensors,
    index: usize,
}

impl Arrays<'_> {
    fn array<T: Pod>(&self, suffix: &str) -> Result<Array<T>> {
        self.tensors.array(&array_name(self.index, suffix))
    }
}

//! `pack-quantized`: integers of 2, 4 or 8 bits in 32-bit words, with scales of rows or
//! groups of columns.
#![forbid(unsafe_code)]

use super::config::Scheme;
use super::parts::{HINT, WeightTensors, check_shape, integers};
use crate::source::hf::stored::{Bytes, Stored};
use crate::source::model::FloatType;
use safetensors::Dtype;
use upg_kernel::{Error, ErrorKind, Result};

const WORD_BITS: usize = 32;

/// Packed weight `[rows, cols]` in `groups` of columns: `scale * (integer - zero point)`.
///
/// - `weight_shape` I64 or I32 `[2]`;
/// - `weight_packed` I32 `[rows, ceil(cols * bits / 32)]`: integers plus `2^(bits - 1)`, the first
///   one lowest;
/// - `weight_scale` BF16, F16 or F32 `[rows, groups]`;
/// - `weight_zero_point`, unless symmetric: I32 `[ceil(rows * bits / 32), groups]`, packed
///   likewise, but along the rows; I8 `[rows, groups]` up to version 0.8;
/// - `weight_g_idx`, I32 `[cols]`, if columns are not assigned to groups in order; -1 everywhere
///   means that they are.
#[derive(Debug, Clone)]
pub(in crate::source::hf) struct Packed {
    rows: usize,
    cols: usize,
    bits: usize,
    /// Group of each column.
    groups: Groups,
    packed: Stored,
    scales: Stored,
    float: FloatType,
    zeros: Option<Stored>,
}

#[derive(Debug, Clone)]
struct Groups {
    count: usize,
    /// Columns per group, if in order.
    size: usize,
    /// Group of each column, if columns are not in order.
    of_columns: Option<Vec<u32>>,
}

/// Bytes of a [`Packed`], for reading rows.
pub(in crate::source::hf) struct PackedRows<'a> {
    weight: &'a Packed,
    packed: &'a [u8],
    scales: &'a [u8],
    zeros: Option<(Dtype, &'a [u8])>,
}

impl Packed {
    /// Creates a weight with the scheme that matches its sizes.
    ///
    /// Errors: `Missing`, `Shape` and `Unsupported` for tensors that are missing or not as
    /// described, or that match several schemes; `Invalid` for columns of no group.
    pub(super) fn new(
        parts: &WeightTensors,
        schemes: &[Scheme],
        bytes: Bytes<'_, '_>,
    ) -> Result<Self> {
        let packed = parts.of_type(".weight_packed", &[Dtype::I32])?;
        let (scales, float) = parts.floats(".weight_scale")?;
        let shape = parts.weight_shape(".weight_shape", bytes)?;
        let [rows, cols] = shape[..] else {
            let message = format!("'.weight_shape' says {shape:?}, expected two sizes");
            return Err(Error::new(ErrorKind::Shape, message));
        };
        let fits = |scheme: &Scheme| {
            let count = groups(cols, scheme)?;
            check_shape(".weight_packed", packed, &[rows, words(cols, scheme)])?;
            check_shape(".weight_scale", scales, &[rows, count])?;
            Ok((*scheme, count))
        };
        let (fitting, misfits): (Vec<_>, Vec<_>) =
            schemes.iter().map(fits).partition(Result::is_ok);
        let fitting: Vec<(Scheme, usize)> = fitting.into_iter().flatten().collect();
        let Some(&(scheme, count)) = fitting.first() else {
            let misfit = misfits.into_iter().find_map(Result::err);
            return Err(misfit.unwrap_or_else(|| {
                let message = "is quantized, but no group of the config is";
                Error::new(ErrorKind::Unsupported, message).hint(HINT)
            }));
        };
        // Sizes are used instead of the targets of the groups, so they must be unambiguous.
        let means = |(scheme, count): &(Scheme, usize)| (scheme.bits, *count, scheme.symmetric);
        if fitting
            .iter()
            .any(|other| means(other) != means(&fitting[0]))
        {
            let message = "fits several groups of the config";
            return Err(Error::new(ErrorKind::Unsupported, message).hint(HINT));
        }
        Ok(Self {
            rows,
            cols,
            bits: scheme.bits,
            groups: Groups {
                count,
                size: cols / count,
                of_columns: groups_of_columns(parts, cols, count, bytes)?,
            },
            packed: packed.clone(),
            scales: scales.clone(),
            float,
            zeros: zeros(parts, rows, count, &scheme)?,
        })
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        vec![self.rows, self.cols]
    }

    /// Returns its rows.
    pub(in crate::source::hf) fn rows<'a>(
        &'a self,
        bytes: Bytes<'_, 'a>,
    ) -> Result<PackedRows<'a>> {
        let zeros = match &self.zeros {
            Some(zeros) => Some((zeros.dtype, bytes(zeros)?)),
            None => None,
        };
        Ok(PackedRows {
            weight: self,
            packed: bytes(&self.packed)?,
            scales: bytes(&self.scales)?,
            zeros,
        })
    }
}

/// Returns the words of `n` packed integers.
fn words(n: usize, scheme: &Scheme) -> usize {
    n.div_ceil(WORD_BITS / scheme.bits)
}

/// Returns the number of groups of this many columns. Errors (`Shape`): it is not an integer.
fn groups(cols: usize, scheme: &Scheme) -> Result<usize> {
    let size = scheme.group.unwrap_or(cols).min(cols);
    match cols.is_multiple_of(size) {
        true => Ok(cols / size),
        false => {
            let message = format!("{cols} columns are not a whole number of groups of {size}");
            Err(Error::new(ErrorKind::Shape, message))
        }
    }
}

/// Returns the zero points, if any.
///
/// Errors: there are some although the scheme has none, or the reverse.
fn zeros(
    parts: &WeightTensors,
    rows: usize,
    count: usize,
    scheme: &Scheme,
) -> Result<Option<Stored>> {
    let suffix = ".weight_zero_point";
    if scheme.symmetric {
        return match parts.get(suffix) {
            None => Ok(None),
            Some(_) => {
                let message = "has zero points, but is symmetric in the config";
                Err(Error::new(ErrorKind::Invalid, message).hint(HINT))
            }
        };
    }
    let zeros = parts.of_type(suffix, &[Dtype::I32, Dtype::I8])?;
    let expected = match zeros.dtype {
        Dtype::I8 => rows,
        _ => words(rows, scheme),
    };
    check_shape(suffix, zeros, &[expected, count])?;
    Ok(Some(zeros.clone()))
}

/// Returns the group of each column from `weight_g_idx`; `None` if they are in order.
fn groups_of_columns(
    parts: &WeightTensors,
    cols: usize,
    count: usize,
    bytes: Bytes<'_, '_>,
) -> Result<Option<Vec<u32>>> {
    let suffix = ".weight_g_idx";
    if parts.get(suffix).is_none() {
        return Ok(None);
    }
    let stored = parts.of_type(suffix, &[Dtype::I32, Dtype::I64])?;
    check_shape(suffix, stored, &[cols])?;
    let groups = integers(stored, bytes)?;
    if groups.iter().all(|&group| group == -1) {
        return Ok(None);
    }
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    let mut used = vec![false; count];
    for (col, &group) in groups.iter().enumerate() {
        match usize::try_from(group).ok().and_then(|g| used.get_mut(g)) {
            Some(used) => *used = true,
            None => return invalid(format!("column {col} is in group {group} of {count}")),
        }
    }
    // The package numbers only groups with columns, others number the scales.
    if let Some(group) = used.iter().position(|used| !used) {
        return invalid(format!("group {group} has no columns"));
    }
    Ok(Some(groups.iter().map(|&group| group as u32).collect()))
}

impl PackedRows<'_> {
    /// Decodes row `row` to floats: exact products if scales are BF16 or F16.
    ///
    /// Errors (`Invalid`): bits past the last column.
    pub(in crate::source::hf) fn read(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let Packed {
            cols, bits, groups, ..
        } = self.weight;
        let row_bytes = cols.div_ceil(WORD_BITS / bits) * size_of::<u32>();
        let packed = self.packed.get(row * row_bytes..(row + 1) * row_bytes);
        let packed = packed.unwrap_or_default();
        let used = cols * bits;
        let mut past = packed.iter().enumerate().skip(used / 8);
        if past.any(|(i, byte)| u32::from(*byte) >> used.saturating_sub(8 * i) != 0) {
            let message = format!("row {row} has bits past column {cols}");
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        let mut scales = vec![0.0; groups.count];
        let size = groups.count * self.weight.float.size();
        let stored = self.scales.get(row * size..(row + 1) * size);
        self.weight
            .float
            .to_f32(stored.unwrap_or_default(), &mut scales)?;
        let zeros: Vec<i32> = (0..groups.count).map(|g| self.zero(row, g)).collect();
        for (col, out) in out.iter_mut().enumerate() {
            let group = match &groups.of_columns {
                Some(of_columns) => of_columns[col] as usize,
                None => col / groups.size,
            };
            let value = integer(packed[col * bits / 8], col, *bits);
            *out = scales[group] * (value - zeros[group]) as f32;
        }
        Ok(())
    }

    /// Returns the zero point of a row in a group.
    fn zero(&self, row: usize, group: usize) -> i32 {
        let (bits, count) = (self.weight.bits, self.weight.groups.count);
        match self.zeros {
            None => 0,
            Some((Dtype::I8, zeros)) => i32::from(zeros[row * count + group] as i8),
            Some((_, zeros)) => {
                let per_word = WORD_BITS / bits;
                let word = row / per_word * count + group;
                let byte = word * size_of::<u32>() + row % per_word * bits / 8;
                integer(zeros[byte], row, bits)
            }
        }
    }
}

/// Returns integer number `i` of a packed sequence, from the byte that it is in.
fn integer(byte: u8, i: usize, bits: usize) -> i32 {
    let code = u32::from(byte) >> (i * bits % 8) & ((1 << bits) - 1);
    code as i32 - (1 << (bits - 1))
}

//! Kernel calls that multiply a matrix: names, buffers, arguments, threads.
//!
//! Every decision that depends on the shape of a matrix is made here in plain arithmetic. The code
//! that talks to a device makes none.
#![forbid(unsafe_code)]

use super::args::{RotateArgs, SparseArgs, StripArgs};
use crate::array::Array;
use crate::codec::stored::StoredMatrix;
use crate::error::{Error, ErrorKind, Result};
use crate::mapped::MappedFile;
use crate::matrix::strips::{self, STRIP_ROWS};
use crate::matrix::trellis::strip_bytes;
use crate::matrix::{
    BITMAP_GROUP, BitmapMatrix, GroupedMatrix, Levels, Matrix, TrellisMatrix, WORD,
};
use crate::rotation::Rotation;
use crate::sparse::MdCSRMatrix;
use crate::trellis_code::TrellisCode;
use bytemuck::{Pod, bytes_of, cast_slice};
use half::f16;
use std::sync::Arc;

/// Threads of a SIMD-group.
const SIMD: usize = 32;

/// Vectors of a kernel with `_batch` (`BATCH` of the kernels).
const BATCH: usize = 4;

/// Columns that one threadgroup transforms (16 KiB of floats),
/// or copies (`COPIED` of the kernels).
const BLOCK: usize = 4096;

/// Elements per thread in a rotation (`RADIX` of the kernels).
const RADIX: usize = 16;

/// Columns of x that `mdcsr_row_shared` holds at a time.
///
/// They take 16 KiB of floats, half of the limit of a threadgroup.
const WINDOW: usize = 4096;

/// Maximum columns for the 32-bit arithmetic of the kernels,
/// including steps past the last one.
const MOST_COLS: usize = 1 << 30;

/// Alignment of weights that are read as words.
const ALIGNMENT: usize = 16;

/// Type of inputs and outputs on a GPU; sums are f32 in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Element {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
}

impl Element {
    /// Returns the suffix of kernel names.
    fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// Returns the size in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

/// Kernel variant for `mdcsr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum SparseKernel {
    /// One thread per row.
    Row,
    /// One thread per row, with the input in threadgroup memory.
    RowShared,
    /// One thread per row and four vectors.
    RowBatch,
    /// One SIMD-group per row: expected to be the fastest, for any number of vectors.
    #[default]
    Simd,
}

/// Array of a matrix: its bytes and their location.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Weights<'a> {
    bytes: &'a [u8],
    place: Option<(&'a Arc<MappedFile>, usize)>,
    alignment: usize,
}

impl<'a> Weights<'a> {
    /// Wraps an array that is read element by element.
    fn new<T: Pod>(array: &'a Array<T>) -> Self {
        Self {
            bytes: cast_slice(array),
            place: array.place(),
            alignment: align_of::<T>(),
        }
    }

    /// Wraps an array that is read in words of up to 16 bytes.
    fn words<T: Pod>(array: &'a Array<T>) -> Self {
        Self {
            alignment: ALIGNMENT,
            ..Self::new(array)
        }
    }

    /// Replaces the bytes by as many others.
    #[cfg(test)]
    pub(super) fn change(&mut self, bytes: &'a [u8]) {
        assert_eq!(bytes.len(), self.bytes.len());
        self.bytes = bytes;
    }

    /// Returns the bytes, which may be mapped.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the alignment that the kernel needs for these bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Returns the mapped file and the offset in it, if a kernel can read the bytes in place.
    ///
    /// Other writers need not align their tensors (rule 8).
    pub fn in_file(&self) -> Option<(&'a Arc<MappedFile>, usize)> {
        self.place
            .filter(|(_, first)| first.is_multiple_of(self.alignment))
    }
}

/// Binding of a kernel argument.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Operand<'a> {
    /// Bytes of the matrix.
    Weights(Weights<'a>),
    /// Table [`crate::prime_lut::PRIME_LUT`], 10,000 `u32`.
    Primes,
    /// Table [`Plan::levels`] of the encoding with this many bits.
    Levels(u8),
    /// Input.
    X,
    /// Output, `[vectors, rows]`.
    Y,
    /// Rotated input, `[vectors, cols]` of f32.
    Rotated,
    /// Argument that nothing reads.
    Unused,
}

/// One call of a kernel.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Dispatch<'a> {
    /// Name, one of [`super::KERNELS`].
    pub kernel: String,
    /// Argument 0.
    pub args: Vec<u8>,
    /// Arguments from 1 on; the call writes only the last one.
    pub operands: Vec<Operand<'a>>,
    /// Bytes of threadgroup memory, all at index 0:
    /// a multiple of 16, at most 32 KiB; 0 if unused.
    pub threadgroup_bytes: usize,
    /// Number of threadgroups in two dimensions.
    pub threadgroups: [usize; 2],
    /// Threads per threadgroup, in the first dimension: whole SIMD-groups.
    pub threads: usize,
}

impl<'a> Dispatch<'a> {
    /// Returns the operand that the call writes.
    pub fn written(&self) -> &Operand<'a> {
        self.operands.last().expect("every kernel writes something")
    }
}

/// Calls that compute `Y = W X`, in order: each reads what earlier ones have written.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Plan<'a> {
    /// Calls, at least one.
    pub dispatches: Vec<Dispatch<'a>>,
    /// Elements of [`Operand::Rotated`], 0 if there is none.
    pub rotated: usize,
}

impl<'a> Plan<'a> {
    /// Plans the product of `matrix` with `vectors` consecutive inputs of type `element`.
    ///
    /// `max_threads` returns the maximum threads per threadgroup of a kernel, given its name.
    ///
    /// Errors: `Unsupported` for a matrix that is not compressed; `Argument` for no vectors;
    /// `TooLarge` for sizes that the arguments of the kernels cannot hold.
    pub fn new(
        matrix: &'a Matrix,
        vectors: usize,
        element: Element,
        max_threads: impl Fn(&str) -> usize,
    ) -> Result<Self> {
        Self::with_kernel(
            matrix,
            vectors,
            element,
            SparseKernel::default(),
            max_threads,
        )
    }

    /// Creates [`Plan::new`] with this kernel, if the matrix is `mdcsr`.
    pub fn with_kernel(
        matrix: &'a Matrix,
        vectors: usize,
        element: Element,
        sparse: SparseKernel,
        max_threads: impl Fn(&str) -> usize,
    ) -> Result<Self> {
        if vectors == 0 || matrix.rows() == 0 || matrix.cols() == 0 {
            let message = format!(
                "a product of [{}, {}] with {vectors} vectors",
                matrix.rows(),
                matrix.cols()
            );
            return Err(Error::new(ErrorKind::Argument, message));
        }
        if matrix.cols() > MOST_COLS {
            return Err(too_large(matrix.cols(), "columns"));
        }
        let planner = Planner {
            vectors,
            element,
            max_threads: &max_threads,
        };
        match matrix {
            Matrix::Dense(_) => Err(Error::new(
                ErrorKind::Unsupported,
                "this matrix is not compressed: there is no kernel for it",
            )
            .hint("multiply it as a tensor of candle")),
            Matrix::MdCsr(m) => planner.sparse(m, sparse),
            Matrix::Grouped(m) => planner.grouped(m),
            Matrix::Bitmap(m) => planner.bitmap(m),
            Matrix::Trellis(m) => planner.trellis(m),
        }
    }

    /// Returns the levels of `t2`, `t3` and `t4`, indexed by the significant bits of a point.
    ///
    /// There are 128, 128 and 256 levels. `None` if `k` is not 2, 3 or 4.
    pub fn levels(k: u8) -> Option<Vec<f16>> {
        let code = TrellisCode::of(k)?;
        let points = (0..=255u8).step_by(256 / code.levels());
        let level = |point| f16::from_f32(f32::from(code.level_at(point)));
        Some(points.map(level).collect())
    }
}

struct Planner<'p> {
    vectors: usize,
    element: Element,
    max_threads: &'p dyn Fn(&str) -> usize,
}

/// Kernel parameters besides the arrays of its matrix.
struct Strips {
    name: String,
    threads: usize,
    batch: usize,
}

impl Planner<'_> {
    fn name(&self, name: &str) -> String {
        format!("{name}_{}", self.element.suffix())
    }

    /// Returns `wanted` threads, or the limit of the device for the kernel, in whole SIMD-groups.
    fn threads(&self, kernel: &str, wanted: usize) -> usize {
        let most = (self.max_threads)(kernel) / SIMD * SIMD;
        wanted.next_multiple_of(SIMD).min(most).max(SIMD)
    }

    fn sparse<'a>(&self, m: &'a MdCSRMatrix, kernel: SparseKernel) -> Result<Plan<'a>> {
        let (rows, cols) = (m.rows(), m.cols());
        let name = self.name(match kernel {
            SparseKernel::Row => "mdcsr_row",
            SparseKernel::RowShared => "mdcsr_row_shared",
            SparseKernel::RowBatch => "mdcsr_row_batch",
            SparseKernel::Simd => "mdcsr_simd",
        });
        let threads = self.threads(&name, 256);
        let rows_of_group = match kernel {
            SparseKernel::Simd => threads / SIMD,
            _ => threads,
        };
        let vectors = match kernel {
            SparseKernel::RowBatch => self.vectors.div_ceil(BATCH),
            _ => self.vectors,
        };
        let window = cols.min(WINDOW);
        let args = SparseArgs {
            rows: number(rows, "rows")?,
            cols: number(cols, "columns")?,
            vectors: number(self.vectors, "vectors")?,
            x_stride: number(cols, "columns")?,
            y_stride: number(rows, "rows")?,
            entries: number(m.nnz(), "entries")?,
            window: number(window, "columns")?,
        };
        let arrays = m.arrays();
        let dispatch = Dispatch {
            args: bytes_of(&args).to_vec(),
            operands: vec![
                Operand::Weights(Weights::words(&arrays.values)),
                Operand::Weights(Weights::words(&arrays.delta_indices)),
                Operand::Weights(Weights::new(&arrays.row_pointers)),
                Operand::Weights(Weights::words(&arrays.prime_indices)),
                Operand::Weights(Weights::new(&arrays.scales)),
                Operand::Primes,
                Operand::X,
                Operand::Y,
            ],
            threadgroup_bytes: match kernel {
                SparseKernel::RowShared => memory(4 * window),
                _ => 0,
            },
            threadgroups: [rows.div_ceil(rows_of_group), vectors],
            threads,
            kernel: name,
        };
        Ok(Plan {
            dispatches: vec![dispatch],
            rotated: 0,
        })
    }

    /// Assigns one strip to a threadgroup. With few strips more SIMD-groups share each, so that
    /// the GPU is occupied.
    fn strips(&self, encoding: &str, rows: usize) -> Strips {
        let batch = if self.vectors == 1 { 1 } else { BATCH };
        let name = self.name(&match batch {
            1 => encoding.to_string(),
            _ => format!("{encoding}_batch"),
        });
        let simds = match strips::count(rows) {
            0..128 => 16,
            128..256 => 8,
            _ => 4,
        };
        Strips {
            threads: self.threads(&name, simds * SIMD),
            name,
            batch,
        }
    }

    fn strip_args(&self, rows: usize, cols: usize, strip_bytes: usize) -> Result<StripArgs> {
        Ok(StripArgs {
            rows: number(rows, "rows")?,
            cols: number(cols, "columns")?,
            vectors: number(self.vectors, "vectors")?,
            x_stride: number(cols, "columns")?,
            y_stride: number(rows, "rows")?,
            group: 0,
            groups: 0,
            strip_bytes: number(strip_bytes, "bytes of a strip")?,
            multiplier: 0,
            stored: 0,
        })
    }

    /// Returns the kernel call for strips.
    ///
    /// The parameters are the halves of its tables and the bytes per SIMD-group that it counts.
    fn strip_dispatch<'a>(
        &self,
        strips: Strips,
        args: &StripArgs,
        operands: Vec<Operand<'a>>,
        table: usize,
        counts: usize,
    ) -> Dispatch<'a> {
        let simds = strips.threads / SIMD;
        let sums = 4 * simds * STRIP_ROWS * strips.batch;
        Dispatch {
            args: bytes_of(args).to_vec(),
            operands,
            threadgroup_bytes: memory(2 * table + sums + counts * simds),
            threadgroups: [
                strips::count(args.rows as usize),
                self.vectors.div_ceil(strips.batch),
            ],
            threads: strips.threads,
            kernel: strips.name,
        }
    }

    fn grouped<'a>(&self, m: &'a GroupedMatrix) -> Result<Plan<'a>> {
        let (rows, cols, group) = (m.rows(), m.cols(), m.group());
        let groups = cols.div_ceil(group);
        let weights = groups * group * STRIP_ROWS;
        let (name, strip_bytes, codes, codebook, table) = match m.levels() {
            Levels::Bytes(values) => (
                "q8",
                weights,
                Weights::words(values),
                Operand::Unused,
                PRIMES,
            ),
            Levels::Nibbles { codes, codebook } => {
                let codebook = Operand::Weights(Weights::new(codebook));
                let table = LEVELS + PRIMES;
                ("q4", weights / 2, Weights::words(codes), codebook, table)
            }
        };
        let args = StripArgs {
            group: number(group, "columns")?,
            groups: number(groups, "groups")?,
            ..self.strip_args(rows, cols, strip_bytes)?
        };
        let operands = vec![
            Operand::Weights(codes),
            Operand::Weights(Weights::words(m.prime_indices())),
            Operand::Weights(Weights::new(m.scales())),
            codebook,
            Operand::Primes,
            Operand::X,
            Operand::Y,
        ];
        let strips = self.strips(name, rows);
        Ok(Plan {
            dispatches: vec![self.strip_dispatch(strips, &args, operands, table, 0)],
            rotated: 0,
        })
    }

    fn bitmap<'a>(&self, m: &'a BitmapMatrix) -> Result<Plan<'a>> {
        let (rows, cols) = (m.rows(), m.cols());
        let arrays = m.arrays();
        let groups = cols.div_ceil(BITMAP_GROUP);
        let strip_bytes = groups * BITMAP_GROUP * STRIP_ROWS / WORD * size_of::<u64>();
        let (name, codes, codebook, table) = match &arrays.levels {
            Levels::Bytes(values) => ("s8", Weights::new(values), Operand::Unused, PRIMES),
            Levels::Nibbles { codes, codebook } => {
                let codebook = Operand::Weights(Weights::new(codebook));
                ("s4", Weights::new(codes), codebook, LEVELS + PRIMES)
            }
        };
        // The length of the array, not the last pointer,
        // which may have changed since it was checked.
        let stored = number(codes.bytes().len(), "bytes of codes")?;
        let args = StripArgs {
            group: number(BITMAP_GROUP, "columns")?,
            groups: number(groups, "groups")?,
            stored,
            ..self.strip_args(rows, cols, strip_bytes)?
        };
        let operands = vec![
            Operand::Weights(Weights::words(&arrays.bitmap)),
            Operand::Weights(codes),
            Operand::Weights(Weights::new(&arrays.strip_pointers)),
            Operand::Weights(Weights::words(&arrays.prime_indices)),
            Operand::Weights(Weights::new(&arrays.scales)),
            codebook,
            Operand::Primes,
            Operand::X,
            Operand::Y,
        ];
        let strips = self.strips(name, rows);
        let count = size_of::<u32>();
        Ok(Plan {
            dispatches: vec![self.strip_dispatch(strips, &args, operands, table, count)],
            rotated: 0,
        })
    }

    fn trellis<'a>(&self, m: &'a TrellisMatrix) -> Result<Plan<'a>> {
        let (rows, cols, k) = (m.rows(), m.cols(), m.k());
        let parts = m.parts();
        let code = TrellisCode::of(k).expect("k was checked when the matrix was made");
        let bytes = strip_bytes(cols, k).expect("sizes were checked when the matrix was made");
        let args = StripArgs {
            multiplier: u32::from(code.multiplier()),
            ..self.strip_args(rows, cols, bytes)?
        };
        let operands = vec![
            Operand::Weights(Weights::words(&parts.codes)),
            Operand::Weights(Weights::new(&parts.prime_indices)),
            Operand::Weights(Weights::new(&parts.scales)),
            Operand::Levels(k),
            Operand::Primes,
            Operand::Rotated,
            Operand::Y,
        ];
        let strips = self.strips(&format!("t{k}"), rows);
        let mut dispatches = self.rotation(&parts.rotation)?;
        dispatches.push(self.strip_dispatch(strips, &args, operands, code.levels(), 0));
        let rotated = self.vectors.checked_mul(cols);
        let rotated = rotated.ok_or_else(|| too_large(self.vectors, "vectors"))?;
        Ok(Plan {
            dispatches,
            rotated,
        })
    }

    /// Rotates [`Operand::X`] into [`Operand::Rotated`].
    fn rotation<'a>(&self, rotation: &'a Rotation) -> Result<Vec<Dispatch<'a>>> {
        let is_all = rotation.size() == rotation.cols();
        let mut dispatches = self.pass(rotation, 0, self.element, Operand::X)?;
        if !is_all {
            let first = rotation.cols() - rotation.size();
            dispatches.extend(self.pass(rotation, first, Element::F32, Operand::Rotated)?);
        }
        Ok(dispatches)
    }

    /// Returns a pass over the columns from `first` on.
    /// If it reads X, the other columns are copied.
    fn pass<'a>(
        &self,
        rotation: &'a Rotation,
        first: usize,
        element: Element,
        from: Operand<'a>,
    ) -> Result<Vec<Dispatch<'a>>> {
        let (size, cols) = (rotation.size(), rotation.cols());
        let block = size.min(BLOCK);
        let stride = number(cols, "columns")?;
        let copied = match from {
            Operand::X => cols - size,
            _ => 0,
        };
        let args = RotateArgs {
            first: number(first, "columns")?,
            size: number(size, "columns")?,
            cols: stride,
            copies: u32::from(copied > 0),
            x_stride: stride,
            y_stride: stride,
            block: number(block, "columns")?,
            radix: 0,
            factor: if size == block { rotation.norm() } else { 1.0 },
        };
        let name = format!("rotate_block_{}", element.suffix());
        let mut dispatches = vec![Dispatch {
            args: bytes_of(&args).to_vec(),
            operands: vec![
                Operand::Weights(Weights::new(rotation.sign_array())),
                from,
                Operand::Rotated,
            ],
            threadgroup_bytes: memory(4 * (block + block / RADIX)),
            threadgroups: [size / block + copied.div_ceil(BLOCK), self.vectors],
            threads: self.threads(&name, block / RADIX),
            kernel: name,
        }];
        let mut span = block;
        while span < size {
            let radix = (size / span).min(RADIX);
            let is_last = span * radix == size;
            let args = RotateArgs {
                block: number(span, "columns")?,
                radix: number(radix, "columns")?,
                factor: if is_last { rotation.norm() } else { 1.0 },
                ..args
            };
            let name = "rotate_across".to_string();
            let threads = self.threads(&name, 256);
            dispatches.push(Dispatch {
                args: bytes_of(&args).to_vec(),
                operands: vec![Operand::Rotated],
                threadgroup_bytes: 0,
                threadgroups: [(size / radix).div_ceil(threads), self.vectors],
                threads,
                kernel: name,
            });
            span *= radix;
        }
        Ok(dispatches)
    }
}

/// Entries of the tables of the kernels.
const LEVELS: usize = 16;
const PRIMES: usize = 256;

/// Rounds up to 16 bytes, the unit of threadgroup memory.
fn memory(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

fn number(value: usize, what: &str) -> Result<u32> {
    u32::try_from(value).map_err(|_| too_large(value, what))
}

fn too_large(value: usize, what: &str) -> Error {
    let message = format!("{value} {what} are more than a kernel can count");
    Error::new(ErrorKind::TooLarge, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_those_of_every_state() {
        for k in [2, 3, 4] {
            let code = TrellisCode::of(k).unwrap();
            let levels = Plan::levels(k).unwrap();
            for state in 0..8192u16 {
                let point = usize::from(state.wrapping_mul(code.multiplier()));
                let level = levels[(point * levels.len()) >> 16].to_f32();
                assert_eq!(level, f32::from(code.level(state)), "t{k} {state}");
            }
        }
        assert!(Plan::levels(5).is_none());
    }
}

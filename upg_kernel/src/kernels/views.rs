//! What a kernel sees of a matrix: slices whose lengths the matrix has checked.
#![forbid(unsafe_code)]

/// What the bytes of codes are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LevelsView<'a> {
    /// The levels themselves.
    Bytes,
    /// Two codes a byte into this codebook.
    Nibbles(&'a [i8; 16]),
}

/// Some rows of a matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    Grouped(GroupedRows<'a>),
    Bitmap(BitmapRows<'a>),
    /// All rows of a strip.
    Trellis(TrellisStrip<'a>),
}

/// Rows of a `q8` or `q4` matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GroupedRows<'a> {
    pub levels: LevelsView<'a>,
    /// `[rows, row_bytes]`.
    pub codes: &'a [u8],
    pub row_bytes: usize,
    /// `[rows, groups]`.
    pub prime_indices: &'a [u8],
    pub groups: usize,
    /// Columns that share a prime index, 32 or 64.
    pub group: usize,
    /// `[rows]`.
    pub scales: &'a [f32],
}

/// Rows of an `s8` or `s4` matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BitmapRows<'a> {
    pub levels: LevelsView<'a>,
    /// `[rows, groups]`, one bit a column.
    pub bitmap: &'a [[u8; 8]],
    /// Of all rows of the matrix.
    pub codes: &'a [u8],
    /// `[rows + 1]`.
    pub row_pointers: &'a [u32],
    /// `[rows, groups]`.
    pub prime_indices: &'a [u8],
    pub groups: usize,
    /// `[rows]`.
    pub scales: &'a [f32],
}

/// A strip of a `t2`, `t3` or `t4` matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrellisStrip<'a> {
    pub k: u8,
    pub cols: usize,
    /// The stream.
    pub codes: &'a [u8],
    pub shift_table: &'a [u8; 64],
    /// 128 or 256 entries.
    pub level_table: &'a [i8],
    /// One for each row that the strip really has, as the next.
    pub prime_indices: &'a [u8],
    pub scales: &'a [f32],
}

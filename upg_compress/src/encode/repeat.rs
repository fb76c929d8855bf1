//! Arrays of one strip, over and over.
#![forbid(unsafe_code)]

use bytemuck::Pod;
use upg_kernel::Array;
use upg_kernel::matrix::strips::{self, STRIP_ROWS};

/// `values` of one strip, which come in blocks of 64 rows with `width` each, for `rows` rows:
/// zeros in those that the last strip has not.
pub(super) fn by_strip<T: Pod>(values: &[T], width: usize, rows: usize) -> Array<T> {
    let mut out = cycled(values, strips::count(rows) * values.len());
    let rows_of_last = (rows - 1) % STRIP_ROWS + 1;
    let last = out.len() - values.len();
    for block in out[last..].chunks_exact_mut(STRIP_ROWS * width) {
        block[rows_of_last * width..].fill(T::zeroed());
    }
    out.into()
}

/// `len` values: `values` from the start, over and over.
pub(super) fn cycled<T: Pod>(values: &[T], len: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        out.extend_from_slice(&values[..values.len().min(len - out.len())]);
    }
    out
}

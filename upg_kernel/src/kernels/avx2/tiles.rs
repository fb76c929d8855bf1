//! Tiles of a strip in order.

use std::arch::x86_64::*;

/// Tiles of a strip in order, two at a time.
///
/// A value exists only where the processor has the features: every constructor requires them.
pub(super) trait Levels {
    /// Advances to the next two tiles, if any.
    fn next(&mut self);

    /// Returns `level + 128` of sixteen rows, eight per register.
    ///
    /// They are a quarter of one of the two tiles (0 or 1).
    /// Each quarter is requested once, in order.
    fn sixteen_rows(&mut self, tile: usize, quarter: usize) -> [__m256i; 2];
}

/// Takes the next `N` bytes of the rest, if there are as many.
#[inline(always)]
pub(super) fn go_on<'a, const N: usize>(now: &mut &'a [u8; N], rest: &mut &'a [u8]) {
    if let Some((first, after)) = rest.split_first_chunk() {
        (*now, *rest) = (first, after);
    }
}

/// Sets `now` to the first `N` bytes of the rest.
///
/// If there are fewer, the rest is copied once to `end`, followed by arbitrary bytes.
#[inline(always)]
pub(super) fn look_at<'a, const N: usize, const END: usize>(
    now: &mut &'a [u8; N],
    rest: &mut &'a [u8],
    end: &mut Option<&'a mut [u8; END]>,
) {
    if rest.len() < N
        && let Some(end) = end.take()
    {
        end[..rest.len()].copy_from_slice(rest);
        *rest = end;
    }
    // There are as many: at the end, at least half of the bytes are not part of the rest.
    if let Some(first) = rest.first_chunk() {
        *now = first;
    }
}

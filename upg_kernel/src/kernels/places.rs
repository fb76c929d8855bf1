//! Codes of stored sparse weights: their places, and full-width loads of them.
#![forbid(unsafe_code)]

/// Shuffle tables that move the stored levels of 16 weights to their places.
///
/// One register belongs to the first eight bits, one to the next eight; their sum controls the
/// shuffle. The first has the places of eight weights, and in the other half the number of stored
/// ones. A weight that is not stored gets a byte with its highest bit set, which gives 0 in the
/// shuffle. The second has nothing in the first half, and then the places of the next eight
/// weights, counted from the first of them.
pub(super) static PLACES: Places = Places({
    let mut places = [[[0; 16]; 256]; 2];
    let mut bits = 0;
    while bits < 256 {
        let (mut i, mut stored) = (0, 0);
        while i < 8 {
            let place = if bits >> i & 1 == 1 { stored } else { 0x80 };
            places[0][bits][i] = place;
            places[1][bits][i + 8] = place;
            stored += (bits >> i & 1) as u8;
            i += 1;
        }
        while i < 16 {
            places[0][bits][i] = stored;
            i += 1;
        }
        bits += 1;
    }
    places
});

#[repr(align(64))]
pub(super) struct Places(pub [[[u8; 16]; 256]; 2]);

/// Returns 16 codes of 4 bits, from the first (0) or the second (1) nibble on.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
pub(super) fn sixteen_codes([low, high]: [u64; 2], first: usize) -> u64 {
    let bits = 4 * first as u32;
    low >> bits | high << 1 << (63 - bits)
}

/// Returns the first `N` bytes. If there are fewer, copies them to `end`, followed by
/// arbitrary bytes.
#[inline(always)]
pub(super) fn window<'a, const N: usize>(bytes: &'a [u8], end: &'a mut [u8; N]) -> &'a [u8; N] {
    match bytes.first_chunk() {
        Some(bytes) => bytes,
        None => {
            end[..bytes.len()].copy_from_slice(bytes);
            end
        }
    }
}

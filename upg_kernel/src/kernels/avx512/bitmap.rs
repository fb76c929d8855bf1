//! `s8` and `s4` rows times a vector.

use super::*;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn bitmap(rows: BitmapRows<'_>, x: &Activations, out: &mut [f32]) {
    match rows.levels {
        LevelsView::Bytes => bitmap_levels::<false>(rows, &[0; 16], x, out),
        LevelsView::Nibbles(codebook) => bitmap_levels::<true>(rows, codebook, x, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
fn bitmap_levels<const NIBBLES: bool>(
    rows: BitmapRows<'_>,
    codebook: &[i8; 16],
    x: &Activations,
    out: &mut [f32],
) {
    let table = codebook_register(codebook);
    let words = rows.bitmap.chunks_exact(rows.groups);
    let primes = rows.prime_indices.chunks_exact(rows.groups);
    let places = rows.row_pointers.iter().zip(rows.scales);
    for (((words, primes), (start, scale)), out) in words.zip(primes).zip(places).zip(out) {
        // To the end of the matrix, not of the row: whole loads, of which the bits take what is theirs.
        let codes = &rows.codes[*start as usize..];
        *out = scale * bitmap_row::<NIBBLES>(words, codes, primes, table, x);
    }
}

/// A row without its scale.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")]
fn bitmap_row<const NIBBLES: bool>(
    words: &[[u8; 8]],
    codes: &[u8],
    primes: &[u8],
    table: __m512i,
    x: &Activations,
) -> f32 {
    let mut values = [0.0; CHUNK + 4];
    let mut sum = _mm512_setzero_ps();
    let mut at = 0;
    let groups = words.chunks(CHUNK).zip(primes.chunks(CHUNK)).enumerate();
    for (chunk, (words, primes)) in groups {
        factors(primes, chunk * CHUNK, 64, &x.scales, &mut values);
        let blocks = &x.blocks[chunk * CHUNK..];
        for ((word, block), factor) in words.iter().zip(blocks).zip(&values) {
            let kept = u64::from_le_bytes(*word);
            let (levels, bytes) = match NIBBLES {
                true => expand_nibbles(codes, at, kept, table),
                false => expand_bytes(codes, at, kept),
            };
            at += bytes;
            let [products] = dot([levels], block);
            sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(*factor), sum);
        }
    }
    _mm512_reduce_add_ps(sum)
}

/// The biased levels of 64 columns whose codes start at `at`, and the bytes of these codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt")]
pub(super) fn expand_bytes(codes: &[u8], at: usize, kept: u64) -> (__m512i, usize) {
    // What lies after the codes of this group is not expanded.
    (
        expand(kept, biased(load_at(codes, at))),
        kept.count_ones() as usize,
    )
}

/// [`expand_bytes`] of 4-bit codes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
pub(super) fn expand_nibbles(
    codes: &[u8],
    at: usize,
    kept: u64,
    table: __m512i,
) -> (__m512i, usize) {
    // 0x00HL -> 0x0H0L: two codes in their order.
    let wide = _mm512_cvtepu8_epi16(load_half_at(codes, at));
    let pairs = _mm512_or_si512(wide, _mm512_slli_epi16::<4>(wide));
    let levels = _mm512_shuffle_epi8(table, _mm512_and_si512(pairs, _mm512_set1_epi8(15)));
    let bytes = (kept.count_ones() as usize).div_ceil(2);
    (expand(kept, levels), bytes)
}

/// Levels to the places whose bit is set; elsewhere level 0, biased: what is not stored adds nothing.
#[inline]
#[target_feature(enable = "avx512f,avx512vbmi2")]
fn expand(kept: u64, levels: __m512i) -> __m512i {
    _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), kept, levels)
}

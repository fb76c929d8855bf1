//! Packed weights to f32, and f32 to 16-bit floats.

use super::*;
use half::bf16;

/// `out [rows, cols]`: every row in the stored basis, as the reference decodes it, to the bit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn decode(rows: Rows<'_>, cols: usize, out: &mut [f32]) {
    match rows {
        Rows::Grouped(rows) => match rows.levels {
            LevelsView::Bytes => decode_bytes(rows, cols, out),
            LevelsView::Nibbles(codebook) => decode_nibbles(rows, codebook, cols, out),
        },
        Rows::Bitmap(rows) => decode_bitmap(rows, cols, out),
        Rows::Trellis(strip) => match (strip.k, strip.level_table.len() > 128) {
            (2, false) => decode_strip::<2, false>(strip, out),
            (2, true) => decode_strip::<2, true>(strip, out),
            (3, false) => decode_strip::<3, false>(strip, out),
            (3, true) => decode_strip::<3, true>(strip, out),
            (_, false) => decode_strip::<4, false>(strip, out),
            (_, true) => decode_strip::<4, true>(strip, out),
        },
    }
}

/// What turns levels into weights: `scale * (prime * level)`, of which the product in brackets is exact.
#[derive(Clone, Copy)]
struct Factors {
    scale: __m512,
    prime: __m512,
}

impl Factors {
    #[target_feature(enable = "avx512f")]
    fn new(scale: f32, prime_index: u8) -> Self {
        Self {
            scale: _mm512_set1_ps(scale),
            prime: _mm512_set1_ps(PRIME_LUT[usize::from(prime_index)] as f32),
        }
    }

    /// Up to 16 weights.
    #[target_feature(enable = "avx512f")]
    fn put(self, levels: __m128i, out: &mut [f32]) {
        let levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels));
        let weights = _mm512_mul_ps(self.scale, _mm512_mul_ps(self.prime, levels));
        match out.first_chunk_mut() {
            Some(out) => *out = to_array(weights),
            None => out.copy_from_slice(&to_array(weights)[..out.len()]),
        }
    }

    /// Up to 64 weights.
    #[target_feature(enable = "avx512f")]
    fn put_register(self, levels: &[u8; 64], out: &mut [f32]) {
        let levels = levels.as_chunks().0;
        for (levels, out) in levels.iter().zip(out.chunks_mut(16)) {
            self.put(load_16(levels), out);
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load_16(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn decode_bytes(rows: GroupedRows<'_>, cols: usize, out: &mut [f32]) {
    let codes = rows.codes.chunks_exact(rows.row_bytes);
    let primes = rows.prime_indices.chunks_exact(rows.groups);
    for (row, (codes, primes)) in codes.zip(primes).enumerate() {
        let out = &mut out[row * cols..(row + 1) * cols];
        let groups = codes.chunks_exact(rows.group).zip(primes);
        for (out, (codes, prime)) in out.chunks_mut(rows.group).zip(groups) {
            let factors = Factors::new(rows.scales[row], *prime);
            for (codes, out) in codes.as_chunks().0.iter().zip(out.chunks_mut(16)) {
                factors.put(load_16(codes), out);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn decode_nibbles(rows: GroupedRows<'_>, codebook: &[i8; 16], cols: usize, out: &mut [f32]) {
    let table = load_16(bytemuck::cast_ref(codebook));
    let low_half = _mm_set1_epi8(15);
    let codes = rows.codes.chunks_exact(rows.row_bytes);
    let primes = rows.prime_indices.chunks_exact(rows.groups);
    for (row, (codes, primes)) in codes.zip(primes).enumerate() {
        let out = &mut out[row * cols..(row + 1) * cols];
        let groups = codes.chunks_exact(rows.group / 2).zip(primes);
        for (out, (codes, prime)) in out.chunks_mut(rows.group).zip(groups) {
            let factors = Factors::new(rows.scales[row], *prime);
            let half = out.len().min(rows.group / 2);
            let (first, second) = out.split_at_mut(half);
            let codes = codes.as_chunks().0;
            for (codes, out) in codes.iter().zip(first.chunks_mut(16)) {
                let codes = _mm_and_si128(load_16(codes), low_half);
                factors.put(_mm_shuffle_epi8(table, codes), out);
            }
            for (codes, out) in codes.iter().zip(second.chunks_mut(16)) {
                let codes = _mm_and_si128(_mm_srli_epi16::<4>(load_16(codes)), low_half);
                factors.put(_mm_shuffle_epi8(table, codes), out);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn decode_bitmap(rows: BitmapRows<'_>, cols: usize, out: &mut [f32]) {
    let table = match rows.levels {
        LevelsView::Bytes => None,
        LevelsView::Nibbles(codebook) => Some(codebook_register(codebook)),
    };
    let words = rows.bitmap.chunks_exact(rows.groups);
    let primes = rows.prime_indices.chunks_exact(rows.groups);
    for (row, (words, primes)) in words.zip(primes).enumerate() {
        let mut at = rows.row_pointers[row] as usize;
        let out = &mut out[row * cols..(row + 1) * cols];
        for (out, (word, prime)) in out.chunks_mut(64).zip(words.iter().zip(primes)) {
            let kept = u64::from_le_bytes(*word);
            let (levels, bytes) = match table {
                None => expand_bytes(rows.codes, at, kept),
                Some(table) => expand_nibbles(rows.codes, at, kept, table),
            };
            at += bytes;
            let factors = Factors::new(rows.scales[row], *prime);
            factors.put_register(&to_bytes(biased(levels)), out);
        }
    }
}

/// Tiles that are decoded before they become rows: a register of each row.
const TILES_AT_ONCE: usize = 16;

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode_strip<const K: usize, const WIDE: bool>(strip: TrellisStrip<'_>, out: &mut [f32]) {
    let decoder = Decoder::new(K, strip.shift_table, strip.level_table);
    let cols = strip.cols;
    let mut tiles = [[[0u8; 4]; 64]; TILES_AT_ONCE];
    for first in (0..cols).step_by(TILE * TILES_AT_ONCE) {
        let cols_now = (cols - first).min(TILE * TILES_AT_ONCE);
        let needed = cols_now.div_ceil(TILE);
        for (i, tile) in tiles.iter_mut().enumerate().take(needed) {
            let at = (first / TILE + i) * 32 * K;
            for quarter in 0..4 {
                let bytes = load_at(strip.codes, at + quarter * 8 * K);
                let levels = to_bytes(biased(decoder.levels::<WIDE>(bytes)));
                let rows: &mut [[u8; 4]] = &mut tile[16 * quarter..16 * quarter + 16];
                rows.as_flattened_mut().copy_from_slice(&levels);
            }
        }
        for (row, (scale, prime)) in strip.scales.iter().zip(strip.prime_indices).enumerate() {
            let mut levels = [[0; 4]; TILES_AT_ONCE];
            for i in 0..TILES_AT_ONCE {
                levels[i] = tiles[i][row];
            }
            let out = &mut out[row * cols + first..][..cols_now];
            Factors::new(*scale, *prime).put_register(bytemuck::cast_ref(&levels), out);
        }
    }
}

/// [`half::bf16::from_f32`] of each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn to_bf16(x: &[f32], out: &mut [bf16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values = load_f32(x);
        let bits = _mm512_castps_si512(values);
        let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half_less = _mm512_set1_epi32(0x7FFF);
        let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(half_less, is_odd));
        // Rounding could turn a NaN into an infinity: it only becomes a quiet one.
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
        let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
        let rounded = _mm512_mask_blend_epi32(nan, rounded, quiet);
        store_16(
            bytemuck::cast_mut(out),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)),
        );
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = bf16::from_f32(*x);
    }
}

/// [`half::f16::from_f32`] of each.
#[target_feature(enable = "avx512f")]
pub(super) fn to_f16(x: &[f32], out: &mut [f16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values =
            _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(load_f32(x));
        store_16(bytemuck::cast_mut(out), values);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = f16::from_f32(*x);
    }
}

#[target_feature(enable = "avx512f")]
fn store_16(out: &mut [u16; 16], values: __m256i) {
    // SAFETY: 16 values are 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), values) };
}

//! `s8` and `s4`.

use super::*;
use crate::kernels::views::LevelsView;

/// Groups whose codes are looked up at once: their levels stay in the L1 cache.
const CHUNK: usize = 32;

/// The levels of a chunk, and room for whole loads and stores at its end.
type Levels = [u8; CHUNK * GROUP + GROUP];

/// Where each of 16 weights finds its level among those that are stored: one register for the first eight
/// bits, one for the next eight, which added up are the control of a shuffle.
///
/// The first has the places of eight weights (those that are not stored get a byte with its highest bit set,
/// which is 0 after the shuffle), and in the other half the number of stored ones. The second has nothing
/// and the places of the next eight weights, counted from the first of them.
static PLACES: Places = Places({
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
struct Places([[[u8; 16]; 256]; 2]);

/// The rows times `x`, which is in natural order.
#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn multiply(rows: BitmapRows<'_>, x: &Activations, out: &mut [f32]) {
    match rows.levels {
        LevelsView::Bytes => all_rows::<false>(rows, &[0; 16], x, out),
        LevelsView::Nibbles(codebook) => all_rows::<true>(rows, codebook, x, out),
    }
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn all_rows<const NIBBLES: bool>(
    rows: BitmapRows<'_>,
    codebook: &[i8; 16],
    x: &Activations,
    out: &mut [f32],
) {
    let table = twice(bytemuck::cast_ref(codebook));
    let mut buffer = [0; size_of::<Levels>()];
    let words = rows.bitmap.chunks_exact(rows.groups);
    let primes = rows.prime_indices.chunks_exact(rows.groups);
    let places = rows.row_pointers.iter().zip(rows.scales);
    for (((words, primes), (start, scale)), out) in words.zip(primes).zip(places).zip(out) {
        // To the end of the matrix, not of the row: whole loads, of which the bits take what is theirs.
        let mut codes = &rows.codes[*start as usize..];
        let mut sum = _mm256_setzero_ps();
        let chunks = words.chunks(CHUNK).zip(primes.chunks(CHUNK));
        for (chunk, (words, primes)) in chunks.enumerate() {
            let (blocks, scales) = (&x.blocks[chunk * CHUNK..], &x.scales[chunk * CHUNK..]);
            let levels: &Levels = if NIBBLES {
                look_up(codes, code_bytes(words), table, &mut buffer);
                &buffer
            } else if let Some(levels) = codes.first_chunk() {
                levels
            } else {
                buffer[..codes.len()].copy_from_slice(codes);
                &buffer
            };
            let (products, end) = multiply_chunk::<NIBBLES>(levels, words, primes, blocks, scales);
            codes = &codes[if NIBBLES { end / 2 } else { end }..];
            sum = _mm256_add_ps(sum, products);
        }
        *out = scale * sum_of(sum);
    }
}

/// Bytes of the codes of some groups.
#[target_feature(enable = "avx2,fma,popcnt")]
fn code_bytes(words: &[[u8; 8]]) -> usize {
    let mut bytes = 0;
    for word in words {
        bytes += u64::from_le_bytes(*word).count_ones().div_ceil(2) as usize;
    }
    bytes
}

/// The levels of `bytes` 4-bit codes, two a byte, low halves first; after them come some that mean nothing.
#[target_feature(enable = "avx2,fma,popcnt")]
fn look_up(codes: &[u8], bytes: usize, table: __m256i, levels: &mut Levels) {
    let mut last;
    let codes: &[u8; CHUNK * GROUP / 2] = match codes.first_chunk() {
        Some(codes) => codes,
        None => {
            last = [0; CHUNK * GROUP / 2];
            last[..codes.len()].copy_from_slice(codes);
            &last
        }
    };
    let low_halves = _mm256_set1_epi8(15);
    let levels = levels.as_chunks_mut::<32>().0.iter_mut();
    let steps = codes.as_chunks::<16>().0.iter().zip(levels);
    for (codes, levels) in steps.take(bytes.div_ceil(16)) {
        // 0x00HL -> 0x0H0L: two codes in their order.
        let wide = _mm256_cvtepu8_epi16(load_half(codes));
        let pairs = _mm256_or_si256(wide, _mm256_slli_epi16::<4>(wide));
        let found = _mm256_shuffle_epi8(table, _mm256_and_si256(pairs, low_halves));
        // SAFETY: the reference is to 32 bytes; the store needs no alignment.
        unsafe { _mm256_storeu_si256(levels.as_mut_ptr().cast(), found) };
    }
}

/// The products of the groups of a chunk, whose levels follow each other, and where those end.
#[target_feature(enable = "avx2,fma,popcnt")]
fn multiply_chunk<const NIBBLES: bool>(
    levels: &Levels,
    words: &[[u8; 8]],
    primes: &[u8],
    blocks: &[Block],
    scales: &[f32],
) -> (__m256, usize) {
    let mut sum = _mm256_setzero_ps();
    let mut at = 0;
    let groups = words.iter().zip(primes).zip(blocks).zip(scales);
    for (((word, index), block), scale) in groups {
        let kept = u64::from_le_bytes(*word);
        let stored = levels[at..].first_chunk();
        let stored = stored.expect("room for a group after the levels of a chunk");
        let n = kept.count_ones() as usize;
        // Of codes, every group starts on a byte.
        at += if NIBBLES { n.next_multiple_of(2) } else { n };
        let [first, second] = expand(stored, kept);
        let x = [false, true].map(|second| Half::of(block, second));
        let first = dot(first, load(x[0].high), load(x[0].low));
        let second = dot(second, load(x[1].high), load(x[1].low));
        let offset = _mm256_add_epi32(load_i32(x[0].offset), load_i32(x[1].offset));
        let products = _mm256_add_epi32(_mm256_add_epi32(first, second), offset);
        let factor = _mm256_mul_ps(prime(*index), _mm256_set1_ps(*scale));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), factor, sum);
    }
    (sum, at)
}

/// The biased levels of 64 columns: those of the kept ones from `levels`, in their order, and level 0.
#[inline]
#[target_feature(enable = "avx2,fma,popcnt")]
fn expand(levels: &[u8; GROUP], kept: u64) -> [__m256i; 2] {
    let mut sixteens = [_mm_setzero_si128(); 4];
    for (i, sixteen) in sixteens.iter_mut().enumerate() {
        let before = (kept & ((1 << (16 * i)) - 1)).count_ones() as usize;
        let bits = kept >> (16 * i);
        let (low, high) = (bits & 255, bits >> 8 & 255);
        let places = _mm_add_epi8(
            load_half(&PLACES.0[0][low as usize]),
            load_half(&PLACES.0[1][high as usize]),
        );
        // SAFETY: `before` counts up to 16 * i of 64 bits, and i is at most 3: the 16 bytes end inside
        // of the 64 of the reference. The load needs no alignment.
        let stored = unsafe { _mm_loadu_si128(levels.as_ptr().add(before).cast()) };
        *sixteen = _mm_shuffle_epi8(stored, places);
    }
    [
        biased(_mm256_set_m128i(sixteens[1], sixteens[0])),
        biased(_mm256_set_m128i(sixteens[3], sixteens[2])),
    ]
}

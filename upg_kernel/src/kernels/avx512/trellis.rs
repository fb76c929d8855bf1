//! `t2`, `t3` and `t4` strips times a vector.

use super::*;

/// The registers that turn the bits of 64 weights into their levels.
pub(super) struct Decoder {
    /// Byte `b` of word `i` comes from byte `k * i + b`: the bits of eight weights.
    spread: __m512i,
    /// Bit `k * j` of its word for byte `j`: the low bits of the state.
    low: __m512i,
    /// Six bits on: the high bits.
    high: __m512i,
    shifts: __m512i,
    /// Biased.
    levels: [__m512i; 4],
}

impl Decoder {
    #[target_feature(enable = "avx512f,avx512bw")]
    pub(super) fn new(k: usize, shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        let bytes = |f: fn(usize, usize, usize) -> usize| -> [u8; 64] {
            std::array::from_fn(|i| f(k, i / 8, i % 8) as u8)
        };
        let table: &[u8] = bytemuck::cast_slice(level_table);
        Self {
            spread: load(&bytes(|k, word, byte| k * word + byte)),
            low: load(&bytes(|k, _, byte| k * byte)),
            high: load(&bytes(|k, _, byte| k * byte + 6)),
            shifts: load(shift_table),
            levels: std::array::from_fn(|i| biased(load_at(table, 64 * i))),
        }
    }

    /// The biased levels of 64 weights whose bits start with those of `bytes`. With more than 128
    /// levels `WIDE` has to be true.
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn levels<const WIDE: bool>(&self, bytes: __m512i) -> __m512i {
        let words = _mm512_permutexvar_epi8(self.spread, bytes);
        let low = _mm512_multishift_epi64_epi8(self.low, words);
        let high = _mm512_multishift_epi64_epi8(self.high, words);
        // The look-ups take the low 6 and 7 bits of each byte and ignore the rest.
        let shift = _mm512_permutexvar_epi8(low, self.shifts);
        let [a, b, c, d] = self.levels;
        if !WIDE {
            return _mm512_permutex2var_epi8(a, _mm512_add_epi8(shift, high), b);
        }
        let high = _mm512_and_si512(high, _mm512_set1_epi8(127));
        let index = _mm512_add_epi8(shift, high);
        let upper = _mm512_movepi8_mask(index);
        let low = _mm512_permutex2var_epi8(a, index, b);
        _mm512_mask_blend_epi8(upper, low, _mm512_permutex2var_epi8(c, index, d))
    }
}

/// Columns of a tile, and tiles to a group of activations.
pub(super) const TILE: usize = 4;
const TILES: usize = 16;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")]
pub(super) fn trellis<const K: usize, const WIDE: bool>(
    strip: TrellisStrip<'_>,
    x: &Activations,
    out: &mut [f32],
) {
    let decoder = Decoder::new(K, strip.shift_table, strip.level_table);
    let tiles = strip.cols.div_ceil(TILE);
    let mut sums = [_mm512_setzero_ps(); 4];
    let groups = x.blocks.iter().zip(&x.offsets).zip(&x.scales);
    for (group, ((block, offset), scale)) in groups.enumerate() {
        let first = group * TILES;
        let (mut high, mut low) = ([_mm512_setzero_si512(); 4], [_mm512_setzero_si512(); 4]);
        let x_high: &[i32; 16] = bytemuck::cast_ref(&block.high);
        let x_low: &[i32; 16] = bytemuck::cast_ref(&block.low);
        for tile in 0..TILES.min(tiles.saturating_sub(first)) {
            let x_high = _mm512_set1_epi32(x_high[tile]);
            let x_low = _mm512_set1_epi32(x_low[tile]);
            let at = (first + tile) * 32 * K;
            for quarter in 0..4 {
                let bytes = load_at(strip.codes, at + quarter * 8 * K);
                let levels = decoder.levels::<WIDE>(bytes);
                high[quarter] = _mm512_dpbusd_epi32(high[quarter], levels, x_high);
                low[quarter] = _mm512_dpbusd_epi32(low[quarter], levels, x_low);
            }
        }
        let offset = _mm512_set1_epi32(offset[0] + offset[1]);
        let scale = _mm512_set1_ps(*scale);
        for quarter in 0..4 {
            let high = _mm512_slli_epi32::<7>(high[quarter]);
            let products = _mm512_add_epi32(high, _mm512_add_epi32(low[quarter], offset));
            sums[quarter] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[quarter]);
        }
    }
    let rows = sums.iter().flat_map(|&sum| to_array(sum));
    let factors = strip.scales.iter().zip(strip.prime_indices);
    for ((out, sum), (scale, prime)) in out.iter_mut().zip(rows).zip(factors) {
        *out = scale * (PRIME_LUT[usize::from(*prime)] as f32 * sum);
    }
}

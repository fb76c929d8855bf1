//! `t2`, `t3` and `t4`.
//!
//! A row of a tile is four weights, whose states end inside of 32 bits, so that a lane of a register decodes
//! a row: a shuffle brings its bytes there, a few shifts make four bytes of the low six bits of the states
//! and four of the high seven, and look-ups of 16 entries each do the rest.

use super::*;

/// Columns of a tile, and tiles to a group of activations.
const TILE: usize = 4;
const TILES: usize = 16;

/// Registers of eight rows each to a strip.
const REGISTERS: usize = 8;

/// The (up to 64) rows of a strip times `x`, in natural order.
#[target_feature(enable = "avx2,fma,popcnt")]
pub(super) fn multiply(strip: TrellisStrip<'_>, x: &Activations, out: &mut [f32]) {
    match (strip.k, strip.level_table.len() > 128) {
        (2, false) => multiply_strip::<2, false>(strip, x, out),
        (2, true) => multiply_strip::<2, true>(strip, x, out),
        (3, false) => multiply_strip::<3, false>(strip, x, out),
        (3, true) => multiply_strip::<3, true>(strip, x, out),
        (_, false) => multiply_strip::<4, false>(strip, x, out),
        (_, true) => multiply_strip::<4, true>(strip, x, out),
    }
}

/// How many quads (four rows of a tile, `2 * K` bytes) after that in the low half of a register comes the
/// one in its high half: 16 bytes later where 16 bytes are a number of quads, else 24.
const fn distance(k: usize) -> usize {
    if k == 4 { 2 } else { 4 }
}

/// The quad in the low half of a register.
const fn quad(k: usize, register: usize) -> usize {
    register / distance(k) * 2 * distance(k) + register % distance(k)
}

/// The column of each byte of a lane.
const fn columns(k: usize) -> [usize; TILE] {
    if k == 4 { [0, 2, 1, 3] } else { [0, 1, 2, 3] }
}

#[target_feature(enable = "avx2,fma,popcnt")]
fn multiply_strip<const K: usize, const WIDE: bool>(
    strip: TrellisStrip<'_>,
    x: &Activations,
    out: &mut [f32],
) {
    let decoder = Decoder::new(K, strip.shift_table, strip.level_table);
    let tiles = strip.cols.div_ceil(TILE);
    let mut sums = [_mm256_setzero_ps(); REGISTERS];
    let mut indices = [[[0; 32]; REGISTERS]; TILES];
    let groups = x.blocks.iter().zip(&x.offsets).zip(&x.scales);
    for (group, ((block, offset), scale)) in groups.enumerate() {
        let first = group * TILES;
        let tiles = TILES.min(tiles.saturating_sub(first));
        let (high, low) = (ordered::<K>(&block.high), ordered::<K>(&block.low));
        let offset = _mm256_set1_epi32(offset[0] + offset[1]);
        let scale = _mm256_set1_ps(*scale);
        for (tile, indices) in indices.iter_mut().take(tiles).enumerate() {
            let codes = &strip.codes[(first + tile) * 32 * K..];
            for (i, indices) in indices.iter_mut().enumerate() {
                let bytes = load_at(codes, 2 * K * quad(K, i));
                store(decoder.indices::<K, WIDE>(bytes), indices);
            }
        }
        for (pair, sums) in sums.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            let mut products = [offset; 2];
            for (tile, indices) in indices.iter().take(tiles).enumerate() {
                let (high, low) = (_mm256_set1_epi32(high[tile]), _mm256_set1_epi32(low[tile]));
                for i in 0..2 {
                    let levels = decoder.levels::<WIDE>(load(&indices[2 * pair + i]));
                    products[i] = _mm256_add_epi32(products[i], dot(levels, high, low));
                }
            }
            for i in 0..2 {
                sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[i]), scale, sums[i]);
            }
        }
    }
    let mut rows = [0.0; 8 * REGISTERS];
    for (register, sums) in sums.into_iter().enumerate() {
        let mut lanes = [0.0; 8];
        // SAFETY: the array has eight floats; the store needs no alignment.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
        let (low, high) = lanes.split_at(4);
        let quad = quad(K, register);
        rows[4 * quad..][..4].copy_from_slice(low);
        rows[4 * (quad + distance(K))..][..4].copy_from_slice(high);
    }
    let factors = strip.scales.iter().zip(strip.prime_indices);
    for ((out, sum), (scale, prime)) in out.iter_mut().zip(rows).zip(factors) {
        *out = scale * (PRIME_LUT[usize::from(*prime)] as f32 * sum);
    }
}

/// A plane of activations, four columns a number, in the order of the bytes of a lane.
#[inline]
#[target_feature(enable = "avx2")]
fn ordered<const K: usize>(plane: &[i8; GROUP]) -> [i32; TILES] {
    let mut tiles = [[0; TILE]; TILES];
    for (tile, x) in tiles.iter_mut().zip(plane.as_chunks::<TILE>().0) {
        *tile = columns(K).map(|column| x[column]);
    }
    bytemuck::cast(tiles)
}

/// 32 bytes at `at`. A strip has 16 bytes after its last tile, so that there are as many for every quad.
#[inline]
#[target_feature(enable = "avx2")]
fn load_at(codes: &[u8], at: usize) -> __m256i {
    let bytes = codes[at..].first_chunk();
    load(bytes.expect("a quad of a strip and what follows it"))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store(v: __m256i, bytes: &mut [u8; 32]) {
    // SAFETY: the reference is to 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), v) }
}

/// What turns the bits of 32 weights into their levels.
struct Decoder {
    /// The bytes of a row for each lane.
    rows: __m256i,
    sixteen: __m256i,
    /// By which the bits of a row start later than its bytes.
    starts: __m256i,
    shifts: [__m256i; 4],
    /// Biased.
    levels: [[__m256i; 4]; 4],
}

/// A table of 64 entries for [`look_up`]: 16 of them, and how each of the others differs from that 16 before.
#[target_feature(enable = "avx2")]
fn differences(table: &[u8; 64]) -> [__m256i; 4] {
    let mut all = [_mm256_setzero_si256(); 4];
    for (i, sixteen) in table.as_chunks::<16>().0.iter().enumerate() {
        all[i] = twice(sixteen);
    }
    [
        all[0],
        _mm256_xor_si256(all[0], all[1]),
        _mm256_xor_si256(all[1], all[2]),
        _mm256_xor_si256(all[2], all[3]),
    ]
}

/// The entries of a table of [`differences`] for indices below 64, given as they are and less 16, 32 and 48:
/// a shuffle gives 0 for what is negative.
#[inline]
#[target_feature(enable = "avx2")]
fn look_up(table: [__m256i; 4], index: [__m256i; 4]) -> __m256i {
    let first = _mm256_xor_si256(
        _mm256_shuffle_epi8(table[0], index[0]),
        _mm256_shuffle_epi8(table[1], index[1]),
    );
    let second = _mm256_xor_si256(
        _mm256_shuffle_epi8(table[2], index[2]),
        _mm256_shuffle_epi8(table[3], index[3]),
    );
    _mm256_xor_si256(first, second)
}

/// The low six bits of each byte as [`look_up`] takes them.
#[inline]
#[target_feature(enable = "avx2")]
fn index(bytes: __m256i, sixteen: __m256i) -> [__m256i; 4] {
    let index = _mm256_and_si256(bytes, _mm256_set1_epi8(63));
    let less16 = _mm256_sub_epi8(index, sixteen);
    let less32 = _mm256_sub_epi8(less16, sixteen);
    [index, less16, less32, _mm256_sub_epi8(less32, sixteen)]
}

impl Decoder {
    #[target_feature(enable = "avx2")]
    fn new(k: usize, shift_table: &[u8; 64], level_table: &[i8]) -> Self {
        let mut rows = [0; 32];
        let mut starts = [0; 8];
        for (lane, bytes) in rows.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (quad, row) = (lane / 4 * distance(k), lane % 4);
            let bit = 2 * k * quad * 8 % 128 + row * 4 * k;
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = (bit / 8 + i) as u8;
            }
            starts[lane] = (bit % 8) as i32;
        }
        let mut levels = [[_mm256_setzero_si256(); 4]; 4];
        let tables = level_table.as_chunks::<64>().0;
        for (levels, table) in levels.iter_mut().zip(tables) {
            *levels = differences(bytemuck::cast_ref(table));
            levels[0] = biased(levels[0]);
        }
        Self {
            rows: load(&rows),
            sixteen: load(&std::hint::black_box([16; 32])),
            starts: load_i32(&starts),
            shifts: differences(shift_table),
            levels,
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn indices<const K: usize, const WIDE: bool>(&self, bytes: __m256i) -> __m256i {
        let (low, mut high) = self.split::<K>(_mm256_shuffle_epi8(bytes, self.rows));
        if WIDE {
            high = _mm256_and_si256(high, _mm256_set1_epi8(127));
        }
        _mm256_add_epi8(look_up(self.shifts, index(low, self.sixteen)), high)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn levels<const WIDE: bool>(&self, all: __m256i) -> __m256i {
        let index = index(all, self.sixteen);
        let bit6 = _mm256_add_epi8(all, all);
        let [a, b, c, d] = self.levels;
        let levels = _mm256_blendv_epi8(look_up(a, index), look_up(b, index), bit6);
        if WIDE {
            let upper = _mm256_blendv_epi8(look_up(c, index), look_up(d, index), bit6);
            return _mm256_blendv_epi8(levels, upper, all);
        }
        levels
    }

    /// The low 6 and the high 7 bits of the states of four weights in each lane, with other bits above them.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn split<const K: usize>(&self, rows: __m256i) -> (__m256i, __m256i) {
        const UPPER: i32 = 0b1010_1010;
        let odd = _mm256_set1_epi16(-256);
        match K {
            2 => {
                // Columns 2 and 3 start 4 bits later, and then columns 1 and 3 two bits.
                let pairs = _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<12>(rows));
                (
                    _mm256_blendv_epi8(pairs, _mm256_slli_epi16::<6>(pairs), odd),
                    _mm256_blendv_epi8(_mm256_srli_epi16::<6>(pairs), pairs, odd),
                )
            }
            3 => {
                let rows = _mm256_srlv_epi32(rows, self.starts);
                // 6 bits and 3 bits.
                let pairs = _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<10>(rows));
                let high = (_mm256_srli_epi16::<6>(pairs), _mm256_srli_epi16::<1>(pairs));
                (
                    _mm256_blendv_epi8(pairs, _mm256_slli_epi16::<5>(pairs), odd),
                    _mm256_blendv_epi8(high.0, high.1, odd),
                )
            }
            _ => {
                // Column 2 starts 8 bits after column 0, so does 3 after 1, and 1 starts at bit 4.
                let high = (_mm256_srli_epi32::<6>(rows), _mm256_slli_epi32::<6>(rows));
                (
                    _mm256_blend_epi16::<UPPER>(rows, _mm256_slli_epi32::<12>(rows)),
                    _mm256_blend_epi16::<UPPER>(high.0, high.1),
                )
            }
        }
    }
}

//! Packed weights times many vectors.
//!
//! A panel is 64 rows of levels, decoded once for all vectors and laid out so that the 16 lanes of a
//! register are 16 rows with four columns each: four activations are broadcast to all lanes, and
//! nothing is summed up across lanes.

use super::*;
use crate::kernels::activations::GROUP;

/// Rows of a panel.
const ROWS: usize = 64;

/// Registers of rows.
const QUARTERS: usize = ROWS / 16;

/// Blocks of columns that are decoded at once: a panel of 128 KiB, and what it is multiplied with, stay in the
/// L2 cache.
const BLOCKS: usize = 32;

/// Vectors that are multiplied together: 24 registers hold their sums.
const TOGETHER: usize = 6;

/// Four columns of 64 rows, as `level + 128`.
type Quad = [[u8; 64]; QUARTERS];

/// The quads of a block.
const QUADS: usize = GROUP / 4;

/// Memory for a panel.
#[derive(Debug, Default)]
pub(crate) struct Panel {
    quads: Vec<Quad>,
    /// What the sums of a group are multiplied with: `[groups, 64]`.
    factors: Vec<[f32; ROWS]>,
    /// Of each vector: `[n, 64]`.
    sums: Vec<[f32; ROWS]>,
    /// Where the codes of each row of a bitmap go on.
    places: Vec<usize>,
}

/// `out [n, rows]`: every row times every vector. The vectors are in natural order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")]
pub(super) fn multiply(
    rows: Rows<'_>,
    vectors: &[Activations],
    panel: &mut Panel,
    out: &mut [f32],
) {
    let (scales, primes) = match rows {
        Rows::Grouped(rows) => (rows.scales, None),
        Rows::Bitmap(rows) => (rows.scales, None),
        Rows::Trellis(strip) => (strip.scales, Some(strip.prime_indices)),
    };
    let count = scales.len();
    assert!(count <= ROWS && vectors.len() * count == out.len());
    panel.sums.clear();
    panel.sums.resize(vectors.len(), [0.0; ROWS]);
    if let Rows::Bitmap(rows) = rows {
        let starts = rows.row_pointers.iter().map(|&start| start as usize);
        panel.places.clear();
        panel.places.extend(starts);
    }
    let blocks = vectors.first().map_or(0, |x| x.blocks.len());
    for first in (0..blocks).step_by(BLOCKS) {
        let blocks = first..blocks.min(first + BLOCKS);
        panel
            .quads
            .resize(blocks.len() * QUADS, [[128; 64]; QUARTERS]);
        let group = match rows {
            Rows::Grouped(rows) => rows.group,
            _ => GROUP,
        };
        panel.factors.clear();
        panel
            .factors
            .resize(blocks.len() * GROUP / group, [1.0; ROWS]);
        match rows {
            Rows::Grouped(rows) => decode_grouped(rows, first, panel),
            Rows::Bitmap(rows) => decode_bitmap(rows, first, panel),
            Rows::Trellis(strip) => decode_trellis(strip, first, panel),
        }
        let Panel {
            quads,
            factors,
            sums,
            ..
        } = &mut *panel;
        let together = vectors.chunks(TOGETHER).zip(sums.chunks_mut(TOGETHER));
        for (vectors, sums) in together {
            let of_panel = (&quads[..], &factors[..]);
            match vectors.len() {
                1 => multiply_panel::<1>(of_panel, vectors, first, sums),
                2 => multiply_panel::<2>(of_panel, vectors, first, sums),
                3 => multiply_panel::<3>(of_panel, vectors, first, sums),
                4 => multiply_panel::<4>(of_panel, vectors, first, sums),
                5 => multiply_panel::<5>(of_panel, vectors, first, sums),
                _ => multiply_panel::<TOGETHER>(of_panel, vectors, first, sums),
            }
        }
    }
    for (sums, out) in panel.sums.iter().zip(out.chunks_exact_mut(count)) {
        for (row, out) in out.iter_mut().enumerate() {
            let prime = primes.map_or(1.0, |primes| PRIME_LUT[usize::from(primes[row])] as f32);
            *out = scales[row] * (prime * sums[row]);
        }
    }
}

/// Adds the products of a panel, whose first block is `first`, with `T` vectors to their sums.
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_panel<const T: usize>(
    (quads, factors): (&[Quad], &[[f32; ROWS]]),
    vectors: &[Activations],
    first: usize,
    sums: &mut [[f32; ROWS]],
) {
    let vectors: &[Activations; T] = vectors.first_chunk().expect("as many vectors as asked for");
    let sums: &mut [[f32; ROWS]; T] = sums.first_chunk_mut().expect("sums of every vector");
    let per_group = quads.len() / factors.len();
    for (group, (quads, factors)) in quads.chunks_exact(per_group).zip(factors).enumerate() {
        let at = group * per_group;
        let block = first + at / QUADS;
        let x: [&Block; T] = std::array::from_fn(|t| &vectors[t].blocks[block]);
        // The quads of a group of 32 are one half of a block.
        let half = at % QUADS;
        let mut products = [[_mm512_setzero_si512(); QUARTERS]; T];
        let planes: [&[i32; QUADS]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].high));
        add_quads(quads, planes, half, &mut products);
        for t in 0..T {
            let offsets = &vectors[t].offsets[block];
            let offset = match per_group {
                QUADS => offsets[0] + offsets[1],
                _ => offsets[half / (QUADS / 2)],
            };
            let offset = _mm512_set1_epi32(offset);
            for product in &mut products[t] {
                *product = _mm512_add_epi32(_mm512_slli_epi32::<7>(*product), offset);
            }
        }
        let planes: [&[i32; QUADS]; T] = std::array::from_fn(|t| bytemuck::cast_ref(&x[t].low));
        add_quads(quads, planes, half, &mut products);
        let (factors, _) = factors.as_chunks::<16>();
        for t in 0..T {
            let scale = _mm512_set1_ps(vectors[t].scales[block]);
            let (sums, _) = sums[t].as_chunks_mut::<16>();
            for quarter in 0..QUARTERS {
                let factor = _mm512_mul_ps(load_f32(&factors[quarter]), scale);
                let product = _mm512_cvtepi32_ps(products[t][quarter]);
                let sum = _mm512_fmadd_ps(product, factor, load_f32(&sums[quarter]));
                sums[quarter] = to_array(sum);
            }
        }
    }
}

/// Adds the products of quads with one plane of `T` blocks, of which they start at element `half`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_quads<const T: usize>(
    quads: &[Quad],
    planes: [&[i32; QUADS]; T],
    half: usize,
    products: &mut [[__m512i; QUARTERS]; T],
) {
    let mut sums = *products;
    for (i, quad) in quads.iter().enumerate() {
        let levels = [
            load(&quad[0]),
            load(&quad[1]),
            load(&quad[2]),
            load(&quad[3]),
        ];
        for t in 0..T {
            let x = _mm512_set1_epi32(planes[t][(half + i) % QUADS]);
            for quarter in 0..QUARTERS {
                sums[t][quarter] = _mm512_dpbusd_epi32(sums[t][quarter], levels[quarter], x);
            }
        }
    }
    *products = sums;
}

/// Puts 64 levels each of 16 rows into one quarter of the quads whose numbers `place` gives.
#[target_feature(enable = "avx512f")]
fn put_levels(
    rows: &[[u8; 64]; 16],
    quarter: usize,
    quads: &mut [Quad],
    place: impl Fn(usize) -> usize,
) {
    for i in 0..QUADS {
        let quad = &mut quads[place(i)][quarter];
        for (row, levels) in rows.iter().enumerate() {
            quad[4 * row..4 * row + 4].copy_from_slice(&levels[4 * i..4 * i + 4]);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn decode_grouped(rows: GroupedRows<'_>, first: usize, panel: &mut Panel) {
    let blocks = panel.quads.len() / QUADS;
    let groups = panel.factors.len();
    let first_group = first * GROUP / rows.group;
    for (row, primes) in rows.prime_indices.chunks_exact(rows.groups).enumerate() {
        let primes = &primes[first_group..rows.groups.min(first_group + groups)];
        for (factors, prime) in panel.factors.iter_mut().zip(primes) {
            factors[row] = PRIME_LUT[usize::from(*prime)] as f32;
        }
    }
    // Level 0 for the rows that a panel has and the matrix has not.
    let mut levels = [[[128u8; 64]; 16]; 2];
    for (quarter, codes) in rows.codes.chunks(16 * rows.row_bytes).enumerate() {
        let codes = codes.chunks_exact(rows.row_bytes);
        match rows.levels {
            LevelsView::Bytes => {
                for block in 0..blocks {
                    for (levels, codes) in levels[0].iter_mut().zip(codes.clone()) {
                        let codes = load_at(codes, (first + block) * GROUP);
                        *levels = to_bytes(biased(codes));
                    }
                    put_levels(&levels[0], quarter, &mut panel.quads, |i| block * QUADS + i);
                }
            }
            LevelsView::Nibbles(codebook) => {
                let table = codebook_register(codebook);
                let low_half = _mm512_set1_epi8(15);
                let half = rows.group / 2;
                for pair in 0..blocks / 2 {
                    for (i, codes) in codes.clone().enumerate() {
                        let codes = load_at(codes, (first / 2 + pair) * GROUP);
                        let low = _mm512_and_si512(codes, low_half);
                        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), low_half);
                        levels[0][i] = to_bytes(_mm512_shuffle_epi8(table, low));
                        levels[1][i] = to_bytes(_mm512_shuffle_epi8(table, high));
                    }
                    for (is_high, levels) in levels.iter().enumerate() {
                        // Back from the order of codes in bytes to that of columns.
                        put_levels(levels, quarter, &mut panel.quads, |i| {
                            let (group, byte) = (4 * i / half, 4 * i % half);
                            let column = group * rows.group + is_high * half + byte;
                            pair * 2 * QUADS + column / 4
                        });
                    }
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
fn decode_bitmap(rows: BitmapRows<'_>, first: usize, panel: &mut Panel) {
    let blocks = (panel.quads.len() / QUADS).min(rows.groups - first.min(rows.groups));
    let mut levels = [[128u8; 64]; 16];
    let table = match rows.levels {
        LevelsView::Bytes => None,
        LevelsView::Nibbles(codebook) => Some(codebook_register(codebook)),
    };
    let count = rows.scales.len();
    for block in 0..blocks {
        for quarter in 0..count.div_ceil(16) {
            for (i, levels) in levels.iter_mut().enumerate().take(count - 16 * quarter) {
                let row = 16 * quarter + i;
                let group = row * rows.groups + first + block;
                let prime = PRIME_LUT[usize::from(rows.prime_indices[group])];
                panel.factors[block][row] = prime as f32;
                let kept = u64::from_le_bytes(rows.bitmap[group]);
                let place = &mut panel.places[row];
                let (register, bytes) = match table {
                    None => expand_bytes(rows.codes, *place, kept),
                    Some(table) => expand_nibbles(rows.codes, *place, kept, table),
                };
                *place += bytes;
                *levels = to_bytes(register);
            }
            put_levels(&levels, quarter, &mut panel.quads, |i| block * QUADS + i);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode_trellis(strip: TrellisStrip<'_>, first: usize, panel: &mut Panel) {
    let k = usize::from(strip.k);
    let decoder = Decoder::new(k, strip.shift_table, strip.level_table);
    let is_wide = strip.level_table.len() > 128;
    let first = first * QUADS;
    let tiles = strip.cols.div_ceil(TILE) - first.min(strip.cols.div_ceil(TILE));
    for (tile, quad) in panel.quads.iter_mut().take(tiles).enumerate() {
        for (quarter, levels) in quad.iter_mut().enumerate() {
            let at = (first + tile) * 32 * k + quarter * 8 * k;
            let bytes = load_at(strip.codes, at);
            let register = match is_wide {
                false => decoder.levels::<false>(bytes),
                true => decoder.levels::<true>(bytes),
            };
            *levels = to_bytes(register);
        }
    }
}

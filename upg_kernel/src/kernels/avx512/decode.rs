//! Packed weights to floats, and f32 to 16-bit floats.

use super::levels::{self, Levels, with_levels};
use super::*;
use crate::kernels::hadamard::{self, Register as _, Sink, Source};
use crate::kernels::{Kernels, Set};
use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;

/// 64 bytes in one cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; GROUP]);

/// Tiles of so many columns.
const TILES: usize = GROUP / 4;

/// Memory of one thread.
#[derive(Default)]
struct Scratch {
    /// The levels of a strip, row by row: `[64, blocks]`.
    rows: Vec<Line>,
    /// A row that is turned back.
    turned: Vec<Line>,
    /// A row on its way past the caches.
    rounded: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out [rows, cols]`: every row as the reference decodes it, to the bit, and turned back if there is a rotation.
/// Past the caches if `streamed`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
pub(super) fn decode<T: Element>(
    proof: Avx512,
    strip: Strip<'_>,
    rotation: Option<&Rotation>,
    streamed: bool,
    out: &mut [T],
) {
    SCRATCH.with_borrow_mut(|scratch| {
        let Scratch {
            rows,
            turned,
            rounded,
        } = scratch;
        let blocks = strip.cols.div_ceil(GROUP);
        rows.resize(blocks * 64, Line([0; GROUP]));
        with_levels!(strip, levels => put_in_rows(levels, &strip, rows));
        let out = out.chunks_exact_mut(strip.cols);
        for (i, (levels, out)) in rows.chunks_exact(blocks).zip(out).enumerate() {
            let mut put = |out: &mut [T]| match rotation {
                None => put_row(proof, levels, &strip, i, out),
                Some(rotation) => {
                    let turned = numbers(turned, strip.cols);
                    put_turned_row(proof, levels, &strip, i, rotation, turned, out);
                }
            };
            if streamed {
                let row = numbers(rounded, strip.cols);
                put(row);
                stream(bytemuck::cast_slice(row), bytemuck::cast_slice_mut(out));
            } else {
                put(out);
            }
        }
        // Other threads see what was streamed before anything that is written from here on.
        _mm_sfence();
    });
}

/// So many numbers of any value.
fn numbers<T: Element>(memory: &mut Vec<Line>, len: usize) -> &mut [T] {
    memory.resize((len * size_of::<T>()).div_ceil(GROUP), Line([0; GROUP]));
    &mut bytemuck::cast_slice_mut(memory)[..len]
}

/// Copies into memory past the caches: nothing is read there to be overwritten.
#[inline]
#[target_feature(enable = "avx512f")]
fn stream(from: &[u8], to: &mut [u8]) {
    let start = to.as_ptr().align_offset(64).min(to.len());
    let (first, to) = to.split_at_mut(start);
    first.copy_from_slice(&from[..start]);
    let (lines, last) = to.as_chunks_mut::<64>();
    let (from, from_last) = from[start..].as_chunks::<64>();
    for (to, from) in lines.iter_mut().zip(from) {
        // SAFETY: the reference is to 64 bytes, and the first of them lies where a line starts.
        unsafe { _mm512_stream_si512(to.as_mut_ptr().cast(), load(from)) };
    }
    last.copy_from_slice(from_last);
}

/// The levels of a strip, row by row: `[64, blocks]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn put_in_rows<L: Levels>(mut levels: L, strip: &Strip<'_>, rows: &mut [Line]) {
    let blocks = strip.cols.div_ceil(GROUP);
    let mut tiles = [[[0u8; 64]; 4]; TILES];
    for block in 0..blocks {
        let cols = (strip.cols - block * GROUP).min(GROUP);
        for pair in &mut tiles.as_chunks_mut::<2>().0[..cols.div_ceil(8)] {
            for (out, tile) in pair.iter_mut().zip(levels.next()) {
                for (out, levels) in out.iter_mut().zip(tile) {
                    store(out, levels);
                }
            }
        }
        for quarter in 0..4 {
            let mut registers = [_mm512_setzero_si512(); TILES];
            for (register, tile) in registers.iter_mut().zip(&tiles) {
                *register = biased(load(&tile[quarter]));
            }
            transpose(&mut registers);
            for (lane, register) in registers.into_iter().enumerate() {
                let row = L::row(quarter, lane);
                store(&mut rows[row * blocks + block].0, register);
            }
        }
    }
}

/// 16 registers of 16 lanes: lane `j` of register `i` becomes lane `i` of register `j`.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: &mut [__m512i; 16]) {
    let mut t = *r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    // Of each four registers the lanes of one column in each quarter.
    for i in 0..4 {
        let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
        r[4 * i] = _mm512_unpacklo_epi64(a, c);
        r[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
        r[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
        r[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for i in 0..4 {
        let [a, b, c, d] = [r[i], r[i + 4], r[i + 8], r[i + 12]];
        let even = [
            _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b),
            _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d),
        ];
        let odd = [
            _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b),
            _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d),
        ];
        t[i] = _mm512_shuffle_i32x4::<0b10_00_10_00>(even[0], even[1]);
        t[i + 4] = _mm512_shuffle_i32x4::<0b10_00_10_00>(odd[0], odd[1]);
        t[i + 8] = _mm512_shuffle_i32x4::<0b11_01_11_01>(even[0], even[1]);
        t[i + 12] = _mm512_shuffle_i32x4::<0b11_01_11_01>(odd[0], odd[1]);
    }
    *r = t;
}

/// The weights of row `row` of a strip.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn put_row<T: Element>(
    proof: Avx512,
    levels: &[Line],
    strip: &Strip<'_>,
    row: usize,
    out: &mut [T],
) {
    let scale = strip.scales[row];
    // A weight is 0 or at least twice its scale.
    let is_normal = scale == 0.0 || scale.is_normal();
    let scale = _mm512_set1_ps(scale);
    for (block, (levels, out)) in levels.iter().zip(out.chunks_mut(GROUP)).enumerate() {
        let indices = match strip.primes {
            Primes::Rows(indices) => [indices[row]; 2],
            Primes::Groups {
                indices,
                cols: GROUP,
            } => [indices[block][row]; 2],
            Primes::Groups { indices, .. } => {
                let first = indices[2 * block][row];
                [first, indices.get(2 * block + 1).map_or(first, |i| i[row])]
            }
        };
        let mut block = [scale; 4];
        for i in 0..4 {
            let prime = PRIME_LUT[usize::from(indices[i / 2])] as f32;
            block[i] = weights(&levels.0.as_chunks().0[i], _mm512_set1_ps(prime), scale);
        }
        put_block(proof, block, is_normal, out);
    }
}

/// The weights of row `i` of a strip, turned back; `row` is memory for them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn put_turned_row<T: Element>(
    proof: Avx512,
    levels: &[Line],
    strip: &Strip<'_>,
    i: usize,
    rotation: &Rotation,
    row: &mut [f32],
    out: &mut [T],
) {
    let size = rotation.size();
    let first = strip.cols - size;
    let primes = match strip.primes {
        Primes::Rows(indices) if first.is_multiple_of(GROUP) && size >= GROUP => indices,
        _ => {
            put_row(proof, levels, strip, i, row);
            rotation.invert_with(Kernels(Set::Avx512(proof)), row);
            return convert(proof, row, out);
        }
    };
    let (before, last) = levels.split_at(first / GROUP);
    put_row(proof, before, strip, i, &mut row[..first]);
    let decoded = Decoded {
        levels: last,
        prime: PRIME_LUT[usize::from(primes[i])] as f32,
        scale: strip.scales[i],
    };
    let norm = rotation.norm();
    let (out, rest) = out.split_at_mut(size);
    let rounded = Rounded {
        proof,
        norm,
        signs: rotation.signs(),
        out: out.as_chunks_mut().0,
    };
    let blocks = row[first..].as_chunks_mut().0;
    if first == 0 {
        return hadamard::transform::<Register>(proof, blocks, decoded, rounded);
    }
    hadamard::transform::<Register>(proof, blocks, decoded, hadamard::Scaled(norm));
    let blocks = row[..size].as_chunks_mut().0;
    hadamard::transform::<Register>(proof, blocks, hadamard::Same, rounded);
    super::hadamard::flip(&mut row[size..], &rotation.signs()[size / 8..]);
    convert(proof, &row[size..], rest);
}

/// Weights of a row, before it is turned back.
struct Decoded<'a> {
    levels: &'a [Line],
    prime: f32,
    scale: f32,
}

impl Source<Register> for Decoded<'_> {
    #[inline(always)]
    fn load(&self, _: Avx512, _: &[[f32; 16]], index: usize) -> Register {
        let levels: &[u8; 16] = &self.levels[index / 4].0.as_chunks().0[index % 4];
        // SAFETY: the argument proves that the processor has the features.
        Register(unsafe {
            weights(
                levels,
                _mm512_set1_ps(self.prime),
                _mm512_set1_ps(self.scale),
            )
        })
    }
}

/// Weights that were turned back, with the signs of the columns, and rounded.
struct Rounded<'a, T> {
    proof: Avx512,
    norm: f32,
    signs: &'a [u8],
    out: &'a mut [[T; 16]],
}

impl<T: Element> Sink<Register> for Rounded<'_, T> {
    #[inline(always)]
    fn store(&mut self, _: &mut [[f32; 16]], index: usize, register: Register) {
        let register = register.scale(self.norm).flip(self.signs, index);
        T::put_16(self.proof, register.0, &mut self.out[index]);
    }
}

/// `scale * (prime * level)` for sixteen levels.
#[inline]
#[target_feature(enable = "avx512f,avx512vl")]
fn weights(levels: &[u8; 16], prime: __m512, scale: __m512) -> __m512 {
    // SAFETY: the reference is to 16 readable bytes; the load needs no alignment.
    let levels = unsafe { _mm_loadu_si128(levels.as_ptr().cast()) };
    let levels = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(levels));
    // The product of integers is exact: there is one rounding, that of the scale.
    _mm512_mul_ps(scale, _mm512_mul_ps(prime, levels))
}

/// [`Element::put`] of up to 64 weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn put_block<T: Element>(proof: Avx512, weights: [__m512; 4], is_normal: bool, out: &mut [T]) {
    match out.first_chunk_mut() {
        Some(out) => T::put(proof, weights, is_normal, out),
        None => {
            let mut block = [T::default(); GROUP];
            T::put(proof, weights, is_normal, &mut block);
            out.copy_from_slice(&block[..out.len()]);
        }
    }
}

/// Rounds finite weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn convert<T: Element>(proof: Avx512, row: &[f32], out: &mut [T]) {
    for (x, out) in row.chunks(GROUP).zip(out.chunks_mut(GROUP)) {
        let mut last = [0.0; GROUP];
        let x: &[f32; GROUP] = match x.first_chunk() {
            Some(x) => x,
            None => {
                last[..x.len()].copy_from_slice(x);
                &last
            }
        };
        let mut weights = [_mm512_setzero_ps(); 4];
        for (weights, x) in weights.iter_mut().zip(x.as_chunks().0) {
            *weights = load_f32(x);
        }
        put_block(proof, weights, false, out);
    }
}

/// What a weight can be rounded to.
pub trait Element: Copy + Default + Pod {
    /// 64 finite weights, rounded to nearest, ties to even. `is_normal`: each is a normal number or 0.
    fn put(proof: Avx512, weights: [__m512; 4], is_normal: bool, out: &mut [Self; GROUP]);

    /// The same of 16.
    fn put_16(proof: Avx512, weights: __m512, out: &mut [Self; 16]);
}

impl Element for f32 {
    #[inline(always)]
    fn put(proof: Avx512, weights: [__m512; 4], _: bool, out: &mut [Self; GROUP]) {
        for (weights, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
            Self::put_16(proof, weights, out);
        }
    }

    #[inline(always)]
    fn put_16(_: Avx512, weights: __m512, out: &mut [Self; 16]) {
        // SAFETY: the argument proves that the processor has the features.
        *out = unsafe { to_array(weights) };
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn put(proof: Avx512, weights: [__m512; 4], is_normal: bool, out: &mut [Self; GROUP]) {
        let halves = out.as_chunks_mut::<32>().0;
        for (weights, out) in weights.as_chunks::<2>().0.iter().zip(halves) {
            // SAFETY: the argument proves that the processor has the features.
            unsafe {
                let halves = match is_normal && proof.bf16 {
                    true => rounded(*weights),
                    false => upper_halves(*weights),
                };
                store(bytemuck::cast_mut(out), halves);
            }
        }
    }

    #[inline(always)]
    fn put_16(_: Avx512, weights: __m512, out: &mut [Self; 16]) {
        // SAFETY: the argument proves that the processor has the features.
        unsafe {
            let halves = _mm512_srli_epi32::<16>(rounded_up(weights));
            store_16(bytemuck::cast_mut(out), _mm512_cvtepi32_epi16(halves));
        }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn put(proof: Avx512, weights: [__m512; 4], _: bool, out: &mut [Self; GROUP]) {
        for (weights, out) in weights.into_iter().zip(out.as_chunks_mut().0) {
            Self::put_16(proof, weights, out);
        }
    }

    #[inline(always)]
    fn put_16(_: Avx512, weights: __m512, out: &mut [Self; 16]) {
        // SAFETY: the argument proves that the processor has the features.
        unsafe {
            let halves = _mm512_cvtps_ph::<NEAREST>(weights);
            store_16(bytemuck::cast_mut(out), halves);
        }
    }
}

/// To nearest, ties to even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

/// Finite numbers so that their upper halves are them, rounded to BF16.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded_up(weights: __m512) -> __m512i {
    let bits = _mm512_castps_si512(weights);
    let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let half_less = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
    _mm512_add_epi32(half_less, is_odd)
}

/// Normal numbers and zeros, rounded to BF16 by the instruction for it, which takes all others for 0.
///
/// Only for processors that have it, avx512bf16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn rounded([low, high]: [__m512; 2]) -> __m512i {
    let halves;
    // Not the intrinsic: it is only put in its place in functions that are compiled for nothing but such processors.
    // SAFETY: registers only; the caller has made sure that the processor has the instruction.
    unsafe {
        asm!(
            "vcvtne2ps2bf16 {halves}, {high}, {low}",
            halves = lateout(zmm_reg) halves,
            high = in(zmm_reg) high,
            low = in(zmm_reg) low,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    halves
}

/// Finite numbers, rounded to BF16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves(weights: [__m512; 2]) -> __m512i {
    let rounded = [rounded_up(weights[0]), rounded_up(weights[1])];
    let mut odd = [0u16; 32];
    for (i, word) in odd.iter_mut().enumerate() {
        *word = 2 * i as u16 + 1;
    }
    _mm512_permutex2var_epi16(rounded[0], load_u16(&odd), rounded[1])
}

/// [`half::bf16::from_f32`] of each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn to_bf16(x: &[f32], out: &mut [bf16]) {
    let (blocks, rest) = x.as_chunks::<16>();
    let (out_blocks, out_rest) = out.as_chunks_mut::<16>();
    for (x, out) in blocks.iter().zip(out_blocks) {
        let values = load_f32(x);
        let bits = _mm512_castps_si512(values);
        let rounded = rounded_up(values);
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
        let values = _mm512_cvtps_ph::<NEAREST>(load_f32(x));
        store_16(bytemuck::cast_mut(out), values);
    }
    for (out, x) in out_rest.iter_mut().zip(rest) {
        *out = f16::from_f32(*x);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store_16(out: &mut [u16; 16], values: __m256i) {
    // SAFETY: 16 values are 32 bytes; the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), values) };
}

//! AVX-512 with VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later).
//!
//! Weights become `level + 128` as unsigned bytes, activations are two planes of signed bytes
//! ([`Activations`]), and one `vpdpbusd` a plane multiplies 64 pairs. Sums of four or eight products are exact;
//! what the 128 adds is taken off again by the offsets that come with the activations.

mod bitmap;
mod decode;
mod grouped;
mod many;
mod quantize;
mod trellis;

use super::activations::{Activations, Block, Order};
use super::lanes::Lanes;
use super::views::{BitmapRows, GroupedRows, LevelsView, Rows, TrellisStrip};
use super::{attention, scalar};
use crate::prime_lut::PRIME_LUT;
use bitmap::{expand_bytes, expand_nibbles};
use half::{bf16, f16};
pub(crate) use many::Panel;
use std::arch::x86_64::*;
use trellis::{Decoder, TILE};

/// The first 256 primes as 16-bit numbers, a register of them in each row.
static PRIMES: Primes = Primes({
    let mut rows = [[0; 32]; 8];
    let mut i = 0;
    while i < 256 {
        rows[i / 32][i % 32] = PRIME_LUT[i] as u16;
        i += 1;
    }
    rows
});

#[repr(align(64))]
struct Primes([[u16; 32]; 8]);

/// Groups whose factors are computed at once.
const CHUNK: usize = 32;

/// A value is the proof that this machine has the instructions.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// `None` where the processor or the system lacks one of AVX-512 F, BW, VL, VBMI, VBMI2, VNNI.
    pub fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("popcnt");
        has.then_some(Self(()))
    }

    /// `out[i] = ` row `i` of `rows` times `x`, whose order is that of the codes.
    pub(crate) fn grouped(self, rows: GroupedRows<'_>, x: &Activations, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { grouped::grouped(rows, x, out) }
    }

    /// As the reference decodes rows, to the bit.
    pub(crate) fn decode(self, rows: Rows<'_>, cols: usize, out: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { decode::decode(rows, cols, out) }
    }

    /// [`bf16::from_f32`] of each, into as many.
    pub(crate) fn to_bf16(self, x: &[f32], out: &mut [bf16]) {
        // SAFETY: as above.
        unsafe { decode::to_bf16(x, out) }
    }

    /// [`f16::from_f32`] of each, into as many.
    pub(crate) fn to_f16(self, x: &[f32], out: &mut [f16]) {
        // SAFETY: as above.
        unsafe { decode::to_f16(x, out) }
    }

    /// As [`attention::attend`].
    pub(crate) fn attend(self, task: attention::Task<'_>) {
        #[target_feature(enable = "avx512f")]
        fn compiled(proof: Avx512, task: attention::Task<'_>) {
            attention::attend::<Register, 8>(proof, task);
        }
        // SAFETY: `self` proves that the processor has the features.
        unsafe { compiled(self, task) }
    }

    /// As [`super::activations::quantize`].
    pub(crate) fn quantize(self, x: &[f32], order: Order, out: &mut Activations) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { quantize::quantize(x, order, out) }
    }

    /// As [`scalar::flip`].
    pub(crate) fn flip(self, x: &mut [f32], signs: &[u8]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { flip(x, signs) }
    }

    /// As [`scalar::hadamard`] from span 1 on.
    pub(crate) fn hadamard(self, x: &mut [f32]) {
        // SAFETY: `self` proves that the processor has the features.
        unsafe { hadamard(x) }
    }

    /// As [`Avx512::grouped`], in natural order.
    pub(crate) fn bitmap(self, rows: BitmapRows<'_>, x: &Activations, out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { bitmap::bitmap(rows, x, out) }
    }

    /// `out [n, rows]`: up to 64 rows times every vector, all of them in natural order.
    pub(crate) fn multiply_many(
        self,
        rows: Rows<'_>,
        vectors: &[Activations],
        panel: &mut Panel,
        out: &mut [f32],
    ) {
        // SAFETY: as above.
        unsafe { many::multiply(rows, vectors, panel, out) }
    }

    /// The (up to 64) rows of a strip times `x`, in natural order.
    pub(crate) fn trellis(self, strip: TrellisStrip<'_>, x: &Activations, out: &mut [f32]) {
        let is_wide = strip.level_table.len() > 128;
        // SAFETY: as above.
        unsafe {
            match (strip.k, is_wide) {
                (2, false) => trellis::trellis::<2, false>(strip, x, out),
                (2, true) => trellis::trellis::<2, true>(strip, x, out),
                (3, false) => trellis::trellis::<3, false>(strip, x, out),
                (3, true) => trellis::trellis::<3, true>(strip, x, out),
                (_, false) => trellis::trellis::<4, false>(strip, x, out),
                (_, true) => trellis::trellis::<4, true>(strip, x, out),
            }
        }
    }
}

/// Sixteen f32. A value is the proof that this machine has the instructions.
#[derive(Clone, Copy)]
struct Register(__m512);

// These are always put in their place, in a function that is compiled for the instructions.
impl Lanes for Register {
    type Proof = Avx512;

    #[inline(always)]
    fn splat(_: Avx512, value: f32) -> Self {
        // SAFETY: the argument proves that the processor has the features, also below.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(_: Avx512, values: &[f32; 16]) -> Self {
        // SAFETY: as above.
        Self(unsafe { load_f32(values) })
    }

    #[inline(always)]
    fn widen(_: Avx512, values: &[f16; 16]) -> Self {
        // SAFETY: as above; the reference is to 32 readable bytes, and the load needs no alignment.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) })
    }

    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: `self` proves that the processor has the features.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn store(self, out: &mut [f32; 16]) {
        // SAFETY: as above; 16 floats are 64 bytes, and the store needs no alignment.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) }
    }
}

#[target_feature(enable = "avx512f")]
fn flip(x: &mut [f32], signs: &[u8]) {
    let (blocks, rest) = x.as_chunks_mut::<16>();
    let (pairs, _) = signs.as_chunks::<2>();
    for (block, signs) in blocks.iter_mut().zip(pairs) {
        let bits = _mm512_castps_si512(load_f32(block));
        let sign = _mm512_maskz_set1_epi32(u16::from_le_bytes(*signs), i32::MIN);
        *block = to_array(_mm512_castsi512_ps(_mm512_xor_si512(bits, sign)));
    }
    scalar::flip(rest, &signs[2 * blocks.len()..]);
}

/// The unscaled Walsh-Hadamard transform, with the additions of the reference in its order.
#[target_feature(enable = "avx512f")]
fn hadamard(x: &mut [f32]) {
    let (blocks, rest) = x.as_chunks_mut::<16>();
    if blocks.is_empty() {
        return scalar::hadamard(rest, 1);
    }
    for block in blocks {
        let mut v = load_f32(block);
        // Lanes whose bit is set are the second of their pair: they become first - second.
        let pairs =
            |v, other, second| _mm512_mask_sub_ps(_mm512_add_ps(v, other), second, other, v);
        v = pairs(v, _mm512_permute_ps::<0b10_11_00_01>(v), 0xAAAA);
        v = pairs(v, _mm512_permute_ps::<0b01_00_11_10>(v), 0xCCCC);
        v = pairs(v, _mm512_shuffle_f32x4::<0b10_11_00_01>(v, v), 0xF0F0);
        v = pairs(v, _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v), 0xFF00);
        *block = to_array(v);
    }
    scalar::hadamard(x, 16);
}

/// All 64 bytes.
#[target_feature(enable = "avx512f")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the reference is to 64 readable bytes; the load needs no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn load_i8(bytes: &[i8; 64]) -> __m512i {
    load(bytemuck::cast_ref(bytes))
}

#[target_feature(enable = "avx512f")]
fn load_i32(values: &[i32; 16]) -> __m512i {
    load(bytemuck::cast_ref(values))
}

#[target_feature(enable = "avx512f")]
fn load_u16(values: &[u16; 32]) -> __m512i {
    load(bytemuck::cast_ref(values))
}

#[target_feature(enable = "avx512f")]
fn load_f32(values: &[f32; 16]) -> __m512 {
    _mm512_castsi512_ps(load(bytemuck::cast_ref(values)))
}

#[target_feature(enable = "avx512f")]
fn store(out: &mut [i32; 16], values: __m512i) {
    // SAFETY: 16 values are 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), values) };
}

#[target_feature(enable = "avx512f")]
fn to_bytes(values: __m512i) -> [u8; 64] {
    let mut out = [0i32; 16];
    store(&mut out, values);
    bytemuck::cast(out)
}

/// Up to 64 bytes, zeros after them.
#[target_feature(enable = "avx512f,avx512bw")]
fn load_some(bytes: &[u8]) -> __m512i {
    let n = bytes.len().min(64);
    let mask = if n == 64 { u64::MAX } else { (1 << n) - 1 };
    // SAFETY: a masked load touches only the bytes whose bit is set, which are those of the slice.
    unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
}

/// 64 bytes at `at`; fewer, with zeros after them, where the slice ends.
#[target_feature(enable = "avx512f,avx512bw")]
fn load_at(bytes: &[u8], at: usize) -> __m512i {
    match bytes.get(at..).and_then(<[u8]>::first_chunk) {
        Some(bytes) => load(bytes),
        None => load_some(bytes.get(at..).unwrap_or_default()),
    }
}

/// 32 bytes at `at`; fewer, with zeros after them, where the slice ends.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn load_half_at(bytes: &[u8], at: usize) -> __m256i {
    match bytes.get(at..).and_then(<[u8]>::first_chunk::<32>) {
        // SAFETY: the reference is to 32 readable bytes; the load needs no alignment.
        Some(bytes) => unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) },
        None => _mm512_castsi512_si256(load_some(bytes.get(at..).unwrap_or_default())),
    }
}

/// Asks for the cache line `at` bytes after the start of `bytes`, which may lie past its end.
#[target_feature(enable = "avx512f")]
fn prefetch(bytes: &[u8], at: usize) {
    // A prefetch reads nothing that a program could see and never faults.
    _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(at).cast());
}

/// Levels as unsigned bytes, `level + 128`.
#[target_feature(enable = "avx512f")]
fn biased(levels: __m512i) -> __m512i {
    _mm512_xor_si512(levels, _mm512_set1_epi8(-128))
}

/// A codebook of 16 biased levels in each quarter of a register.
#[target_feature(enable = "avx512f,avx512vl")]
fn codebook_register(codebook: &[i8; 16]) -> __m512i {
    let quarter = u128::from_le_bytes(bytemuck::cast(*codebook));
    let bytes: [u8; 64] = bytemuck::cast([quarter; 4]);
    biased(load(&bytes))
}

/// Sums of four products a lane, `sum(level * x)`, for 64 levels in each of `N` rows. Exact.
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot<const N: usize>(biased_levels: [__m512i; N], x: &Block) -> [__m512i; N] {
    let (x_high, x_low) = (load_i8(&x.high), load_i8(&x.low));
    let offset = load_i32(&x.offset);
    let mut products = [offset; N];
    // Loops, here and below: the compiler does not always put the body of a closure that it hands to
    // `map` or `from_fn` in its place, because those are compiled for any processor.
    for i in 0..N {
        let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), biased_levels[i], x_high);
        let low = _mm512_dpbusd_epi32(offset, biased_levels[i], x_low);
        products[i] = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
    }
    products
}

/// [`dot`] of levels.
#[target_feature(enable = "avx512f,avx512vnni")]
fn dot_bytes<const N: usize>(mut levels: [__m512i; N], x: &Block) -> [__m512i; N] {
    for levels in &mut levels {
        *levels = biased(*levels);
    }
    dot(levels, x)
}

/// [`dot`] of 128 codes, those in the low halves with the first block and those in the high halves with
/// the second. Eight products a lane: at most 8 * 128 * 8,127, which is below 2^23.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn dot_nibbles<const N: usize>(
    codes: [__m512i; N],
    table: __m512i,
    x: [&Block; 2],
) -> [__m512i; N] {
    let x_high = [load_i8(&x[0].high), load_i8(&x[1].high)];
    let x_low = [load_i8(&x[0].low), load_i8(&x[1].low)];
    let offset = _mm512_add_epi32(load_i32(&x[0].offset), load_i32(&x[1].offset));
    let low_half = _mm512_set1_epi8(15);
    let mut products = [offset; N];
    for i in 0..N {
        let first = _mm512_shuffle_epi8(table, _mm512_and_si512(codes[i], low_half));
        let second = _mm512_and_si512(_mm512_srli_epi16::<4>(codes[i]), low_half);
        let second = _mm512_shuffle_epi8(table, second);
        let high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, x_high[0]);
        let high = _mm512_dpbusd_epi32(high, second, x_high[1]);
        let low = _mm512_dpbusd_epi32(offset, first, x_low[0]);
        let low = _mm512_dpbusd_epi32(low, second, x_low[1]);
        products[i] = _mm512_add_epi32(_mm512_slli_epi32::<7>(high), low);
    }
    products
}

/// The primes of the first 32 indices, as 16-bit numbers; that of index 0 where there are fewer.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn primes_of(indices: &[u8]) -> __m512i {
    let indices = _mm512_cvtepu8_epi16(load_half_at(indices, 0));
    // Four tables of 64 entries each; bits 6 and 7 of an index say which.
    let bit6 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(64));
    let bit7 = _mm512_test_epi16_mask(indices, _mm512_set1_epi16(128));
    let mut halves = [indices; 2];
    for (half, rows) in halves.iter_mut().zip(PRIMES.0.as_chunks::<4>().0) {
        let [a, b, c, d] = rows;
        let first = _mm512_permutex2var_epi16(load_u16(a), indices, load_u16(b));
        let second = _mm512_permutex2var_epi16(load_u16(c), indices, load_u16(d));
        *half = _mm512_mask_blend_epi16(bit6, first, second);
    }
    _mm512_mask_blend_epi16(bit7, halves[0], halves[1])
}

/// What the sums of each of 32 groups are multiplied with: prime times scale of the activations.
/// The four entries more are there for loads of four at any of them.
type Factors = [f32; CHUNK + 4];

/// Factors of 32 groups from number `first` on, whose indices come first; those past the last column are 0.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn factors(indices: &[u8], first: usize, group: usize, scales: &[f32], out: &mut Factors) {
    let primes = primes_of(indices);
    let low = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(primes)));
    let high = _mm512_extracti64x4_epi64::<1>(primes);
    let high = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(high));
    let scales = match group {
        64 => [scales_at(scales, first), scales_at(scales, first + 16)],
        _ => {
            // Two groups of 32 share a scale.
            let pairs = scales_at(scales, first / 2);
            let half = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
            let other = _mm512_add_epi32(half, _mm512_set1_epi32(8));
            [
                _mm512_permutexvar_ps(half, pairs),
                _mm512_permutexvar_ps(other, pairs),
            ]
        }
    };
    out[..16].copy_from_slice(&to_array(_mm512_mul_ps(low, scales[0])));
    out[16..32].copy_from_slice(&to_array(_mm512_mul_ps(high, scales[1])));
}

/// 16 scales; zeros where there are none.
#[target_feature(enable = "avx512f")]
fn scales_at(scales: &[f32], at: usize) -> __m512 {
    match scales.get(at..).and_then(<[f32]>::first_chunk) {
        Some(scales) => load_f32(scales),
        None => _mm512_setzero_ps(),
    }
}

#[target_feature(enable = "avx512f")]
fn to_array(values: __m512) -> [f32; 16] {
    let mut out = [0.0; 16];
    // SAFETY: 16 floats are 64 bytes; the store needs no alignment.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
    out
}

/// The factor of each lane, four entries from `at` on spread as `spread` says.
#[target_feature(enable = "avx512f")]
fn spread(factors: &Factors, at: usize, spread: __m512i) -> __m512 {
    let four: &[f32] = &factors[at..at + 4];
    // SAFETY: the slice has four floats; the load needs no alignment.
    let four = unsafe { _mm_loadu_ps(four.as_ptr()) };
    _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(four))
}

//! `q8` and `q4` rows times a vector.

use super::*;

/// Bytes of codes that are asked for ahead of their use, or those of a few rows if these are longer.
const AHEAD: usize = 4096;

/// Rows that are multiplied together, so that each part of the activations is loaded once for all.
const TOGETHER: usize = 4;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn grouped(rows: GroupedRows<'_>, x: &Activations, out: &mut [f32]) {
    match rows.levels {
        LevelsView::Bytes => grouped_levels::<false>(rows, &[0; 16], x, out),
        LevelsView::Nibbles(codebook) => grouped_levels::<true>(rows, codebook, x, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn grouped_levels<const NIBBLES: bool>(
    rows: GroupedRows<'_>,
    codebook: &[i8; 16],
    x: &Activations,
    out: &mut [f32],
) {
    let table = codebook_register(codebook);
    let (together, rest) = out.as_chunks_mut::<TOGETHER>();
    let done = together.len() * TOGETHER;
    for (i, out) in together.iter_mut().enumerate() {
        grouped_rows::<NIBBLES, TOGETHER>(&rows, i * TOGETHER, table, x, out);
    }
    for (i, out) in rest.iter_mut().enumerate() {
        grouped_rows::<NIBBLES, 1>(&rows, done + i, table, x, std::array::from_mut(out));
    }
}

/// `N` rows from `first` on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
fn grouped_rows<const NIBBLES: bool, const N: usize>(
    rows: &GroupedRows<'_>,
    first: usize,
    table: __m512i,
    x: &Activations,
    out: &mut [f32; N],
) {
    let &GroupedRows {
        row_bytes,
        groups,
        group,
        ..
    } = rows;
    // To the end of the matrix, not of the row: whole loads, of which the zeros that pad the activations
    // leave nothing.
    let mut codes = [&[][..]; N];
    let mut primes = [&[][..]; N];
    for i in 0..N {
        codes[i] = &rows.codes[(first + i) * row_bytes..];
        primes[i] = &rows.prime_indices[(first + i) * groups..];
    }
    let columns = if NIBBLES { 128 } else { 64 };
    let per_register = columns / group;
    // The group of each lane, counted from the first of its register.
    let lanes: [i32; 16] = std::array::from_fn(|lane| (lane * per_register / 16) as i32);
    let lanes = load_i32(&lanes);
    let mut values = [[0.0; CHUNK + 4]; N];
    let mut sums = [_mm512_setzero_ps(); N];
    let mut register = 0;
    let ahead = N * AHEAD.div_ceil(N * row_bytes);
    for chunk in (0..groups).step_by(CHUNK) {
        let end = groups.min(chunk + CHUNK);
        for (primes, values) in primes.iter().zip(&mut values) {
            prefetch(primes, chunk + ahead * groups);
            factors(&primes[chunk..], chunk, group, &x.scales, values);
        }
        for at in (0..end - chunk).step_by(per_register) {
            let mut bytes = [_mm512_setzero_si512(); N];
            for i in 0..N {
                bytes[i] = load_at(codes[i], 64 * register);
            }
            let products = if NIBBLES {
                let x = [&x.blocks[2 * register], &x.blocks[2 * register + 1]];
                dot_nibbles(bytes, table, x)
            } else {
                dot_bytes(bytes, &x.blocks[register])
            };
            for i in 0..N {
                prefetch(codes[i], 64 * register + ahead * row_bytes);
                let factor = spread(&values[i], at, lanes);
                sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), factor, sums[i]);
            }
            register += 1;
        }
    }
    for i in 0..N {
        out[i] = rows.scales[first + i] * _mm512_reduce_add_ps(sums[i]);
    }
}

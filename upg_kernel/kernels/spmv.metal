// Matrix times vector, straight from the arrays of a UPG file (upg_format_v2.md), for Apple GPUs.
//
// All kernels compute y = W x for `vectors` inputs: x [vectors, cols] of float or half, y [vectors, rows] of the same
// type, sums in float. Vector v of x starts at x + v * x_stride, of y at y + v * y_stride. Names end in the type of x
// (`_f32`, `_f16`); those with `_batch` take BATCH vectors in a threadgroup and decode a weight once for all of them.
//
// What the host keeps (src/metal_kernels/plan.rs)
//   - The matrix was checked when it was made: columns, pointers and prime indices are inside of their arrays. Another
//     process may have changed the mapped file since: results mean nothing then.
//   - Arrays of bytes that are read as words start at multiples of 16, as do strips in them.
//   - Threadgroups have whole SIMD-groups, of 32 threads.
// What a kernel keeps
//   - It reads no byte outside of its arrays: not for the last row, not for the last column, not for the last entry, and
//     whatever the arrays say. Each index that is made of their content is bounded where it is used.
//     Vectors of x need no padding and no alignment beyond that of an element.
//   - It writes the rows there are, and only those.
//   - All threads of a SIMD-group reach its simd_* functions together, all of a threadgroup its barriers.
//   - Sums are taken without the scale of the row, which comes last: scale * (prime * sum). Nothing depends on
//     infinities, on NaN, on the sign of zero or on the order of a sum, so that fast math may be on or off.
//
// mdcsr: rows of entries (delta, value, prime index), those of value 0 being padding, which is not multiplied
//   mdcsr_row         a thread a row, as one would write it down. The threads of a SIMD-group read memory at 32 places.
//   mdcsr_row_shared  the same with x in threadgroup memory, a window of columns at a time: columns ascend, so that a
//                     row is done with a window when its next column is behind it. All threads take part in loading,
//                     those without a row too.
//   mdcsr_row_batch   a thread a row, for BATCH vectors.
//   mdcsr_simd        a SIMD-group a row: 128 entries at a time, four a thread, whose deltas are summed up with a
//                     prefix sum. Blocks of four start at a multiple of four before the row, so that they are loaded as
//                     words; entries of the row before and after count as deltas of 0 with a value of 0. Only the last
//                     block of the matrix may end outside of the arrays, and is loaded one by one.
//
// Strips: q8 q4 s8 s4 t2 t3 t4
//   A threadgroup multiplies a strip of 64 rows, its SIMD-groups share the columns. Weights lie tile by tile: 4 columns,
//   in which 64 rows follow each other with their 4 weights. Thread `lane` of a SIMD-group has the 8 rows of octet
//   lane % 8 in tile lane / 8 of four tiles, so that a load of the SIMD-group is one run of memory, and a thread needs 4
//   elements of x for 32 weights. It has 8 sums (for each vector), and nothing is exchanged until the end:
//   then the four threads of an octet add up theirs with shuffles, and the SIMD-groups in threadgroup memory, in the order
//   of their numbers. The result does not depend on which SIMD-group is the first to arrive.
//
//   q8 q4  A SIMD-group takes a group of columns, multiplies, then multiplies the 8 sums by the 8 primes.
//          Columns are padded to whole groups: the codes are there, x is 0.
//          Of q4 two tiles share their bytes, so it takes pairs of tiles.
//   s8 s4  Codes are there for set bits only, so a SIMD-group has to know how many came before. Each takes a run of groups;
//          first all count the bits of their run (1/8 of a byte a weight is read twice), then each adds up those before.
//          A thread has 32 bits, 8 rows of a tile; a prefix sum over the threads says where its codes start.
//          Of s4 the 64 bits of two threads share a run of whole bytes: the second starts at a half byte.
//   t2-t4  A thread reads 32 states of 13 bits from k words and the next one; the 16 bytes behind every strip are for it.
//          The level is that of upg_format_v2.md, looked up by its point on the ring. Tiles behind the last one are taken
//          to be the last one, with an x of 0.
//          x is the rotated input, which rotate_* has put into a buffer of floats.
//
//   Threadgroup memory is one piece: tables, the sums of the SIMD-groups, and for s a count of each. (Of pieces with numbers of
//   their own, those that the kernel before has used would stay in an encoder, and may count.)
//   Tables are of halves: 16 levels, 128 (t2, t3) or 256 (t4) levels, 256 primes. All are integers
//   of magnitudes below 2048, which halves hold exactly. Shuffles would not do: with an index of its own for each thread they
//   take about 30 cycles (docs/notes/gpu.md).
//
// Rotation of the input of t: a pass over `size` columns, signs and then a Hadamard transform
//   rotate_block_*  a threadgroup transforms a block of up to 4096 columns in threadgroup memory: a thread takes 16
//                   elements at a distance of 1, then of 16, then of 256, with barriers between.
//   rotate_across   the rest of a longer transform: a thread takes 2 to 16 elements at a distance of 4096 or more.
//   Additions are those of the format, span 1 first: the result is that of the CPU to the bit, if the compiler keeps them.

#include "spmv_args.h"
#include <metal_stdlib>

using namespace metal;

#define instantiate_kernel(name, ...) \
    template [[host_name(name)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;

// Vectors of a kernel with `_batch`.
constant constexpr int BATCH = 4;

// ---- Elements of x

template <typename T> struct Packed;
template <> struct Packed<float> { typedef packed_float4 four; };
template <> struct Packed<half> { typedef packed_half4 four; };

// Columns `col` to `col + 3`; 0 where there are none.
template <typename T>
float4 four_of(device const T *x, uint col, uint cols) {
    if (col + 4 <= cols) {
        const typename Packed<T>::four x4 = *(device const typename Packed<T>::four *)(x + col);
        return float4(x4[0], x4[1], x4[2], x4[3]);
    }
    float4 x4 = float4(0.0f);
#pragma unroll
    for (uint i = 0; i < 4; i++) {
        if (col + i < cols) {
            x4[i] = float(x[col + i]);
        }
    }
    return x4;
}

// The same of N vectors; 0 for those that are not there.
template <int N, typename T>
void fours_of(device const T *x, uint first, uint col, constant UpgStripArgs &args, thread float4 (&fours)[N]) {
#pragma unroll
    for (int v = 0; v < N; v++) {
        const uint vector = first + v;
        fours[v] = vector < args.vectors ? four_of(x + ulong(vector) * args.x_stride, col, args.cols) : float4(0.0f);
    }
}

// ---- mdcsr

constant constexpr uint SPARSE_PRIMES = 10000; // that an index of mdcsr can name

// prime * value: an integer below 2^24, exact in a float.
float weight(device const uint *primes, ushort prime_index, char value) {
    return float(int(primes[min(uint(prime_index), SPARSE_PRIMES - 1)]) * int(value));
}

template <typename T, int N>
[[kernel]] void mdcsr_row(
    constant UpgSparseArgs &args [[buffer(0)]],
    device const char *values [[buffer(1)]],
    device const uchar *deltas [[buffer(2)]],
    device const uint *row_pointers [[buffer(3)]],
    device const ushort *prime_indices [[buffer(4)]],
    device const float *scales [[buffer(5)]],
    device const uint *primes [[buffer(6)]],
    device const T *x [[buffer(7)]],
    device T *y [[buffer(8)]],
    uint2 at [[thread_position_in_grid]]) {
    const uint row = at.x;
    if (row >= args.rows) {
        return;
    }
    const uint first = at.y * N;
    // Vectors that are not there are computed as the last one is, and not written.
    device const T *vectors[N];
    float sums[N];
#pragma unroll
    for (int v = 0; v < N; v++) {
        vectors[v] = x + ulong(min(first + v, args.vectors - 1)) * args.x_stride;
        sums[v] = 0.0f;
    }
    const uint end = min(row_pointers[row + 1], args.entries);
    uint column = 0;
    for (uint k = row_pointers[row]; k < end; k++) {
        column += deltas[k];
        if (values[k] == 0) {
            continue;
        }
        const float w = weight(primes, prime_indices[k], values[k]);
        const uint within = min(column, args.cols - 1);
#pragma unroll
        for (int v = 0; v < N; v++) {
            sums[v] += w * float(vectors[v][within]);
        }
    }
#pragma unroll
    for (int v = 0; v < N; v++) {
        if (first + v < args.vectors) {
            y[ulong(first + v) * args.y_stride + row] = T(scales[row] * sums[v]);
        }
    }
}

instantiate_kernel("mdcsr_row_f32", mdcsr_row<float, 1>)
instantiate_kernel("mdcsr_row_f16", mdcsr_row<half, 1>)
instantiate_kernel("mdcsr_row_batch_f32", mdcsr_row<float, BATCH>)
instantiate_kernel("mdcsr_row_batch_f16", mdcsr_row<half, BATCH>)

template <typename T>
[[kernel]] void mdcsr_row_shared(
    constant UpgSparseArgs &args [[buffer(0)]],
    device const char *values [[buffer(1)]],
    device const uchar *deltas [[buffer(2)]],
    device const uint *row_pointers [[buffer(3)]],
    device const ushort *prime_indices [[buffer(4)]],
    device const float *scales [[buffer(5)]],
    device const uint *primes [[buffer(6)]],
    device const T *x [[buffer(7)]],
    device T *y [[buffer(8)]],
    threadgroup float *shared [[threadgroup(0)]],
    uint2 at [[thread_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint2 threads [[threads_per_threadgroup]]) {
    const uint row = at.x;
    x += ulong(at.y) * args.x_stride;
    uint k = row < args.rows ? row_pointers[row] : 0;
    const uint end = row < args.rows ? min(row_pointers[row + 1], args.entries) : 0;
    uint column = k < end ? uint(deltas[k]) : 0;
    float sum = 0.0f;
    for (uint start = 0; start < args.cols; start += args.window) {
        const uint width = min(args.window, args.cols - start);
        // Nobody may still read the window before.
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = tid; i < width; i += threads.x) {
            shared[i] = float(x[start + i]);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        while (k < end && column < start + width) {
            if (values[k] != 0) {
                sum += weight(primes, prime_indices[k], values[k]) * shared[column - start];
            }
            k++;
            column += k < end ? uint(deltas[k]) : 0;
        }
    }
    if (row < args.rows) {
        y[ulong(at.y) * args.y_stride + row] = T(scales[row] * sum);
    }
}

instantiate_kernel("mdcsr_row_shared_f32", mdcsr_row_shared<float>)
instantiate_kernel("mdcsr_row_shared_f16", mdcsr_row_shared<half>)

template <typename T>
[[kernel]] void mdcsr_simd(
    constant UpgSparseArgs &args [[buffer(0)]],
    device const char *values [[buffer(1)]],
    device const uchar *deltas [[buffer(2)]],
    device const uint *row_pointers [[buffer(3)]],
    device const ushort *prime_indices [[buffer(4)]],
    device const float *scales [[buffer(5)]],
    device const uint *primes [[buffer(6)]],
    device const T *x [[buffer(7)]],
    device T *y [[buffer(8)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]]) {
    const uint row = group.x * simds + simd;
    // The same for all threads of a SIMD-group.
    if (row >= args.rows) {
        return;
    }
    x += ulong(group.y) * args.x_stride;
    const uint start = row_pointers[row], end = min(row_pointers[row + 1], args.entries);
    uint before = 0; // the column of the last entry of the blocks so far
    float sum = 0.0f;
    // In steps that never go past the end, which may be near 2^32.
    for (uint block = start / 4 * 4; block < end; block += min(128u, end - block)) {
        const uint first = block + 4 * lane;
        uchar4 delta = uchar4(0);
        char4 value = char4(0);
        ushort4 prime = ushort4(0);
        if (4 * lane < end - block) {
            if (args.entries - first >= 4) {
                delta = *(device const uchar4 *)(deltas + first);
                value = *(device const char4 *)(values + first);
                prime = *(device const ushort4 *)(prime_indices + first);
            } else {
#pragma unroll
                for (uint i = 0; i < 3; i++) {
                    if (i < args.entries - first) {
                        delta[i] = deltas[first + i];
                        value[i] = values[first + i];
                        prime[i] = prime_indices[first + i];
                    }
                }
            }
        }
        uint columns[4];
        uint run = 0;
#pragma unroll
        for (uint i = 0; i < 4; i++) {
            const bool mine = first + i >= start && first + i < end;
            value[i] = mine ? value[i] : char(0);
            run += mine ? uint(delta[i]) : 0;
            columns[i] = run;
        }
        const uint base = before + simd_prefix_exclusive_sum(run);
        before += simd_sum(run);
        // All loads first, without a branch: of entries that are not of this row, whose column may be none of x, that of
        // column 0. The product is not taken then: x may be infinite there.
#pragma unroll
        for (uint i = 0; i < 4; i++) {
            const bool is_stored = value[i] != 0;
            const float element = float(x[is_stored ? min(base + columns[i], args.cols - 1) : 0]);
            sum += is_stored ? weight(primes, prime[i], value[i]) * element : 0.0f;
        }
    }
    sum = simd_sum(sum);
    if (lane == 0) {
        y[ulong(group.y) * args.y_stride + row] = T(scales[row] * sum);
    }
}

instantiate_kernel("mdcsr_simd_f32", mdcsr_simd<float>)
instantiate_kernel("mdcsr_simd_f16", mdcsr_simd<half>)

// ---- Strips

constant constexpr uint STRIP_ROWS = 64;
constant constexpr uint TILE_BYTES = 256; // of int8 levels
constant constexpr uint PRIMES = 256;     // that 8 bits can name
constant constexpr uint STEP_TILES = 4;   // tiles, or pairs of them, that a SIMD-group takes at once
constant constexpr int OCTET = 8;         // rows of a thread

// Where a thread is.
struct Place {
    uint strip;
    uint first;  // the first of its vectors
    uint tid;    // in the threadgroup
    uint octet;  // which 8 rows of a strip
    uint slot;   // which of four tiles
    uint simd;   // its SIMD-group,
    uint simds;  // one of so many

    Place(uint2 group, uint tid, uint lane, uint simd, uint simds, uint batch)
        : strip(group.x), first(group.y * batch), tid(tid), octet(lane % 8), slot(lane / 8), simd(simd), simds(simds) {}

    uint threads() const { return 32 * simds; }
};

template <int N>
void clear(thread float (&sums)[OCTET][N]) {
#pragma unroll
    for (int row = 0; row < OCTET; row++) {
#pragma unroll
        for (int v = 0; v < N; v++) {
            sums[row][v] = 0.0f;
        }
    }
}

// Adds what four weights of a row come to.
template <int N>
void multiply(float4 weights, thread const float4 (&x)[N], thread float (&sums)[N]) {
#pragma unroll
    for (int v = 0; v < N; v++) {
        sums[v] += dot(weights, x[v]);
    }
}

// Adds the sums of a group of columns, times its primes: `indices` are those of the 64 rows.
template <int N>
void add_group(
    device const uchar *indices, threadgroup const half *primes, Place place, thread const float (&group)[OCTET][N],
    thread float (&sums)[OCTET][N]) {
    const uint2 eight = *(device const uint2 *)(indices + place.octet * 8);
    const uchar4 low = as_type<uchar4>(eight.x), high = as_type<uchar4>(eight.y);
#pragma unroll
    for (int row = 0; row < OCTET; row++) {
        const float prime = float(primes[row < 4 ? low[row % 4] : high[row % 4]]);
#pragma unroll
        for (int v = 0; v < N; v++) {
            sums[row][v] += prime * group[row][v];
        }
    }
}

// Adds up the sums of all threads, and writes the rows. `row_primes` are the prime indices of t, else null.
// `partial` has STRIP_ROWS * N floats for each SIMD-group.
template <typename T, int N>
void finish(
    thread const float (&sums)[OCTET][N], Place place, constant UpgStripArgs &args, device const float *scales,
    device const uchar *row_primes, device const uint *primes, threadgroup float *partial, device T *y) {
#pragma unroll
    for (int row = 0; row < OCTET; row++) {
#pragma unroll
        for (int v = 0; v < N; v++) {
            float sum = sums[row][v];
            sum += simd_shuffle_xor(sum, ushort(8));
            sum += simd_shuffle_xor(sum, ushort(16));
            if (place.slot == 0) {
                partial[(place.simd * N + v) * STRIP_ROWS + place.octet * 8 + row] = sum;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = place.tid; i < STRIP_ROWS * N; i += place.threads()) {
        const uint row = place.strip * STRIP_ROWS + i % STRIP_ROWS;
        const uint vector = place.first + i / STRIP_ROWS;
        if (row < args.rows && vector < args.vectors) {
            float sum = 0.0f;
            for (uint simd = 0; simd < place.simds; simd++) {
                sum += partial[simd * N * STRIP_ROWS + i];
            }
            if (row_primes) {
                sum *= float(primes[row_primes[row]]);
            }
            y[ulong(vector) * args.y_stride + row] = T(scales[row] * sum);
        }
    }
}

// Of q4 and s4: 16 levels, then 256 primes; of q8 and s8 the primes only.
constexpr uint table_size(bool nibbles) { return nibbles ? 16 + PRIMES : PRIMES; }

// What is behind a table of `size` halves, a multiple of 8.
threadgroup float *behind(threadgroup half *table, uint size) { return (threadgroup float *)(table + size); }

void fill_tables(threadgroup half *table, device const char *codebook, device const uint *primes, Place place) {
    if (codebook) {
        for (uint i = place.tid; i < 16; i += place.threads()) {
            table[i] = half(codebook[i]);
        }
        table += 16;
    }
    for (uint i = place.tid; i < PRIMES; i += place.threads()) {
        table[i] = half(primes[i]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ---- q8 and q4

// The levels of the low (`from` 0) or high (4) halves of four bytes.
float4 levels_of(uint codes, int from, threadgroup const half *levels) {
    return float4(
        levels[codes >> from & 15], levels[codes >> (from + 8) & 15], levels[codes >> (from + 16) & 15],
        levels[codes >> (from + 24) & 15]);
}

template <bool NIBBLES, typename T, int N>
[[kernel]] void grouped(
    constant UpgStripArgs &args [[buffer(0)]],
    device const uchar *codes [[buffer(1)]],
    device const uchar *prime_indices [[buffer(2)]],
    device const float *scales [[buffer(3)]],
    device const char *codebook [[buffer(4)]], // of q4
    device const uint *primes [[buffer(5)]],
    device const T *x [[buffer(6)]],
    device T *y [[buffer(7)]],
    threadgroup half *table [[threadgroup(0)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]]) {
    const Place place(group, tid, lane, simd, simds, N);
    fill_tables(table, NIBBLES ? codebook : nullptr, primes, place);
    threadgroup float *partial = behind(table, table_size(NIBBLES));
    threadgroup const half *levels = table;
    threadgroup const half *prime_table = table + (NIBBLES ? 16 : 0);

    codes += ulong(place.strip) * args.strip_bytes;
    prime_indices += ulong(place.strip) * args.groups * STRIP_ROWS;
    // Columns of 256 bytes.
    constexpr uint width = NIBBLES ? 8 : 4;
    const uint steps = args.group / (width * STEP_TILES);

    float sums[OCTET][N];
    clear(sums);
    for (uint g = place.simd; g < args.groups; g += place.simds) {
        float of_group[OCTET][N];
        clear(of_group);
        for (uint step = 0; step < steps; step++) {
            const uint tile = (g * steps + step) * STEP_TILES + place.slot;
            device const uint4 *bytes = (device const uint4 *)(codes + tile * TILE_BYTES + place.octet * 32);
            const uint4 words[2] = {bytes[0], bytes[1]};
            // One tile after the other, so that the elements of x of one are held at a time.
#pragma unroll
            for (int half_tile = 0; half_tile < (NIBBLES ? 2 : 1); half_tile++) {
                float4 fours[N];
                fours_of(x, place.first, tile * width + 4 * half_tile, args, fours);
#pragma unroll
                for (int row = 0; row < OCTET; row++) {
                    const uint word = words[row / 4][row % 4];
                    const float4 weights =
                        NIBBLES ? levels_of(word, 4 * half_tile, levels) : float4(as_type<char4>(word));
                    multiply(weights, fours, of_group[row]);
                }
            }
        }
        add_group(prime_indices + g * STRIP_ROWS, prime_table, place, of_group, sums);
    }
    finish(sums, place, args, scales, nullptr, primes, partial, y);
}

instantiate_kernel("q8_f32", grouped<false, float, 1>)
instantiate_kernel("q8_f16", grouped<false, half, 1>)
instantiate_kernel("q8_batch_f32", grouped<false, float, BATCH>)
instantiate_kernel("q8_batch_f16", grouped<false, half, BATCH>)
instantiate_kernel("q4_f32", grouped<true, float, 1>)
instantiate_kernel("q4_f16", grouped<true, half, 1>)
instantiate_kernel("q4_batch_f32", grouped<true, float, BATCH>)
instantiate_kernel("q4_batch_f16", grouped<true, half, BATCH>)

// ---- s8 and s4

constant constexpr uint BITMAP_GROUP = 64;
constant constexpr uint BITMAP_STEPS = BITMAP_GROUP / (4 * STEP_TILES);

// Bytes of codes of the 64 bits that this thread and its neighbour have, of which it has `kept`, and where those of this
// thread start in them, in codes.
template <bool NIBBLES>
void word_of(uint kept, uint octet, thread uint &bytes, thread uint &start) {
    const uint other = simd_shuffle_xor(kept, ushort(1));
    const uint both = kept + other;
    bytes = NIBBLES ? (both + 1) / 2 : both;
    start = octet % 2 == 1 ? other : 0;
}

template <bool NIBBLES, typename T, int N>
[[kernel]] void bitmap(
    constant UpgStripArgs &args [[buffer(0)]],
    device const uint *bits [[buffer(1)]],
    device const uchar *codes [[buffer(2)]],
    device const uint *strip_pointers [[buffer(3)]],
    device const uchar *prime_indices [[buffer(4)]],
    device const float *scales [[buffer(5)]],
    device const char *codebook [[buffer(6)]], // of s4
    device const uint *primes [[buffer(7)]],
    device const T *x [[buffer(8)]],
    device T *y [[buffer(9)]],
    threadgroup half *table [[threadgroup(0)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]]) {
    const Place place(group, tid, lane, simd, simds, N);
    fill_tables(table, NIBBLES ? codebook : nullptr, primes, place);
    threadgroup float *partial = behind(table, table_size(NIBBLES));
    threadgroup const half *levels = table;
    threadgroup const half *prime_table = table + (NIBBLES ? 16 : 0);

    threadgroup uint *counts = (threadgroup uint *)(partial + simds * N * STRIP_ROWS);
    bits += ulong(place.strip) * (args.strip_bytes / 4);
    prime_indices += ulong(place.strip) * args.groups * STRIP_ROWS;
    const uint run = (args.groups + simds - 1) / simds;
    const uint first_group = min(simd * run, args.groups), end_group = min(first_group + run, args.groups);

    // Each of four tiles has 8 words of 32 bits, one for each octet.
    uint counted = 0;
    for (uint step = first_group * BITMAP_STEPS; step < end_group * BITMAP_STEPS; step++) {
        uint bytes, start;
        word_of<NIBBLES>(popcount(bits[step * 32 + lane]), place.octet, bytes, start);
        counted += place.octet % 2 == 0 ? bytes : 0;
    }
    counted = simd_sum(counted);
    if (lane == 0) {
        counts[simd] = counted;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint at = strip_pointers[place.strip];
    for (uint before = 0; before < simd; before++) {
        at += counts[before];
    }

    float sums[OCTET][N];
    clear(sums);
    for (uint g = first_group; g < end_group; g++) {
        float of_group[OCTET][N];
        clear(of_group);
        for (uint step = g * BITMAP_STEPS; step < (g + 1) * BITMAP_STEPS; step++) {
            const uint mine = bits[step * 32 + lane];
            const uint kept = popcount(mine);
            uint bytes, start;
            word_of<NIBBLES>(kept, place.octet, bytes, start);
            // The threads of a word have the same place: the bytes count once, with the second of them.
            const uint counted_once = place.octet % 2 == 1 ? bytes : 0;
            const uint mine_at = at + simd_prefix_exclusive_sum(counted_once);
            if (kept > 0 && args.stored > 0) {
                float4 fours[N];
                fours_of(x, place.first, (step * STEP_TILES + place.slot) * 4, args, fours);
                // Each load stands by itself, without a branch: a bit that is not set loads the next code, or the last one
                // of the matrix.
                uint next = 0;
#pragma unroll
                for (int row = 0; row < OCTET; row++) {
                    float4 weights;
#pragma unroll
                    for (int col = 0; col < 4; col++) {
                        const bool is_kept = mine >> (4 * row + col) & 1;
                        const uint code = start + next;
                        const uchar byte = codes[min(mine_at + (NIBBLES ? code / 2 : code), args.stored - 1)];
                        const float level =
                            NIBBLES ? float(levels[byte >> (code % 2 * 4) & 15]) : float(as_type<char>(byte));
                        weights[col] = is_kept ? level : 0.0f;
                        next += is_kept ? 1 : 0;
                    }
                    multiply(weights, fours, of_group[row]);
                }
            }
            at += simd_sum(counted_once);
        }
        add_group(prime_indices + g * STRIP_ROWS, prime_table, place, of_group, sums);
    }
    finish(sums, place, args, scales, nullptr, primes, partial, y);
}

instantiate_kernel("s8_f32", bitmap<false, float, 1>)
instantiate_kernel("s8_f16", bitmap<false, half, 1>)
instantiate_kernel("s8_batch_f32", bitmap<false, float, BATCH>)
instantiate_kernel("s8_batch_f16", bitmap<false, half, BATCH>)
instantiate_kernel("s4_f32", bitmap<true, float, 1>)
instantiate_kernel("s4_f16", bitmap<true, half, 1>)
instantiate_kernel("s4_batch_f32", bitmap<true, float, BATCH>)
instantiate_kernel("s4_batch_f16", bitmap<true, half, BATCH>)

// ---- t2, t3 and t4

// Levels that the points of a ring have: with 7 of their bits, 8 for t4.
constexpr int point_bits(int k) { return k == 4 ? 8 : 7; }

// The level of the state that begins at bit `from` of `bits`, 0 to 12.
//
// What is below it is taken away, not shifted away, as a multiplication takes place anywhere in a word: the point is in
// bits from + 8 to from + 15 of the product then.
template <int K>
float level_of(uint bits, int from, uint multiplier, threadgroup const half *levels) {
    const uint product = (bits & 0x1FFFu << from) * multiplier;
    return float(levels[product >> (from + 16 - point_bits(K)) & ((1u << point_bits(K)) - 1)]);
}

template <int K, typename T, int N>
[[kernel]] void trellis(
    constant UpgStripArgs &args [[buffer(0)]],
    device const uchar *codes [[buffer(1)]],
    device const uchar *prime_indices [[buffer(2)]],
    device const float *scales [[buffer(3)]],
    device const half *levels [[buffer(4)]], // of every point
    device const uint *primes [[buffer(5)]],
    device const float *x [[buffer(6)]],
    device T *y [[buffer(7)]],
    threadgroup half *table [[threadgroup(0)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simd [[simdgroup_index_in_threadgroup]],
    uint simds [[simdgroups_per_threadgroup]]) {
    const Place place(group, tid, lane, simd, simds, N);
    constexpr uint points = 1u << point_bits(K);
    threadgroup float *partial = behind(table, points);
    for (uint i = tid; i < points; i += place.threads()) {
        table[i] = levels[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    device const uint *words = (device const uint *)(codes + ulong(place.strip) * args.strip_bytes);
    const uint tiles = (args.cols + 3) / 4;

    float sums[OCTET][N];
    clear(sums);
    for (uint step = simd * STEP_TILES; step < tiles; step += simds * STEP_TILES) {
        const uint tile = step + place.slot;
        device const uint *mine = words + (min(tile, tiles - 1) * 8 + place.octet) * K;
        uint word[K + 1];
#pragma unroll
        for (int i = 0; i <= K; i++) {
            word[i] = mine[i];
        }
        float4 fours[N];
        fours_of(x, place.first, tile * 4, args, fours);
#pragma unroll
        for (int row = 0; row < OCTET; row++) {
            constexpr int bits = 4 * K;
            const int at = bits * row / 32, shift = bits * row % 32;
            const uint window = shift == 0 ? word[at] : word[at] >> shift | word[at + 1] << (32 - shift);
            float4 weights;
#pragma unroll
            for (int col = 0; col < 4; col++) {
                weights[col] = level_of<K>(window, K * col, args.multiplier, table);
            }
            multiply(weights, fours, sums[row]);
        }
    }
    finish(sums, place, args, scales, prime_indices, primes, partial, y);
}

instantiate_kernel("t2_f32", trellis<2, float, 1>)
instantiate_kernel("t2_f16", trellis<2, half, 1>)
instantiate_kernel("t2_batch_f32", trellis<2, float, BATCH>)
instantiate_kernel("t2_batch_f16", trellis<2, half, BATCH>)
instantiate_kernel("t3_f32", trellis<3, float, 1>)
instantiate_kernel("t3_f16", trellis<3, half, 1>)
instantiate_kernel("t3_batch_f32", trellis<3, float, BATCH>)
instantiate_kernel("t3_batch_f16", trellis<3, half, BATCH>)
instantiate_kernel("t4_f32", trellis<4, float, 1>)
instantiate_kernel("t4_f16", trellis<4, half, 1>)
instantiate_kernel("t4_batch_f32", trellis<4, float, BATCH>)
instantiate_kernel("t4_batch_f16", trellis<4, half, BATCH>)

// ---- Rotation

// Elements of a thread.
constant constexpr int RADIX = 16;

// Columns that a threadgroup copies.
constant constexpr uint COPIED = 4096;

// Place of element i in threadgroup memory: with it 16 neighbours of a thread are not all in one bank.
uint padded(uint i) { return i + i / RADIX; }

// Butterflies of spans 1, 2, ... below R over the elements of a thread.
template <int R>
void butterflies(thread float (&e)[RADIX]) {
#pragma unroll
    for (int span = 1; span < R; span *= 2) {
#pragma unroll
        for (int i = 0; i < R; i++) {
            if ((i & span) == 0) {
                const float a = e[i], b = e[i + span];
                e[i] = a + b;
                e[i + span] = a - b;
            }
        }
    }
}

void butterflies_of(uint radix, thread float (&e)[RADIX]) {
    switch (radix) {
    case 2: butterflies<2>(e); break;
    case 4: butterflies<4>(e); break;
    case 8: butterflies<8>(e); break;
    case 16: butterflies<16>(e); break;
    default: break;
    }
}

template <typename T>
[[kernel]] void rotate_block(
    constant UpgRotateArgs &args [[buffer(0)]],
    device const uchar *signs [[buffer(1)]],
    device const T *x [[buffer(2)]],
    device float *y [[buffer(3)]],
    threadgroup float *shared [[threadgroup(0)]],
    uint2 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]],
    uint2 threads [[threads_per_threadgroup]]) {
    x += ulong(group.y) * args.x_stride;
    y += ulong(group.y) * args.y_stride;
    const uint blocks = args.size / args.block;
    if (group.x >= blocks) {
        // Those behind the blocks copy what the pass leaves alone.
        if (args.copies) {
            const uint rest = args.cols - args.size;
            const uint first = (group.x - blocks) * COPIED;
            for (uint i = first + tid; i < min(rest, first + COPIED); i += threads.x) {
                const uint col = i < args.first ? i : i + args.size;
                y[col] = float(x[col]);
            }
        }
        return;
    }
    const uint start = group.x * args.block;
    for (uint i = tid; i < args.block; i += threads.x) {
        const uint col = start + i;
        const float value = float(x[args.first + col]);
        shared[padded(i)] = signs[col / 8] >> (col % 8) & 1 ? -value : value;
    }
    for (uint span = 1; span < args.block; span *= RADIX) {
        const uint radix = min(uint(RADIX), args.block / span);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint work = tid; work < args.block / radix; work += threads.x) {
            const uint base = work / span * span * radix + work % span;
            float e[RADIX];
#pragma unroll
            for (int i = 0; i < RADIX; i++) {
                e[i] = uint(i) < radix ? shared[padded(base + i * span)] : 0.0f;
            }
            butterflies_of(radix, e);
#pragma unroll
            for (int i = 0; i < RADIX; i++) {
                if (uint(i) < radix) {
                    shared[padded(base + i * span)] = e[i];
                }
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = tid; i < args.block; i += threads.x) {
        y[args.first + start + i] = shared[padded(i)] * args.factor;
    }
}

instantiate_kernel("rotate_block_f32", rotate_block<float>)
instantiate_kernel("rotate_block_f16", rotate_block<half>)

[[kernel]] void rotate_across(
    constant UpgRotateArgs &args [[buffer(0)]],
    device float *y [[buffer(1)]],
    uint2 at [[thread_position_in_grid]]) {
    if (at.x >= args.size / args.radix) {
        return;
    }
    y += ulong(at.y) * args.y_stride + args.first + at.x / args.block * args.block * args.radix + at.x % args.block;
    float e[RADIX];
#pragma unroll
    for (int i = 0; i < RADIX; i++) {
        e[i] = uint(i) < args.radix ? y[i * args.block] : 0.0f;
    }
    butterflies_of(args.radix, e);
#pragma unroll
    for (int i = 0; i < RADIX; i++) {
        if (uint(i) < args.radix) {
            y[i * args.block] = e[i] * args.factor;
        }
    }
}

// The arguments of the kernels in spmv.metal, for the shader and for its host.
//
// The host is src/metal_kernels/args.rs: the same structs, the same offsets. Both sides assert them, and a test
// compares the numbers of this file with those of the other.
#pragma once

typedef unsigned int upg_u32;

#define UPG_SIZE(type, size) static_assert(sizeof(type) == size, "size of " #type)
#define UPG_AT(type, field, offset) static_assert(__builtin_offsetof(type, field) == offset, "place of " #field)

// Of mdcsr_*.
struct UpgSparseArgs {
    upg_u32 rows;
    upg_u32 cols;
    upg_u32 vectors;  // how many vectors x has
    upg_u32 x_stride; // elements from one vector to the next
    upg_u32 y_stride;
    upg_u32 entries; // of the whole matrix
    upg_u32 window;  // mdcsr_row_shared: elements of x that threadgroup memory holds at a time
};
UPG_SIZE(UpgSparseArgs, 28);
UPG_AT(UpgSparseArgs, rows, 0);
UPG_AT(UpgSparseArgs, cols, 4);
UPG_AT(UpgSparseArgs, vectors, 8);
UPG_AT(UpgSparseArgs, x_stride, 12);
UPG_AT(UpgSparseArgs, y_stride, 16);
UPG_AT(UpgSparseArgs, entries, 20);
UPG_AT(UpgSparseArgs, window, 24);

// Of q8_*, q4_*, s8_*, s4_*, t2_*, t3_* and t4_*.
struct UpgStripArgs {
    upg_u32 rows;
    upg_u32 cols;
    upg_u32 vectors;
    upg_u32 x_stride;
    upg_u32 y_stride;
    upg_u32 group;       // columns that share a prime index, 32 or 64; not of t
    upg_u32 groups;      // of a strip; not of t
    upg_u32 strip_bytes; // of codes; of s: of the bitmap
    upg_u32 multiplier;  // of t: what a state is multiplied with
    upg_u32 stored;      // of s: bytes of codes of the whole matrix
};
UPG_SIZE(UpgStripArgs, 40);
UPG_AT(UpgStripArgs, rows, 0);
UPG_AT(UpgStripArgs, cols, 4);
UPG_AT(UpgStripArgs, vectors, 8);
UPG_AT(UpgStripArgs, x_stride, 12);
UPG_AT(UpgStripArgs, y_stride, 16);
UPG_AT(UpgStripArgs, group, 20);
UPG_AT(UpgStripArgs, groups, 24);
UPG_AT(UpgStripArgs, strip_bytes, 28);
UPG_AT(UpgStripArgs, multiplier, 32);
UPG_AT(UpgStripArgs, stored, 36);

// Of rotate_block_* and rotate_across.
struct UpgRotateArgs {
    upg_u32 first; // the first column of this pass
    upg_u32 size;  // columns of the pass, a power of two
    upg_u32 cols;  // of the vector; rotate_block_* also copies those outside of the pass, if `copies` is 1
    upg_u32 copies;
    upg_u32 x_stride;
    upg_u32 y_stride;
    upg_u32 block; // rotate_block_*: columns of a threadgroup; rotate_across: the span of the smallest butterfly
    upg_u32 radix; // rotate_across: elements of a thread
    float factor;  // what every element is multiplied with at the end
};
UPG_SIZE(UpgRotateArgs, 36);
UPG_AT(UpgRotateArgs, first, 0);
UPG_AT(UpgRotateArgs, size, 4);
UPG_AT(UpgRotateArgs, cols, 8);
UPG_AT(UpgRotateArgs, copies, 12);
UPG_AT(UpgRotateArgs, x_stride, 16);
UPG_AT(UpgRotateArgs, y_stride, 20);
UPG_AT(UpgRotateArgs, block, 24);
UPG_AT(UpgRotateArgs, radix, 28);
UPG_AT(UpgRotateArgs, factor, 32);

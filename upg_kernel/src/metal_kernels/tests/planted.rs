//! Mutation tests: kernels with a planted bug, each of which must be found.

use super::*;

/// Planted bug.
///
/// It has the original text in the source, which may occur repeatedly; the replacement of
/// its first occurrence; the affected kernels; and a part of the message, unless the bug
/// only changes results.
struct Bug {
    name: &'static str,
    from: &'static str,
    to: &'static str,
    kernel: &'static str,
    message: &'static str,
}

const WRONG: &str = "of vector";
/// Message part for two threads at a byte without a barrier between,
/// or if the reader was first.
const NO_BARRIER: &str = "of threadgroup memory, which";

const BUGS: &[Bug] = &[
    Bug {
        name: "no barrier before the sums of others are read",
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    for (uint i = place.tid; i < STRIP_ROWS * N",
        to: "    for (uint i = place.tid; i < STRIP_ROWS * N",
        kernel: "q8_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "no barrier after tables were filled",
        from: "        table[i] = half(primes[i]);\n    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);",
        to: "        table[i] = half(primes[i]);\n    }",
        kernel: "q4_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "no barrier before the window is overwritten",
        from: "        // Nobody may still read the window before.\n        threadgroup_barrier(mem_flags::mem_threadgroup);",
        to: "",
        kernel: "mdcsr_row_shared_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "no barrier after the window was loaded",
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        while (k < end",
        to: "        while (k < end",
        kernel: "mdcsr_row_shared_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "a barrier of a SIMD-group in place of one of all",
        from: "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    uint at = strip_pointers[place.strip];",
        to: "    simdgroup_barrier(mem_flags::mem_threadgroup);\n    uint at = strip_pointers[place.strip];",
        kernel: "s8_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "no barrier between spans",
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        for (uint work = tid",
        to: "        for (uint work = tid",
        kernel: "rotate_block_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "a barrier that threads without a row do not reach",
        from: "    uint k = row < args.rows ? row_pointers[row] : 0;",
        to: "    if (row >= args.rows) { return; }\n    uint k = row_pointers[row];",
        kernel: "mdcsr_row_shared_f32",
        message: "does not reach the barrier",
    },
    Bug {
        name: "a function of the SIMD-group that some threads do not call",
        from: "            at += simd_sum(counted_once);",
        to: "            if (kept > 0) { at += simd_sum(counted_once); }",
        kernel: "s8_f32",
        message: "where others of its SIMD-group are",
    },
    Bug {
        name: "barriers for no memory",
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        while (k < end",
        to: "        threadgroup_barrier(mem_flags::mem_none);\n        while (k < end",
        kernel: "mdcsr_row_shared_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "barriers for the memory of the device",
        from: "        threadgroup_barrier(mem_flags::mem_threadgroup);\n        for (uint work = tid",
        to: "        threadgroup_barrier(mem_flags::mem_device);\n        for (uint work = tid",
        kernel: "rotate_block_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "results that are added to what was there",
        from: "        y[ulong(group.y) * args.y_stride + row] = T(scales[row] * sum);",
        to: "        y[ulong(group.y) * args.y_stride + row] += T(scales[row] * sum);",
        kernel: "mdcsr_simd_f32",
        message: "which nothing has written",
    },
    Bug {
        name: "two threadgroups that write the same row",
        from: "    const uint row = group.x * simds + simd;",
        to: "    const uint row = group.x * simds / 2 + simd;",
        kernel: "mdcsr_simd_f32",
        message: "which another thread",
    },
    Bug {
        name: "SIMD-groups that are taken to be eight",
        from: "    const uint row = group.x * simds + simd;",
        to: "    const uint row = group.x * 7 + simd;",
        kernel: "mdcsr_simd_f32",
        message: "",
    },
    Bug {
        name: "columns of 16 bits",
        from: "const uint base = before + simd_prefix",
        to: "const ushort base = before + simd_prefix",
        kernel: "mdcsr_simd_f32",
        message: WRONG,
    },
    Bug {
        name: "a product with what is not stored",
        from: "x[is_stored ? min(base + columns[i], args.cols - 1) : 0]",
        to: "x[is_stored ? min(base + columns[i] + 1, args.cols - 1) : 0]",
        kernel: "mdcsr_simd_f32",
        message: "",
    },
    Bug {
        name: "elements of a thread that are none",
        from: "    if (at.x >= args.size / args.radix) {\n        return;\n    }",
        to: "",
        kernel: "rotate_across",
        message: "",
    },
    Bug {
        name: "one row more than there are",
        from: "    if (row >= args.rows) {\n        return;",
        to: "    if (row > args.rows) {\n        return;",
        kernel: "mdcsr_row_f32",
        message: "outside of a buffer",
    },
    Bug {
        name: "rows of a strip that are not there",
        from: "        if (row < args.rows && vector < args.vectors)",
        to: "        if (vector < args.vectors)",
        kernel: "t2_f32",
        message: "outside of a buffer",
    },
    Bug {
        name: "one row less than there are",
        from: "        if (row < args.rows && vector < args.vectors)",
        to: "        if (row + 1 < args.rows && vector < args.vectors)",
        kernel: "t3_f32",
        message: WRONG,
    },
    Bug {
        name: "four columns where one is left",
        from: "    if (col + 4 <= cols) {",
        to: "    if (col < cols) {",
        kernel: "q8_f16",
        message: "outside of a buffer",
    },
    Bug {
        name: "an input that is taken to be aligned",
        from: "typedef packed_float4 four;",
        to: "typedef float4 four;",
        kernel: "q8_batch_f32",
        message: "undefined",
    },
    Bug {
        name: "words past the last entry",
        from: "            if (args.entries - first >= 4) {",
        to: "            if (true) {",
        kernel: "mdcsr_simd_f32",
        message: "outside of a buffer",
    },
    Bug {
        name: "tiles past the last one",
        from: "(min(tile, tiles - 1) * 8 + place.octet)",
        to: "(tile * 8 + place.octet)",
        kernel: "t4_f32",
        message: "outside of a buffer",
    },
    Bug {
        name: "codes behind the last one",
        from: "codes[min(mine_at + (NIBBLES ? code / 2 : code), args.stored - 1)]",
        to: "codes[mine_at + (NIBBLES ? code / 2 : code)]",
        kernel: "s8_f16",
        message: "outside of a buffer",
    },
    Bug {
        name: "columns that are none",
        from: "x[is_stored ? min(base + columns[i], args.cols - 1) : 0]",
        to: "x[base + columns[i] + 4096]",
        kernel: "mdcsr_simd_f16",
        message: "outside of a buffer",
    },
    Bug {
        name: "sums of a SIMD-group over the counts",
        from: "(partial + simds * N * STRIP_ROWS)",
        to: "(partial + (simds - 1) * N * STRIP_ROWS)",
        kernel: "s4_f16",
        message: NO_BARRIER,
    },
    Bug {
        name: "an inclusive for an exclusive prefix of columns",
        from: "simd_prefix_exclusive_sum(run)",
        to: "simd_prefix_inclusive_sum(run)",
        kernel: "mdcsr_simd_f32",
        message: "",
    },
    Bug {
        name: "an inclusive for an exclusive prefix of codes",
        from: "simd_prefix_exclusive_sum(counted_once)",
        to: "simd_prefix_inclusive_sum(counted_once)",
        kernel: "s4_f32",
        message: "",
    },
    Bug {
        name: "a wrong shift of half bytes",
        from: "levels_of(word, 4 * half_tile, levels)",
        to: "levels_of(word, 3 * half_tile, levels)",
        kernel: "q4_f16",
        message: WRONG,
    },
    Bug {
        name: "a wrong shift between words",
        from: "word[at + 1] << (32 - shift)",
        to: "word[at + 1] << (31 - shift)",
        kernel: "t3_f16",
        message: WRONG,
    },
    Bug {
        name: "a shift by all bits of a word",
        from: "shift == 0 ? word[at] : ",
        to: "",
        kernel: "t2_f32",
        message: "undefined",
    },
    Bug {
        name: "states with a bit of the one before",
        from: "bits & 0x1FFFu << from",
        to: "bits",
        kernel: "t2_f16",
        message: WRONG,
    },
    Bug {
        name: "states with a bit too many",
        from: "bits & 0x1FFFu << from",
        to: "bits & 0x3FFFu << from",
        kernel: "t4_f16",
        message: WRONG,
    },
    Bug {
        name: "primes of the group before",
        from: "add_group(prime_indices + g * STRIP_ROWS, prime_table, place, of_group, sums);\n    }\n    finish",
        to: "add_group(prime_indices + g / 2 * STRIP_ROWS, prime_table, place, of_group, sums);\n    }\n    finish",
        kernel: "q8_f32",
        message: WRONG,
    },
    Bug {
        name: "sums that begin with what was there",
        from: "            sums[row][v] = 0.0f;",
        to: "",
        kernel: "t2_f32",
        message: "",
    },
    Bug {
        name: "counts of one SIMD-group that nobody writes",
        from: "    if (lane == 0) {\n        counts[simd] = counted;",
        to: "    if (lane == 0 && simd > 0) {\n        counts[simd] = counted;",
        kernel: "s8_f32",
        message: "which nothing has written",
    },
    Bug {
        name: "a vector of a batch that is not there",
        from: "        fours[v] = vector < args.vectors ? four_of",
        to: "        fours[v] = vector <= args.vectors ? four_of",
        kernel: "q8_batch_f32",
        message: "outside of a buffer",
    },
    Bug {
        name: "all SIMD-groups write one place",
        from: "partial[(place.simd * N + v) * STRIP_ROWS",
        to: "partial[v * STRIP_ROWS",
        kernel: "t4_f32",
        message: NO_BARRIER,
    },
    Bug {
        name: "a write to the weights",
        from: "        column += deltas[k];",
        to: "        column += deltas[k];\n        ((device uchar *)deltas)[k] = 1;",
        kernel: "mdcsr_row_f16",
        message: "bound for reading",
    },
    Bug {
        name: "the other sign of a rotation",
        from: "& 1 ? -value : value",
        to: "& 1 ? value : -value",
        kernel: "rotate_block_f16",
        message: WRONG,
    },
];

/// Returns the cases for a kernel: matrices of its encoding at every edge
/// that a bug may affect.
fn cases(kernel: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, cols) in [(7, 65), (65, 63), (66, 300)] {
        cases.extend(packed(rows, cols));
        cases.extend(every_sparse_kernel("", &sparse(rows, cols)));
    }
    cases.extend(every_sparse_kernel("", &sparse(5, 4999)));
    cases.extend(every_sparse_kernel("", &wide()));
    cases.extend(packed(3, 4999));
    // A rotation that needs more than one threadgroup.
    let rotated = trellis(1, 12_000, 2, 8192);
    cases.push(Case::new("t2", Matrix::Trellis(rotated)));
    let encoding = kernel.split_once('_').expect("a type").0;
    let of_kernel = |case: &Case| match encoding {
        "mdcsr" => kernel.rsplit_once('_').expect("a type").0 == case.name.trim(),
        "rotate" => case.name == "t2",
        _ => case.name.starts_with(encoding),
    };
    cases.retain(of_kernel);
    assert!(!cases.is_empty(), "nothing to run for {kernel}");
    cases
}

/// Returns the first failure.
fn found(program: &Program, kernel: &str) -> Result<(), String> {
    let (_, element) = kernel.rsplit_once('_').expect("a type");
    let element = if element == "f16" {
        Element::F16
    } else {
        Element::F32
    };
    let vectors = if kernel.contains("batch") { 5 } else { 1 };
    for case in cases(kernel) {
        // A number of threads for which the last threadgroup of a rotation is partial.
        let max_threads = if kernel.starts_with("rotate") {
            96
        } else {
            256
        };
        check(program, &case, vectors, element, max_threads)?;
    }
    Ok(())
}

#[test]
#[ignore = "compiles the kernels once for each bug: UPG_TEST_KERNELS=1 ./test.sh"]
fn test_metal_spmv_every_planted_bug_is_found() {
    let Some(clang) = clang() else { return };
    let right = source();
    let missed = BUGS.par_iter().filter_map(|bug| {
        assert!(
            right.contains(bug.from),
            "{}: it is not there to be broken",
            bug.name
        );
        let wrong = right.replacen(bug.from, bug.to, 1);
        // The product needs the rotation, and a bug of the rotation shows in the product.
        let is_used = |name: &str| {
            name == bug.kernel || name.starts_with("rotate") || name.starts_with("t2_f")
        };
        let program = Program::new(&clang, &wrong, is_used, &["-Wno-error"]);
        let program = program.unwrap_or_else(|e| panic!("{}: {e}", bug.name));
        match found(&program, bug.kernel) {
            Err(message) if message.contains(bug.message) => None,
            other => Some(format!("{}: {other:?}", bug.name)),
        }
    });
    let missed: Vec<_> = missed.collect();
    assert!(missed.is_empty(), "{missed:#?}");
}

/// The same runs find nothing without a bug.
#[test]
#[ignore = "compiles the kernels once for each bug: UPG_TEST_KERNELS=1 ./test.sh"]
fn test_metal_spmv_nothing_is_found_where_no_bug_is() {
    let Some([program, _]) = programs() else {
        return;
    };
    let mut kernels: Vec<&str> = BUGS.iter().map(|bug| bug.kernel).collect();
    kernels.sort_unstable();
    kernels.dedup();
    let found = kernels
        .par_iter()
        .filter_map(|kernel| found(program, kernel).err());
    let found: Vec<_> = found.collect();
    assert!(found.is_empty(), "{found:#?}");
}

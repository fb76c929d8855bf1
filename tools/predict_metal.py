#!/usr/bin/env python3
"""Predicts the speed of the kernels for Apple GPUs from counted instructions; nothing is run.

    python3 tools/predict_metal.py

Prints the tables of docs/notes/gpu.md: instructions and bytes for each weight, and tokens per second of Phi-4
by chip, as memory allows and as arithmetic allows. Instructions were counted by hand in
kernels/spmv.metal, for one vector. Cycles were measured on M1 and A14 by
github.com/philipturner/metal-benchmarks; later chips are assumed to be the same.
"""

import random

# ---- Instructions for each weight: simple ones (adds, fused multiply-adds, bitwise, selections; a cycle
# of a scheduler), complex ones (integer products, shifts, bit fields, int to float; four cycles) and
# loads from threadgroup memory. `words`: four-byte words of the table that is looked up at random.

DOT = 5 / 4  # four products and the sum so far, of four weights


def windows(rows_with_a_shift):
    """Instructions for 8 rows of 4 weights: two shifts and an `or` where a row begins inside a word."""
    return {"complex": 2 * rows_with_a_shift / 32, "simple": rows_with_a_shift / 32}


def trellis(rows_with_a_shift):
    window = windows(rows_with_a_shift)
    return {
        # a mask, the address in the table, the product with x; addresses and ends for 32 weights
        "simple": 1 + 1 + DOT + 12 / 32 + window["simple"],
        # the product with the multiplier, the point in it
        "complex": 2 + window["complex"],
        "loads": 1,
    }


# The primes of 8 rows for each group of columns: a byte, a load, an address, a product.
def primes(weights_of_a_thread):
    return {"simple": 16 / weights_of_a_thread, "complex": 8 / weights_of_a_thread, "loads": 8 / weights_of_a_thread}


def add(a, b):
    return {key: a[key] + b[key] for key in a}


# Cycles of a scheduler for SIMD-group functions (metal-benchmarks): a prefix sum, a sum, a shuffle.
PREFIX, SUM, SHUFFLE = 11.75, 16.6, 2.0

# Half of the weights stored. For each position: a test of its bit (2), the next code (2), selection, the
# count so far, the product; for 32 of them two counts of bits and the start of the codes.
BITMAP = {"simple": 6 + DOT + (PREFIX + SUM + 2 * SHUFFLE) / 32, "complex": 2 / 32, "loads": 0}

KERNELS = {
    # a byte out of its word and to float
    "q8": (add({"simple": DOT + 8 / 32, "complex": 2, "loads": 0}, primes(128)), 128, 1 + 1 / 64),
    # half a byte, its level
    "q4": (add({"simple": DOT + 1 + 10 / 64, "complex": 1, "loads": 1}, primes(64)), 8, 1 / 2 + 1 / 32),
    "t2": (trellis(6), 64, 2 / 8),
    "t3": (trellis(7), 64, 3 / 8),
    "t4": (trellis(4), 128, 4 / 8),
    # a byte from memory, its sign, to float
    "s8": (add(add(BITMAP, {"simple": 1, "complex": 2, "loads": 0}), primes(128)), 128, 1 / 8 + 1 / 2 + 1 / 64),
    # a byte from memory, the half of it (a shift by a variable counts twice), its level
    "s4": (add(add(BITMAP, {"simple": 4, "complex": 4, "loads": 1}), primes(128)), 8, 1 / 8 + 1 / 4 + 1 / 64),
    # For each entry: a test whether it is in the row (3), selections (3), sums of deltas (2), the product;
    # bytes out of words and their signs, prime times value, to float. For four entries a prefix sum and a
    # sum. Without the two loads at random places.
    "mdcsr_simd": ({"simple": 9 + 10 / 4 + (PREFIX + SUM) / 4, "complex": 4, "loads": 0}, 1, 4),
}


def conflicts(words):
    """Loads for 32 threads that each read one of `words` words at random, with 32 banks (an assumption)."""
    draw, runs, total = random.Random(1), 20000, 0
    for _ in range(runs):
        banks = [0] * 32
        for word in {draw.randrange(words) for _ in range(32)}:
            banks[word % 32] += 1
        total += max(banks)
    return total / runs


def cycles(kernel):
    """Cycles of a scheduler for 32 weights: complex pipeline, issue, threadgroup memory (shared by four).

    Measured mixtures (a product with 2 additions in 4.0 cycles, with 3 in 5.4, with 4 in 6.1) take about
    simple + 2 * complex, and not less than 4 * complex.
    """
    count, words, _ = KERNELS[kernel]
    return {
        "complex": 4 * count["complex"],
        "issue": count["simple"] + 2 * count["complex"] + count["loads"],
        "threadgroup": 4 * conflicts(words) * count["loads"],
    }


# Cores, GHz and GB/s of the largest chip of each kind. Cores and bandwidth: Apple's technical
# specifications. GHz: M1 and M2 from metal-benchmarks; M3 and M4 from hardware databases; M5 assumed
# equal to M4.
CHIPS = [
    ("M1", 8, 1.278, 68),
    ("M1 Pro", 16, 1.296, 200),
    ("M1 Max", 32, 1.296, 400),
    ("M2", 10, 1.398, 100),
    ("M2 Pro", 19, 1.398, 200),
    ("M2 Max", 38, 1.398, 400),
    ("M3", 10, 1.398, 100),
    ("M3 Pro", 18, 1.398, 150),
    ("M3 Max", 40, 1.398, 400),
    ("M4", 10, 1.578, 120),
    ("M4 Pro", 20, 1.578, 273),
    ("M4 Max", 40, 1.578, 546),
    ("M5", 10, 1.578, 153),
    ("M5 Pro", 20, 1.578, 307),
    ("M5 Max", 40, 1.578, 614),
]

# Phi-4: 40 layers of query, key and value; output; gate and up; down. And the output head, q4 beside t2 and t3, else q8.
BLOCKS = 40 * (7680 * 5120 + 5120 * 5120 + 35840 * 5120 + 5120 * 17920)
HEAD = 100352 * 5120


def per_token(kernel, ghz_cores, bandwidth):
    """Returns tokens per second by memory and by arithmetic, and the bytes that a token reads."""
    parts = [(kernel, BLOCKS), ("q8" if kernel == "q4" else "q4", HEAD)]
    size = sum(weights * KERNELS[name][2] for name, weights in parts)
    work = sum(weights * max(cycles(name).values()) for name, weights in parts)
    # 128 lanes a core: four schedulers of 32.
    return bandwidth * 1e9 / size, ghz_cores * 1e9 * 128 / work, size


def main():
    print("| | simple | complex | threadgroup loads | bytes | cycles: complex / issue / threadgroup |")
    print("|---|---|---|---|---|---|")
    for name, (count, _, size) in KERNELS.items():
        c = cycles(name)
        print(
            f"| `{name}` | {count['simple']:.2f} | {count['complex']:.2f} | {count['loads']:.2f} | {size:.3f} |"
            f" {c['complex']:.1f} / {c['issue']:.1f} / {c['threadgroup']:.1f} |"
        )
    print()
    sizes = {name: per_token(name, 1, 1)[2] for name in ("t2", "t3", "q4")}
    print("| | cores | GHz | GB/s |" + "".join(f" {n}, {s / 1e9:.2f} GB |" for n, s in sizes.items()))
    print("|---|---|---|---|---|---|---|")
    for chip, cores, ghz, bandwidth in CHIPS:
        row = f"| {chip} | {cores} | {ghz} | {bandwidth} |"
        for name in sizes:
            memory, work, _ = per_token(name, cores * ghz, bandwidth)
            row += f" {memory:.0f} / {work:.0f} |"
        print(row)


if __name__ == "__main__":
    main()

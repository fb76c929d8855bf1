"""An independent reader of UPG files, written from upg_format_v2.md alone.

    python3 tools/upg_reader.py FILE            lists the layers with the norm of each
    upg_reader.layers(FILE)                     yields (name, float32 matrix) for every layer

Needs numpy and safetensors. It decodes to exactly the floats of the specification. It is written to be
read, not to be fast, and trusts the file (`upg verify` checks a file).
"""
import json
import sys

import numpy as np
from safetensors import safe_open

F32 = np.float32


def first_primes(count):
    sieve = np.ones(110_000, bool)
    sieve[:2] = False
    for n in range(2, 332):
        if sieve[n]:
            sieve[n * n :: n] = False
    return np.flatnonzero(sieve)[:count]


PRIME_LUT = first_primes(10_000)


def weight(scale, prime_index, value):
    """Computes the formula: an exact integer product, one float32 rounding."""
    product = PRIME_LUT[prime_index].astype(np.int64) * value
    return scale.astype(F32) * product.astype(F32)


# multiplier, coarse, fine
TRELLIS_CODES = {
    2: (
        16920,
        np.array([16, 56, 69, 76, 82, 88, 92, 95, 100, 104, 108, 111, 114, 118, 121, 123]),
        np.array([0, 0, 23, 23, 27, 27, 34, 34, 0, 0, 1, 1, 3, 3, 4, 4]),
    ),
    3: (
        8680,
        np.array([9, 57, 69, 76, 82, 88, 92, 96, 100, 104, 108, 111, 114, 118, 121, 123]),
        np.array([0, 0, 21, 21, 33, 33, 38, 38, 0, 0, 1, 1, 3, 3, 4, 4]),
    ),
    4: (
        4292,
        np.array([0, 58, 68, 76, 82, 87, 92, 96, 100, 104, 107, 111, 114, 117, 121, 123]),
        np.array([0, 21, 32, 39, 44, 48, 51, 52, 0, 1, 1, 2, 3, 3, 4, 4]),
    ),
}


def mdcsr(layer, get):
    out = np.zeros((layer["rows"], layer["cols"]), F32)
    values, deltas, primes = get("values"), get("delta_indices"), get("prime_indices")
    pointers, scales = get("row_pointers"), get("scales")
    for row in range(layer["rows"]):
        entries = slice(pointers[row], pointers[row + 1])
        columns = np.cumsum(deltas[entries], dtype=np.int64)
        out[row, columns] = weight(scales[row], primes[entries], values[entries])
    return out


def places(layer):
    """Returns the strip of every weight, and its number in this strip."""
    row, col = np.indices((layer["rows"], layer["cols"]))
    return row // 64, (col // 4) * 256 + (row % 64) * 4 + col % 4


def group_primes(layer, get):
    """Returns the prime index of every weight."""
    row, col = np.indices((layer["rows"], layer["cols"]))
    return get("prime_indices")[row // 64, col // layer["group"], row % 64]


def q8(layer, get):
    levels = get("values")[places(layer)]
    return weight(get("scales")[:, None], group_primes(layer, get), levels)


def q4(layer, get):
    row, col = np.indices((layer["rows"], layer["cols"]))
    codes = get("codes")[row // 64, (col // 8) * 256 + (row % 64) * 4 + col % 4]
    codes = np.where(col % 8 < 4, codes & 15, codes >> 4)
    return weight(get("scales")[:, None], group_primes(layer, get), get("codebook")[codes])


def bitmap(layer, get):
    bits = np.unpackbits(get("bitmap"), axis=1, bitorder="little").astype(bool)
    levels = np.zeros(bits.shape, np.int8)
    for strip, kept in enumerate(bits):
        at = get("strip_pointers")[strip]
        for word in range(0, len(kept), 64):
            numbers = word + np.flatnonzero(kept[word : word + 64])
            count = len(numbers)
            if layer["encoding"] == "s8":
                levels[strip, numbers], at = get("values")[at : at + count], at + count
            else:
                codes = get("codes")[at : at + (count + 1) // 2]
                codes, at = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1), at + len(codes)
                levels[strip, numbers] = get("codebook")[codes[:count]]
    return weight(get("scales")[:, None], group_primes(layer, get), levels[places(layer)])


def trellis_levels(k, state):
    multiplier, coarse, fine = TRELLIS_CODES[k]
    point = (state * multiplier & 0xFFFF) >> 8
    mirror = np.where(point < 128, 0, 255)
    depth = point ^ mirror
    return ((coarse[depth >> 3] + fine[np.where(depth < 8, depth, 8 + depth % 8)]) ^ mirror) - 128


def trellis(layer, get):
    k = int(layer["encoding"][1])
    bits = np.unpackbits(get("codes"), axis=1, bitorder="little")
    strip, n = places(layer)
    state = np.zeros(n.shape, np.int64)
    for bit in range(13):
        state += bits[strip, k * n + bit].astype(np.int64) << bit
    levels = trellis_levels(k, state)
    w = weight(get("scales")[:, None], get("prime_indices"), levels)
    return unrotate(w, layer["hadamard"], get("signs"))


def unrotate(w, size, signs):
    flip = np.where(np.unpackbits(signs, bitorder="little")[:size], F32(-1), F32(1))
    cols = w.shape[1]
    if size < cols:
        w[:, cols - size :] = hadamard(w[:, cols - size :]) * flip
    w[:, :size] = hadamard(w[:, :size]) * flip
    return w


def hadamard(w):
    rows, size = w.shape
    span = 1
    while span < size:
        pairs = w.reshape(rows, -1, 2, span)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        w = np.stack([a + b, a - b], axis=2).reshape(rows, size)
        span *= 2
    return w * F32(1 / np.sqrt(float(size)))


DECODERS = {"mdcsr": mdcsr, "q8": q8, "q4": q4, "s8": bitmap, "s4": bitmap}
DECODERS |= {"t2": trellis, "t3": trellis, "t4": trellis}


def layers(path):
    """Yields (layer description, float32 matrix [rows, cols]) in the order of the layer ids."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != "upg" or not metadata["version"].startswith("2."):
            raise ValueError(f"{path} is not a UPG file of version 2")
        for i, layer in enumerate(json.loads(metadata["layers"])):
            arrays = {}

            def get(name, i=i, arrays=arrays):
                if name not in arrays:
                    arrays[name] = file.get_tensor(f"layer_{i}_{name}")
                return arrays[name]

            yield layer, DECODERS[layer["encoding"]](layer, get)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for description, matrix in layers(sys.argv[1]):
        shape = f"[{description['rows']}, {description['cols']}]"
        print(f"{description['encoding']:6} {shape:16} |W| = {np.linalg.norm(matrix):12.4f}  {description['name']}")

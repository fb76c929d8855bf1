"""Writes a GGUF model of the llama family as F32 with its channels reordered, and padded if asked to.

    python bench/original_gguf.py SOURCE OUT [--multiple N]

The order: a quantized file has its values on grids, one for each block of 32 columns. Types with the same
blocks would fit these grids as they fit no trained model. So the channels of the hidden state, of the
values of each head and inside the MLPs change places. All rows and columns of a channel move together, so
the model computes the same. Each block then has columns of many blocks.

The zeros: K- and I-quants need multiples of 256 columns, and SmolLM2-135M has 576. The copy has more
heads, so that the columns of every matrix are a multiple of N, and computes the same: added rows and
columns are zero; norms divide by the root of a mean over more elements, which their gains and epsilon
compensate.

Needs the `gguf` package.
"""
import argparse
import math
import os
import pathlib

import numpy
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

# Sizes of the rows and columns of a matrix, by the last but one part of its name.
SHAPES = {
    "token_embd": ("vocab", "hidden"),
    "output": ("vocab", "hidden"),
    "attn_q": ("queries", "hidden"),
    "attn_k": ("keys", "hidden"),
    "attn_v": ("keys", "hidden"),
    "attn_output": ("hidden", "queries"),
    "ffn_gate": ("inner", "hidden"),
    "ffn_up": ("inner", "hidden"),
    "ffn_down": ("hidden", "inner"),
}
# Dimensions whose channels change places within their head only.
MOVED = {("attn_v", "keys"): "values", ("attn_output", "queries"): "outputs"}
NORMS = {"attn_norm", "ffn_norm", "output_norm"}

# Keys that the writer adds by itself.
WRITTEN = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture"}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--multiple", type=int, default=1)
    args = parser.parse_args()
    reader = GGUFReader(args.source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise SystemExit(f"{args.source}: the family is {metadata['general.architecture']}, this knows llama")
    old = sizes(metadata)
    new = padded(old, args.multiple)
    order = orders(old)

    partial = args.out.with_name(f".{args.out.name}.partial")
    writer = GGUFWriter(partial, "llama")
    changed = {
        "general.file_type": int(LlamaFileType.ALL_F32),
        "llama.embedding_length": new["hidden"],
        "llama.attention.head_count": new["queries"] // new["head"],
        "llama.attention.head_count_kv": new["keys"] // new["head"],
        "llama.attention.layer_norm_rms_epsilon": metadata["llama.attention.layer_norm_rms_epsilon"]
        * old["hidden"]
        / new["hidden"],
    }
    for name, field in reader.fields.items():
        if name not in WRITTEN:
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, metadata[name]), field.types[0], element)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        values = pad(tensor.name, reordered(tensor.name, values, old, order), old, new)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, args.out)


def sizes(metadata):
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head = hidden // heads
    return {
        "hidden": hidden,
        "head": head,
        "queries": hidden,
        "keys": metadata["llama.attention.head_count_kv"] * head,
        "inner": metadata["llama.feed_forward_length"],
        "vocab": metadata["llama.vocab_size"],
    }


def padded(old, multiple):
    """Returns the least padded sizes with as many queries for each key: whole groups of heads are added."""
    if old["inner"] % multiple:
        raise SystemExit(f"the inner size {old['inner']} is no multiple of {multiple}; this pads heads only")
    groups, group = old["keys"] // old["head"], old["queries"] // old["keys"]
    while groups * group * old["head"] % multiple:
        groups += 1
    queries = groups * group * old["head"]
    return {**old, "hidden": queries, "queries": queries, "keys": groups * old["head"]}


def orders(old):
    """Returns the new order of the channels of each size."""
    random = numpy.random.default_rng(0)
    heads = old["keys"] // old["head"]
    # Values stay in their head; queries follow the values that they attend to.
    value = [head * old["head"] + random.permutation(old["head"]) for head in range(heads)]
    group = old["queries"] // old["keys"]
    attended = numpy.repeat(value, group, axis=0)
    output = [values % old["head"] + head * old["head"] for head, values in enumerate(attended)]
    return {
        "hidden": random.permutation(old["hidden"]),
        "inner": random.permutation(old["inner"]),
        "values": numpy.concatenate(value),
        "outputs": numpy.concatenate(output),
    }


def kind_of(name):
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind not in NORMS and kind not in SHAPES:
        raise SystemExit(f"{name}: this does not know what its rows and columns are")
    return kind


def reordered(name, values, old, order):
    kind = kind_of(name)
    dimensions = ("hidden",) if kind in NORMS else SHAPES[kind]
    if list(values.shape) != [old[size] for size in dimensions]:
        raise SystemExit(f"{name}: the shape is {list(values.shape)}, expected {[old[size] for size in dimensions]}")
    for axis, size in enumerate(dimensions):
        size = MOVED.get((kind, size), size)
        if size in order:
            values = numpy.take(values, order[size], axis)
    return values


def pad(name, values, old, new):
    """Returns `values`, [rows, cols] or [len], padded with zeros; gains are also scaled."""
    kind = kind_of(name)
    if kind in NORMS:
        gains = values * math.sqrt(old["hidden"] / new["hidden"])
        return numpy.pad(gains, (0, new["hidden"] - old["hidden"])).astype(numpy.float32)
    return numpy.pad(values, [(0, new[size] - old[size]) for size in SHAPES[kind]])


if __name__ == "__main__":
    main()

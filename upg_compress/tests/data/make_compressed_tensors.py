#!/usr/bin/env python3
"""Makes compressed-tensors/: tiny checkpoints as the Python package compressed-tensors writes them, and their dense values.

The package needs torch. What it does is repeated here with numpy, from its source:

pack_to_int32, bitmask_compress,      compressed_tensors/compressors/*/*.py of version 0.10.2
sparse24_bitmask_compress
pack_to_int32_dense                   compressed_tensors/compressors/pack_quantized/helpers.py of version 0.20.0
full names, compression_config        compressed_tensors/compressors/{sparse_bitmask,model_compressor}.py of version 0.5.0
zero points of int8                   compressed_tensors/compressors/quantized_compressors/base.py of version 0.8.0

expected.safetensors has the dense F32 values, of which the compressed ones were made: they are not decoded here.

Needs: pip install numpy safetensors==0.5.3. Usage: make_compressed_tensors.py
"""
import json, math
from pathlib import Path

import numpy as np
from safetensors import serialize_file

HERE = Path(__file__).parent / "compressed-tensors"
RNG = np.random.default_rng(20)
LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=8, hidden_size=16)


def bf16(x):
    """The value, cut to bfloat16."""
    return (np.asarray(x, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def stored(x, dtype):
    """An array as a tensor of this type."""
    x = np.ascontiguousarray(x)
    data = {
        "bfloat16": lambda: (x.view(np.uint32) >> 16).astype("<u2"),
        "float16": lambda: x.astype("<f2"),
        "float32": lambda: x.astype("<f4"),
        "int64": lambda: x.astype("<i8"),
        "int32": lambda: x.astype("<i4"),
        "int8": lambda: x.astype("i1"),
        "uint8": lambda: x.astype("u1"),
    }[dtype]()
    return dict(dtype=dtype, shape=list(x.shape), data=data.tobytes())


def random(shape, dtype="bfloat16"):
    x = bf16(RNG.standard_normal(shape))
    return x.astype(np.float16).astype(np.float32) if dtype == "float16" else x


def bitmask_compress(w):
    mask = w != 0
    counts = mask.sum(axis=-1)
    offsets = np.cumsum(np.atleast_1d(counts)).reshape(counts.shape) - counts
    return w[mask], np.packbits(mask, axis=-1, bitorder="little"), offsets


def sparse24_bitmask_compress(w):
    fours = np.abs(w).reshape(-1, 4)
    mask = np.zeros(fours.shape, bool)
    np.put_along_axis(mask, np.argsort(-fours, axis=1, kind="stable")[:, :2], True, axis=1)
    mask = mask.reshape(w.shape)
    return w[mask].reshape(w.shape[0], -1), np.packbits(mask, axis=-1, bitorder="little")


def pack_to_int32(value, num_bits, packed_dim=1):
    value = (value + (1 << (num_bits - 1))).astype(np.uint8).astype(np.uint32)
    if packed_dim == 0:
        return pack_rows(value.T, num_bits).T
    return pack_rows(value, num_bits)


def pack_rows(value, num_bits):
    factor = 32 // num_bits
    size = math.ceil(value.shape[1] / factor)
    value = np.pad(value, [(0, 0), (0, size * factor - value.shape[1])])
    packed = np.zeros((value.shape[0], size), np.uint32)
    for i in range(factor):
        packed |= value[:, i::factor] << np.uint32(num_bits * i)
    assert np.array_equal(packed, pack_to_int32_dense(value, num_bits)[:, :size])
    return packed.view(np.int32)


def pack_to_int32_dense(value, num_bits):
    """Element i at bit i * num_bits: the same where words hold a whole number of elements."""
    bits = (value[:, :, None] >> np.arange(num_bits, dtype=np.uint32)) & 1
    rows = [np.packbits(row.ravel().astype(np.uint8), bitorder="little") for row in bits]
    rows = [np.pad(row, (0, -len(row) % 4)).view("<u4") for row in rows]
    return np.stack(rows)


def save(name, config, tensors, expected):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}, indent=2) + "\n")
    serialize_file(tensors, folder / "model.safetensors")
    serialize_file({k: stored(v, "float32") for k, v in expected.items()}, folder / "expected.safetensors")


def plain(tensors, expected, *names):
    """Weights that are not compressed."""
    for name, shape in names:
        expected[name] = random(shape)
        tensors[name] = stored(expected[name], "bfloat16")


def sparse(shape, dtype, kept):
    w = random(shape, dtype) * (RNG.random(shape) < kept)
    return w.astype(np.float32)


def sparse_bitmask():
    tensors, expected = {}, {}
    plain(tensors, expected, ("model.embed_tokens.weight", (8, 16)), ("model.norm.weight", (16,)))
    cases = [("q_proj", (5, 19), "bfloat16", 0.5), ("k_proj", (3, 16), "float16", 0.3),
             ("v_proj", (4, 7), "float32", 0.6), ("o_proj", (3, 9), "bfloat16", 0.0)]
    for module, shape, dtype, kept in cases:
        name = f"model.layers.0.self_attn.{module}"
        w = expected[f"{name}.weight"] = sparse(shape, dtype, kept)
        values, mask, offsets = bitmask_compress(w)
        tensors |= {f"{name}.shape": stored(np.array(shape), "int64"), f"{name}.compressed": stored(values, dtype),
                    f"{name}.bitmask": stored(mask, "uint8"), f"{name}.row_offsets": stored(offsets, "int64")}
    sparsity = dict(format="sparse-bitmask", global_sparsity=0.5, ignore=["lm_head"],
                    registry_requires_subclass=False, sparsity_structure="unstructured", targets=["Linear"])
    config = dict(quantization_config=dict(quant_method="compressed-tensors", sparsity_config=sparsity, version="0.10.2"))
    save("sparse-bitmask", config, tensors, expected)


def sparse_bitmask_of_every_parameter():
    tensors, expected = {}, {}
    for name, shape, kept in [("model.layers.0.mlp.up_proj.weight", (6, 10), 0.4), ("model.norm.weight", (13,), 0.8),
                              ("model.layers.0.mlp.up_proj.bias", (6,), 0.5)]:
        w = expected[name] = sparse(shape, "float16", kept)
        values, mask, offsets = bitmask_compress(w)
        tensors |= {f"{name}.shape": stored(np.array(shape), "int64"), f"{name}.compressed": stored(values, "float16"),
                    f"{name}.bitmask": stored(mask, "uint8")}
        # `ascontiguousarray` gives a scalar a dimension.
        tensors[f"{name}.row_offsets"] = {**stored(offsets, "int64"), "shape": list(np.shape(offsets))}
    sparsity = dict(format="sparse-bitmask", global_sparsity=0.5, sparsity_structure="unstructured")
    save("sparse-bitmask-0.5", dict(compression_config=dict(sparsity_config=sparsity)), tensors, expected)


def sparse_24_bitmask():
    tensors, expected = {}, {}
    plain(tensors, expected, ("lm_head.weight", (8, 16)))
    for module, shape in [("gate_proj", (5, 16)), ("down_proj", (3, 12))]:
        name = f"model.layers.0.mlp.{module}"
        w = random(shape)
        fours = w.reshape(-1, 4)
        np.put_along_axis(fours, np.argsort(np.abs(fours), axis=1)[:, :2], 0, axis=1)
        w[0, :4] = [0, 0, 0, 1.5]  # one of the two values is zero
        values, mask = sparse24_bitmask_compress(w)
        expected[f"{name}.weight"] = w
        tensors |= {f"{name}.shape": stored(np.array(shape).reshape(-1, 1), "int64"),
                    f"{name}.compressed": stored(values, "bfloat16"), f"{name}.bitmask": stored(mask, "uint8")}
    sparsity = dict(format="sparse-24-bitmask", global_sparsity=0.5, ignore=["lm_head"], sparsity_structure="2:4",
                    targets=["Linear"])
    config = dict(quantization_config=dict(quant_method="compressed-tensors", sparsity_config=sparsity))
    save("sparse-24-bitmask", config, tensors, expected)


def args(bits, group, symmetric, actorder=None):
    strategy = "channel" if group is None else "group"
    return dict(num_bits=bits, type="int", symmetric=symmetric, group_size=group, strategy=strategy, actorder=actorder,
                block_structure=None, dynamic=False, observer="minmax", observer_kwargs={})


def pack_quantized(folder, version, cases):
    """`cases`: module, shape, bits, group size, symmetric, type of zero points, whether columns have an order."""
    tensors, expected, groups = {}, {}, {}
    plain(tensors, expected, ("model.embed_tokens.weight", (8, 16)), ("lm_head.weight", (8, 16)))
    for module, (rows, cols), bits, size, symmetric, zero_type, ordered in cases:
        name = f"model.layers.0.{module}"
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        count = cols // size if size else 1
        q = RNG.integers(low, high, (rows, cols), endpoint=True)
        zeros = RNG.integers(low, high, (rows, count), endpoint=True) * (not symmetric)
        scale = bf16(0.01 + RNG.random((rows, count)))
        g_idx = np.arange(cols) // (size or cols)
        if ordered:
            RNG.shuffle(g_idx)
            tensors[f"{name}.weight_g_idx"] = stored(g_idx, "int32")
        expected[f"{name}.weight"] = ((q - zeros[:, g_idx]) * scale[:, g_idx]).astype(np.float32)
        tensors |= {f"{name}.weight_packed": stored(pack_to_int32(q, bits), "int32"),
                    f"{name}.weight_shape": stored(np.array([rows, cols]), "int64"),
                    f"{name}.weight_scale": stored(scale, "bfloat16")}
        if zero_type == "packed":
            tensors[f"{name}.weight_zero_point"] = stored(pack_to_int32(zeros, bits, packed_dim=0), "int32")
        elif zero_type == "int8":
            tensors[f"{name}.weight_zero_point"] = stored(zeros, "int8")
        weights = args(bits, size, symmetric, "group" if ordered else None)
        groups.setdefault(json.dumps(weights), []).append(f"re:.*{module}$")
    config = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed",
                  ignore=["lm_head"], kv_cache_scheme=None, global_compression_ratio=1.5, version=version,
                  config_groups={f"group_{i}": dict(weights=json.loads(weights), targets=targets, input_activations=None,
                                                    output_activations=None)
                                 for i, (weights, targets) in enumerate(groups.items())})
    save(folder, dict(quantization_config=config), tensors, expected)


sparse_bitmask()
sparse_bitmask_of_every_parameter()
sparse_24_bitmask()
pack_quantized("pack-quantized", "0.10.2", [
    ("self_attn.q_proj", (6, 24), 4, 8, True, None, False),
    ("self_attn.k_proj", (5, 19), 8, None, True, None, False),
    ("self_attn.v_proj", (8, 32), 4, 4, False, "packed", False),
    ("self_attn.o_proj", (3, 37), 2, None, False, "packed", False),
    ("mlp.up_proj", (16, 32), 4, 16, True, None, True),
    ("mlp.gate_proj", (8, 20), 8, 5, False, "packed", False),
])
pack_quantized("pack-quantized-0.8", "0.8.0", [
    ("mlp.down_proj", (7, 24), 4, 8, False, "int8", False),
    ("mlp.up_proj", (5, 24), 4, 8, False, "int8", True),
])

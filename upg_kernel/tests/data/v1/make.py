"""Writes the files of version 1 here, what they stand for, and pickles that have to be refused.

    python make.py NAME     the files NAME-*.upg, with the numpy and scipy that are installed (NAME: numpy1, numpy2)
    python make.py hostile  hostile.json, and alike.json: lists of numbers, each with the arrays that stand for the same

Made with numpy 1.26.4 and scipy 1.11.4, and with numpy 2.4.6 and scipy 1.17.1, on Python 3.11. rows.safetensors and
one.safetensors are what convert_pickle_to_safetensors.py makes of all the files with a scale for each row, and with one scale.
"""
import collections
import io
import json
import os
import pickle
import pickletools
import struct
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def tensors():
    """(name, shape, rows of {column: (value, prime index)}, scales)."""
    rare = [{}, {3: (5, 7), 300: (-128, 0), 699: (127, 9999)}, {}, {699: (1, 1)}, {0: (-3, 2), 255: (4, 3), 511: (9, 9000)}]
    full = [{c: ((r * 7 + c * 5) % 256 - 128, (r * 613 + c * 97) % 10_000) for c in range(6)} for r in range(4)]
    vector = [{c: (c - 3, c * 1000) for c in range(8)}]
    return [
        ("model.layers.0.mlp.down_proj.weight", (5, 700), rare, [0.5, 1e-3, 1.0, 2.0, -0.25]),
        ("model.layers.0.mlp.up_proj.weight", (4, 6), full, [1e-4, 2e-4, 3e-4, 0.1]),
        ("model.layers.1.mlp.up_proj.weight", (3, 4), [{}, {}, {}], [1.0, 1.0, 1.0]),
        ("model.norm.weight", (8,), vector, [0.01]),
    ]


PRIMES = [n for n in range(2, 104_730) if all(n % d for d in range(2, int(n**0.5) + 1))]


def model(form, numpy, sparse):
    """A model of version 1 as Python has it. `form` says how its arrays are kept."""
    listed = []
    for number, (name, shape, rows, scales) in enumerate(tensors()):
        entries = [(c, *row[c]) for row in rows for c in sorted(row)]
        columns, values, primes = ([e[i] for e in entries] for i in range(3))
        pointers = [sum(len(row) for row in rows[:r]) for r in range(len(rows) + 1)]
        tensor = {
            "name": name,
            "shape": shape if number % 2 else list(shape),
            "dtype": "bfloat16",
            "original_bytes": 2 * len(rows) * shape[-1],
            "compressed_bytes": 7 * len(values),
            "compression_method": "prime_sparse_v1",
            "sparsity_level": 0.5,
            "quantization": "int8",
            "manifold_encoded": True,
        }
        if form == "other-names":
            # What comes out of computations with numpy.
            tensor["sparsity_level"] = numpy.float64(0.5)
            tensor["original_bytes"] = numpy.int64(tensor["original_bytes"])
            tensor["manifold_encoded"] = numpy.bool_(True)
            tensor["dtype"] = numpy.dtype("float32")
            tensor["shape"] = tuple(numpy.int64(n) for n in shape)
        rows_scale = {
            "arrays": numpy.array(scales, numpy.float32),
            "other-names": numpy.array(scales, ">f8").reshape(-1, 1),
            "csr": numpy.array(scales),
            "unsorted": numpy.array(scales, numpy.float32),
        }
        rows_scale |= {
            "lists": [scales, [[s] for s in scales], tuple(int(s) for s in scales), [scales]][number],
            "numbers": list(numpy.array(scales, numpy.float32)),
        }
        one_scale = [0.125, numpy.float32(0.125), numpy.array([0.125], numpy.float16), numpy.array(0.125)][number]
        if form == "one-lists":
            one_scale = [[0.125], (0.125,), [[0.125]], [numpy.float16(0.125)]][number]
        scale = one_scale if form.startswith("one") else rows_scale[form]
        types = {"other-names": (">i2", numpy.uint64, ">i8", numpy.uint32)}.get(form, (numpy.int8, numpy.int32, numpy.int32, numpy.uint16))
        values, columns, pointers, primes = (numpy.array(a, t) for a, t in zip((values, columns, pointers, primes), types))
        if form == "unsorted":
            # The entries of each row from the last to the first, and one of value 0 in the first row that is not full.
            order = [i for r in range(len(rows)) for i in reversed(range(pointers[r], pointers[r + 1]))]
            values, columns, primes = values[order], columns[order], primes[order]
            at = int(pointers[1])
            values, primes = numpy.insert(values, at, 0), numpy.insert(primes, at, 5)
            free = next(c for c in range(shape[-1]) if c not in rows[0]) if len(rows[0]) < shape[-1] else None
            if free is None:
                values, primes = numpy.delete(values, at), numpy.delete(primes, at)
            else:
                columns = numpy.insert(columns, at, free)
                pointers[1:] += 1
        if form in ("lists", "one-lists"):
            kind = tuple if number % 2 else list
            values, columns, pointers, primes = (kind(a.tolist()) for a in (values, columns, pointers, primes))
        elif form == "numbers":
            values, columns, pointers, primes = (list(a) for a in (values, columns, pointers, primes))
        if form in ("csr", "one-csr") and len(shape) == 2:
            matrix = sparse.csr_matrix((values, columns, pointers), shape=shape)
            tensor |= {"data": matrix, "prime_indices": primes, "scales": scale}
        elif form == "other-names":
            tensor |= {"data": values, "col_indices": columns, "row_pointers": pointers, "prime_indices": primes, "scales": scale}
        else:
            tensor |= {"values": values, "indices": columns, "indptr": pointers, "prime_indices": primes, "scale": scale}
        listed.append(collections.OrderedDict(tensor) if number == 1 else tensor)
    return {
        "model_type": "phi-4-upg",
        "source": "microsoft/phi-4",
        "compression_method": "prime_sparse_v1",
        "target_compression": 10.0,
        "files": [
            {"filename": "model-00001-of-00002.safetensors", "tensors": listed[:2]},
            {"filename": "model-00002-of-00002.safetensors", "tensors": tuple(listed[2:])},
        ],
    }


def tiny_model(numpy):
    """All tensors of the model of model/config.json."""
    draw = numpy.random.default_rng(1)
    layer = "model.layers.0."
    attention, mlp = layer + "self_attn.", layer + "mlp."
    shapes = {
        "model.embed_tokens.weight": (32, 16),
        **{f"{attention}{name}_proj.weight": (16, 16) for name in "qkvo"},
        f"{mlp}gate_proj.weight": (32, 16),
        f"{mlp}up_proj.weight": (32, 16),
        f"{mlp}down_proj.weight": (16, 32),
        f"{layer}input_layernorm.weight": (16,),
        f"{layer}post_attention_layernorm.weight": (16,),
        "model.norm.weight": (16,),
    }
    listed = []
    for name, shape in shapes.items():
        values = draw.integers(-127, 128, shape).astype(numpy.int8).reshape(-1, shape[-1])
        if len(shape) == 1:
            values[:] = 100
        else:
            values[draw.random(values.shape) < 0.3] = 0
        kept = values != 0
        listed.append({
            "name": name,
            "shape": shape,
            "values": values[kept],
            "indices": numpy.nonzero(kept)[1].astype(numpy.int32),
            "indptr": numpy.concatenate([[0], numpy.cumsum(kept.sum(1))]).astype(numpy.int32),
            "prime_indices": draw.integers(2, 5, int(kept.sum())).astype(numpy.uint16),
            "scale": 0.001,
        })
    return {"model_type": "tiny-upg", "files": [{"filename": "model.safetensors", "tensors": listed}]}


def write(name, data):
    with open(os.path.join(HERE, name), "wb") as file:
        file.write(data)


def unframed(value):
    out = io.BytesIO()
    pickler = pickle._Pickler(out, 4)
    pickler.framer.start_framing = lambda: None
    pickler.dump(value)
    assert not any(opcode.name == "FRAME" for opcode, *_ in pickletools.genops(out.getvalue()))
    return out.getvalue()


def make_files(name):
    import numpy
    import scipy.sparse as sparse

    for protocol in (2, 3, 4, 5):
        for form in ("arrays", "other-names", "csr", "one", "one-csr", "lists", "numbers", "one-lists"):
            write(f"{name}-p{protocol}-{form}.upg", pickle.dumps(model(form, numpy, sparse), protocol))
    write(f"{name}-p5-unsorted.upg", pickle.dumps(model("unsorted", numpy, sparse), 5))
    # Without the places in the memo that nothing asks for, and without frames.
    write(f"{name}-p4-optimized.upg", pickletools.optimize(pickle.dumps(model("arrays", numpy, sparse), 4)))
    write(f"{name}-p4-unframed.upg", unframed(model("arrays", numpy, sparse)))
    buffers = []
    data = pickle.dumps(model("arrays", numpy, sparse), 5, buffer_callback=buffers.append)
    write(f"{name}-p5-out-of-band.upg", data)
    for number, buffer in enumerate(buffers):
        write(f"{name}-p5-out-of-band.{number:02}.buffer", bytes(buffer.raw()))
    if name == "numpy2":
        catalogue = model("arrays", numpy, sparse)
        parts = ("values", "indices", "indptr", "prime_indices", "scale")
        for file in catalogue["files"]:
            file["tensors"] = [{k: v for k, v in t.items() if k not in parts} for t in file["tensors"]]
        write("catalogue.upg", pickle.dumps(catalogue, 5))
        write("model/tiny.upg", pickle.dumps(tiny_model(numpy), 5))
        # An independent account of the weights, in double precision.
        dense = {}
        for tensor, shape, rows, scales in tensors():
            for kind in ("rows", "one"):
                out = numpy.zeros((len(rows), shape[-1]))
                for r, row in enumerate(rows):
                    for c, (value, prime) in row.items():
                        scale = scales[r] if kind == "rows" else 0.125
                        out[r, c] = scale * PRIMES[prime] * value
                dense[f"{kind}/{tensor}"] = out.reshape(shape)
        from safetensors.numpy import save_file

        save_file(dense, os.path.join(HERE, "expected.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile ones: parts of bytes, each with how often it comes, and what the error has to say.
# ---------------------------------------------------------------------------------------------------------------------


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(module, name, argument):
    """GLOBAL, then REDUCE with one text."""
    return f"c{module}\n{name}\n".encode() + b"(" + text(argument) + b"tR"


def stack_call(module, name, argument):
    return text(module) + text(name) + b"\x93(" + text(argument) + b"tR"


def dtype(code, state=b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"):
    return b"cnumpy\ndtype\n(" + text(code) + b"\x89\x88tR" + state


def array(code, shape, data, count=None):
    """An array as protocol 4 has it; `data` comes `count` times. Parts."""
    size = len(data) * (1 if count is None else count)
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01("
    start += b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape) + b"t" + dtype(code) + b"\x89\x8e" + struct.pack("<Q", size)
    return [(start, 1), (data, 1 if count is None else count), (b"tb", 1)]


def tensor_file(items):
    """A file of one tensor with these items: (key, parts)."""
    start = b"\x80\x04}" + text("files") + b"]}" + text("tensors") + b"]}" + text("name") + text("a.weight") + b"s"
    parts = [(start, 1)]
    for key, value in items:
        parts += [(text(key), 1), *value, (b"s", 1)]
    return [*parts, (b"asas.", 1)]


def sparse_file(shape=(1, 4), values=None, indices=None, indptr=None, primes=None, scale=None, more=()):
    """A file of one matrix, with some of its parts other than they should be."""
    plain = b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in shape) + b"t"
    return tensor_file([
        ("shape", [(plain, 1)]),
        ("values", values or array("i1", [2], b"\x01\x02")),
        ("indices", indices or array("i4", [2], struct.pack("<2i", 0, 3))),
        ("indptr", indptr or array("i4", [2], struct.pack("<2i", 0, 2))),
        ("prime_indices", primes or array("u2", [2], struct.pack("<2H", 0, 1))),
        ("scale", scale or [(b"G" + struct.pack(">d", 1.0), 1)]),
        *more,
    ])


def whole(body):
    return [(b"\x80\x04" + body + b".", 1)]


def hostile():
    touch = "touch upg-v1-canary"
    code = "__import__('os').system('touch upg-v1-canary')"
    exec_cases = [
        ("os.system", call("os", "system", touch)),
        ("posix.system", call("posix", "system", touch)),
        ("nt.system", call("nt", "system", touch)),
        ("subprocess.getoutput", call("subprocess", "getoutput", touch)),
        ("subprocess.Popen", call("subprocess", "Popen", touch)),
        ("builtins.eval", call("builtins", "eval", code)),
        ("builtins.exec", call("builtins", "exec", code)),
        ("__builtin__.eval", call("__builtin__", "eval", code)),
        ("builtins.getattr", call("builtins", "getattr", "x")),
        ("builtins.__import__", call("builtins", "__import__", "os")),
        ("importlib.import_module", call("importlib", "import_module", "os")),
        ("runpy.run_path", call("runpy", "run_path", "x.py")),
        ("numpy.load", call("numpy", "load", "x.npy")),
        ("numpy.lib.npyio.load", call("numpy.lib.npyio", "load", "x.npy")),
        ("numpy.testing._private.utils.runstring", call("numpy.testing._private.utils", "runstring", code)),
        ("numpy.core.multiarray.fromfile", call("numpy.core.multiarray", "fromfile", "/etc/passwd")),
        ("numpy.f2py.os.system", call("numpy.f2py", "os.system", touch)),
        ("numpy.core.multiarray._reconstruct", call("numpy", "core.multiarray._reconstruct", "x")),
        ("scipy.sparse._csr.csr_matrix.__init__", call("scipy.sparse._csr", "csr_matrix.__init__", "x")),
        ("collections.defaultdict", call("collections", "defaultdict", "x")),
        ("functools.partial", call("functools", "partial", "x")),
        ("operator.attrgetter", call("operator", "attrgetter", "x")),
        ("pickle.loads", call("pickle", "loads", "x")),
        ("codecs.encode", call("codecs", "encode", "x")),
        ("os.system", stack_call("os", "system", touch)),
        ("builtins.eval", stack_call("builtins", "eval", code)),
        ("numpy.core.multiarray.os.system", stack_call("numpy.core.multiarray", "os.system", touch)),
    ]
    for number, (name, body) in enumerate(exec_cases):
        yield f"global {number}: {name}", whole(body), f"the global '{name}'"
    yield "a global deep in a model", tensor_file([("name2", [(call("os", "system", touch), 1)])]), "the global 'os.system'"
    yield "a global in the state of a dtype", whole(b"cnumpy\ndtype\n(" + text("i1") + b"\x89\x88tR" + call("os", "system", touch) + b"b"), "os.system"
    # Opcodes that no such file has.
    for name, body in [
        ("INST", b"(" + text(touch) + b"ios\nsystem\n"),
        ("OBJ", b"(N" + text(touch) + b"o"),
        ("NEWOBJ_EX", b"cnumpy\nndarray\n)}\x92"),
        ("PERSID", b"Pone\n"),
        ("BINPERSID", b"K\x01Q"),
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\x00"),
        ("EXT4", b"\x84\x01\x00\x00\x00"),
        ("DUP", b"N2"),
        ("POP", b"NN0"),
        ("LONG4", b"\x8b\xff\xff\xff\x7f"),
        ("STRING", b"S'x'\n"),
        ("BINSTRING", b"T\x01\x00\x00\x00x"),
        ("EMPTY_SET", b"\x8f"),
        ("FROZENSET", b"(\x91"),
        ("LONG", b"L" + b"9" * 100 + b"L\n"),
        ("PROTO", b"\x80\x04N"),
    ]:
        yield f"opcode {name}", whole(body), f"opcode {name},"
    yield "opcode 0xFF", whole(b"\xff"), "0xFF is no pickle opcode"
    # Arrays that are none.
    yield "an array of objects", whole(dtype("O8")), "dtype 'O8'"
    yield "an array of structures", whole(dtype("V8")), "dtype 'V8'"
    yield "an array of texts", whole(dtype("S1000")), "dtype 'S1000'"
    fields = b"(K\x03" + text("<") + b"N(" + text("f") + b"t}JJ\x00\x00\x00J\xff\xff\xff\xffK\x00tb"
    yield "a dtype with fields", whole(dtype("i4", fields)), "as the state of the dtype int32"
    yield "an array with a list as its bytes", whole(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01K\x01\x85" + dtype("i4") + b"\x89]tb"), "as the state of an array without numbers"
    yield "an array of another class", whole(b"cnumpy.core.multiarray\n_reconstruct\n(ccollections\nOrderedDict\nK\x00\x85C\x01btR"), "a call of 'numpy.core.multiarray._reconstruct'"
    yield "an array that is built twice", [(b"\x80\x04", 1), *array("i1", [1], b"x"), (b"Nb.", 1)], "None as the state of an array of int8 [1]"
    yield "a buffer that is no bytes", whole(b"cnumpy.core.numeric\n_frombuffer\n(]" + dtype("i4") + b"K\x01\x85" + text("C") + b"tR"), "a call of 'numpy.core.numeric._frombuffer'"
    yield "bytes of a length", whole(b"cbuiltins\nbytes\n\x8a\x08" + struct.pack("<q", 1 << 40) + b"\x85R"), "a call of"
    yield "another codec", whole(b"c_codecs\nencode\n(" + text("x") + text("rot13") + b"tR"), "a call of '_codecs.encode'"
    yield "a csr_matrix of nothing", whole(b"cscipy.sparse._csr\ncsr_matrix\n)\x81}b"), "as the state of a csr_matrix without its parts"
    yield "a csr_matrix that is called", whole(b"cscipy.sparse._csr\ncsr_matrix\n)R"), "a call of 'scipy.sparse."
    yield "a dict that is built", whole(b"}}b"), "a dict of [] as the state of a dict of []"
    yield "an OrderedDict of something", whole(b"ccollections\nOrderedDict\n]\x85R"), "a call of 'collections.OrderedDict'"
    yield "a shape of 2^62", [(b"\x80\x04", 1), *array("i4", [1 << 62], b"x"), (b".", 1)], "has 1 bytes"
    yield "a shape that overflows", [(b"\x80\x04", 1), *array("i8", [1 << 40, 1 << 40], b"x"), (b".", 1)], "has 1 bytes"
    yield "a negative shape", [(b"\x80\x04", 1), *array("i8", [-1], b"x"), (b".", 1)], "as the state of an array"
    # Lengths.
    for name, opcode, form in [("BINBYTES8", b"\x8e", "<Q"), ("BYTEARRAY8", b"\x96", "<Q"), ("BINUNICODE8", b"\x8d", "<Q"), ("BINBYTES", b"B", "<I"), ("BINUNICODE", b"X", "<I"), ("FRAME", b"\x95", "<Q")]:
        huge = 0xFFFFFFFF if form == "<I" else (1 << 64) - 1
        yield f"{name} of {huge} bytes", whole(opcode + struct.pack(form, huge)), "cut short"
    yield "a number of 255 bytes", whole(b"\x8a\xff" + b"\x01" * 255), "a number of 255 bytes"
    yield "a name without an end", [(b"\x80\x04c", 1), (b"a", 100_000)], "the name of a global is too long"
    # Lists, dicts, keys and arrays that are in a file once and in it a thousand times.
    shared = b"}" + text("name") + text("a") + b"s" + text("shape") + b"K\x01\x85s\x94"
    tensors = b"}" + text("tensors") + b"](" + shared + b"h\x00" * 3000 + b"es\x94"
    yield "a tensor a thousand times", whole(b"}" + text("files") + b"](" + tensors + b"h\x01" * 3000 + b"es"), "tensor 'a': listed twice"
    yield "a long note", sparse_file(more=[("dtype", [(text("a" * 300), 1)])]), "expected a number, a short text"
    yield "a key in half a million dicts", [(b"\x80\x04" + text("k" * 4000) + b"\x94N\x94", 1), (b"}h\x00h\x01s", 500_000), (b".", 1)], "more than one object"
    yield "an array of 64 dimensions", [(b"\x80\x04", 1), *array("i1", [1] * 64, b"x"), (b".", 1)], "as the state of an array"
    far = [
        ("shape", [(b"(\x8a\x08" + struct.pack("<q", 1 << 12) + b"\x8a\x08" + struct.pack("<q", 1 << 20) + b"t", 1)]),
        ("values", array("i1", [1 << 12], b"\x01", 1 << 12)),
        ("indices", array("i4", [1 << 12], struct.pack("<i", (1 << 20) - 1), 1 << 12)),
        ("indptr", array("i4", [(1 << 12) + 1], b"".join(struct.pack("<i", n) for n in range((1 << 12) + 1)))),
        ("prime_indices", array("u2", [1 << 12], bytes(2), 1 << 12)),
        ("scale", [(b"K\x01", 1)]),
    ]
    parts = [(b"\x80\x04}" + text("files") + b"]}" + text("tensors") + b"](", 1)]
    for number in range(3):
        parts.append((b"}" + text("name") + text(f"{number}") + b"s", 1))
        for place, (key, value) in enumerate(far):
            # Put into the memo by the first, and taken from it by the others.
            taken = [(b"h" + bytes([place]), 1)] if number else [*value, (b"q" + bytes([place]), 1)]
            parts += [(text(key), 1), *taken, (b"s", 1)]
    yield "gaps that become gigabytes", [*parts, (b"esas.", 1)], "with those that bridge gaps"
    yield "a buffer that is not there", [(b"\x80\x05\x97.", 1)], "out-of-band buffers"
    yield "text that is no UTF-8", whole(b"X\x03\x00\x00\x00\xed\xa0\x80"), "a text that is not UTF-8"
    # Much of something.
    yield "many objects", [(b"\x80\x04", 1), (b"N", 600_000), (b".", 1)], "more than 524288 objects"
    yield "many opcodes", [(b"\x80\x04N", 1), (b"q\x00", 2_200_000), (b".", 1)], "more than 2097152 opcodes"
    yield "a full memo", [(b"\x80\x04N", 1), (b"\x94", 600_000), (b".", 1)], "more than 524288 places in the memo"
    yield "the last place of the memo", whole(b"Nr\xff\xff\xff\xffj\xfe\xff\xff\xff"), "nothing in the memo at 4294967294"
    yield "nested half a million times", [(b"\x80\x04N", 1), (b"\x85", 500_000), (b".", 1)], "the file is a tuple of 1"
    yield "many marks", [(b"\x80\x04", 1), (b"(", 2_000_000), (b".", 1)], "takes more from the stack"
    laughs = b"]\x94" + b"".join(b"](" + b"h" + bytes([n]) + (b"h" + bytes([n])) * 9 + b"e\x94" for n in range(60))
    yield "a list of lists of lists", whole(b"}" + text("files") + laughs.replace(b"]\x94", b"]\x94", 1) + b"\x85s"), ""
    yield "a list that holds itself", whole(b"}" + text("files") + b"]\x94h\x00as"), "an entry of 'files' is a list of 1"
    yield "a dict that holds itself", whole(b"}\x94" + text("files") + b"h\x00s"), "'files' is a dict of [files]"
    yield "long texts", [(b"\x80\x04", 1), (b"X\x00\x10\x00\x00" + b"a" * 4096, 17_000), (b".", 1)], "texts of more than 67108864 bytes"
    # A stack that does not work out.
    yield "nothing", [(b"", 1)], "pickle"
    yield "an end without an object", whole(b""), "takes more from the stack"
    yield "two objects", whole(b"NN"), "more than one object"
    yield "more after the end", [(b"\x80\x04N.N.", 1)], "2 bytes after the end"
    yield "a mark that is not there", whole(b"t"), "takes more from the stack"
    yield "below a mark", whole(b"N(\x85"), "takes more from the stack"
    yield "a list that is none", whole(b"NNa"), "a list is to grow, but there is None"
    yield "a dict that is none", whole(b"N" + text("a") + b"Ns"), "a dict is to grow, but there is None"
    yield "a key that is no text", whole(b"}K\x01Ns"), "the number 1 as the key of a dict"
    yield "a key twice", whole(b"}" + text("a") + b"Ns" + text("a") + b"Ns"), "as a key twice"
    yield "a key without a value", whole(b"}(" + text("a") + b"u"), "a key without a value"
    yield "a call of a number", whole(b"K\x01)R"), "a call of the number 1"
    yield "protocol 6", [(b"\x80\x06N.", 1)], "protocol 2 to 5"
    yield "protocol 0", [(b"(lp0\n.", 1)], "pickle"
    yield "an old PyTorch checkpoint", [(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", 1)], "a PyTorch checkpoint"
    # A pickle, but not of a model.
    yield "no model", whole(b"}" + text("weights") + b"]s"), "has 'weights' (a list of 0), which version 1 does not have"
    yield "no files", whole(b"}"), "no 'files' in the file"
    yield "an unknown part", sparse_file(more=[("zero_point", array("i1", [1], b"x"))]), "has 'zero_point' (an array of int8 [1])"
    yield "a part twice", sparse_file(more=[("data", array("i1", [2], b"xx"))]), "both 'values' and 'data'"
    yield "another method", sparse_file(more=[("compression_method", [(text("prime_v9"), 1)])]), "the method 'prime_v9'"
    # Arrays that do not fit.
    yield "a column too many", sparse_file(indices=array("i4", [2], struct.pack("<2i", 0, 4))), "a column of 4"
    yield "a negative column", sparse_file(indices=array("i4", [2], struct.pack("<2i", -1, 3))), "a column of -1"
    yield "a column of 2^63", sparse_file(indices=array("u8", [2], struct.pack("<2Q", 0, 1 << 63))), "a column of 9223372036854775"
    yield "a column twice", sparse_file(indices=array("i4", [2], struct.pack("<2i", 3, 3))), "two entries in column 3"
    yield "a large value", sparse_file(values=array("i2", [2], struct.pack("<2h", 1, 128))), "a value of 128"
    yield "values that are floats", sparse_file(values=array("f4", [2], struct.pack("<2f", 1, 2))), "'values' is an array of float32 [2], expected integers"
    yield "a large prime index", sparse_file(primes=array("u2", [2], struct.pack("<2H", 0, 10_000))), "a prime index of 10000"
    yield "descending pointers", sparse_file(shape=(2, 4), indptr=array("i4", [3], struct.pack("<3i", 0, 2, 1))), "row 1 has the entries 2 to 1"
    yield "pointers beyond the entries", sparse_file(indptr=array("i4", [2], struct.pack("<2i", 0, 3))), "3"
    yield "pointers that begin late", sparse_file(indptr=array("i4", [2], struct.pack("<2i", 1, 2))), "the row pointers start with 1"
    yield "pointers that end early", sparse_file(indptr=array("i4", [2], struct.pack("<2i", 0, 1))), "the row pointers end with 1"
    yield "too few pointers", sparse_file(indptr=array("i4", [1], struct.pack("<i", 0))), "1 row pointers for 1 rows"
    yield "too few primes", sparse_file(primes=array("u2", [1], struct.pack("<H", 0))), "1 prime_indices for 2 values"
    yield "a scale that is no number", sparse_file(scale=[(b"G" + struct.pack(">d", float("nan")), 1)]), "the scale of row 0 is"
    yield "an infinite scale", sparse_file(scale=[(b"G" + struct.pack(">d", 1e300), 1)]), "the scale of row 0 is inf"
    yield "too many scales", sparse_file(scale=array("f4", [2], bytes(8))), "the scales are an array of float32 [2], for 1 rows"
    # Lists that fit no better.
    for name, items, says in [
        ("floats", [1, 2.0], "with floats in it, expected integers"),
        ("many floats", [1] * 20 + [2.0] * 20, "'values' is a list of 40 with floats in it, expected integers"),
        ("truth values", [1, True], "with the truth value true in it, expected numbers"),
        ("many truth values", [True] * 20, "with 20 numbers and truth values in it, expected numbers"),
        ("None", [1, None], "with None in it, expected numbers"),
        ("texts", ["1", "2"], "with the text '1' in it, expected numbers"),
        ("bytes", [b"12", 1], "with 2 bytes in it, expected numbers"),
        ("dicts", [1, {}], "with a dict of [] in it, expected numbers"),
        ("lists", [[1], [2]], "with lists in it, expected one dimension"),
        ("one list", [[1, 2]], "with lists in it, expected one dimension"),
        ("lists and numbers", [[1], 2], "with the number 2 in it, expected numbers"),
        ("numbers and a tuple", [*range(20), (20,)], "in it, expected numbers"),
        ("large values", [1, 128], "a value of 128"),
        ("many large values", [200] * 20, "2 indices for 20 values"),
        ("three values", [1, 2, 3], "2 indices for 3 values"),
    ]:
        yield f"values in a list: {name}", sparse_file(values=plain(items)), says
    yield "an array in a list", sparse_file(values=[(b"](", 1), *array("i1", [1], b"x"), (b"e", 1)]), "with an array of int8 [1] in it, expected numbers"
    yield "an empty list of columns", sparse_file(indices=plain([])), "0 indices for 2 values"
    yield "a column of a list too many", sparse_file(indices=plain([0, 4])), "a column of 4"
    yield "a negative column of a list", sparse_file(indices=plain((-1, 3))), "a column of -1"
    yield "a column of 2^63 - 1 in a list", sparse_file(indices=plain([0, (1 << 63) - 1])), "a column of 9223372036854775807"
    yield "a column of 2^63 in a list", sparse_file(indices=plain([0, 1 << 63])), "a number of 9 bytes"
    yield "a column of 2^63 in a long list", sparse_file(indices=plain([0] * 20 + [1 << 63])), "a number of 9 bytes"
    yield "a column of 2^4000 in a list", sparse_file(indices=plain([0, 1 << 4000])), "opcode LONG4,"
    yield "a column twice in a list", sparse_file(indices=plain([3, 3])), "two entries in column 3"
    yield "a large prime index in a list", sparse_file(primes=plain([0, 10_000])), "a prime index of 10000"
    yield "descending pointers in a list", sparse_file(shape=(2, 4), indptr=plain([0, 2, 1])), "row 1 has the entries 2 to 1"
    yield "too few pointers in a list", sparse_file(indptr=plain([0])), "1 row pointers for 1 rows"
    yield "no number as a scale in a list", sparse_file(scale=plain([float("nan")])), "the scale of row 0 is"
    yield "an infinite scale in a list", sparse_file(scale=plain([1e300])), "the scale of row 0 is inf"
    yield "a truth value as a scale in a list", sparse_file(scale=plain([True])), "'scale' is a list of 1 with the truth value true in it"
    yield "an array of truth values as scales", sparse_file(scale=array("b1", [1], b"\x01")), "an array of bool [1], expected numbers"
    yield "too many scales in a list", sparse_file(scale=plain([1.0, 2.0])), "the scales are a list of 2, for 1 rows"
    yield "a table of scales", sparse_file(shape=(4, 4), indptr=plain([0, 2, 2, 2, 2]), scale=plain([[1.0, 2.0], [3.0, 4.0]])), "with a list of 2 in it, expected numbers"
    yield "scales in three lists", sparse_file(scale=plain([[[1.0]]])), "with a list of 1 in it, expected numbers"
    yield "no scales", sparse_file(scale=plain([])), "the scales are a list of 0, for 1 rows"
    yield "scales of lists of nothing", sparse_file(scale=plain([[], []])), "with a list of 0 in it, expected numbers"
    yield "a long list that is cut short", [(b"\x80\x04](", 1), (b"K\x01", 100), (b"K", 1)], "cut short"
    yield "a long list without an end", [(b"\x80\x04](", 1), (b"K\x01", 100), (b".", 1)], "more than one object"
    yield "a long list in no list", [(b"\x80\x04N(", 1), (b"K\x01", 100), (b"e.", 1)], "a list is to grow, but there is None"
    yield "a shape of many numbers", sparse_file(more=[("dtype", plain(list(range(100))))]), "'dtype' is a list of 100, expected"
    yield "a million numbers as files", [(b"\x80\x04}" + text("files") + b"](", 1), (b"K\x01", 1_000_000), (b"es.", 1)], "an entry of 'files' is 1000000 integers"
    yield "half a million lists", [(b"\x80\x04", 1), (b"(K\x01", 600_000), (b".", 1)], "more than 524288 objects"
    parts = [(b"\x80\x04}" + text("files") + b"]}" + text("tensors") + b"](", 1)]
    rows = 1 << 22
    empty = [
        ("shape", [(b"(\x8a\x08" + struct.pack("<q", rows) + b"K\x04t", 1)]),
        ("values", array("i1", [0], b"")),
        ("indices", array("i1", [0], b"")),
        ("indptr", array("i1", [rows + 1], b"\x00", rows + 1)),
        ("prime_indices", array("i1", [0], b"")),
        ("scale", [(b"K\x01", 1)]),
    ]
    for number in range(30):
        parts.append((b"}" + text("name") + text(f"{number}") + b"s", 1))
        for place, (key, value) in enumerate(empty):
            taken = [(b"h" + bytes([place]), 1)] if number else [*value, (b"q" + bytes([place]), 1)]
            parts += [(text(key), 1), *taken, (b"s", 1)]
    yield "rows that become gigabytes", [*parts, (b"esas.", 1)], "rows and entries together, for a file of this size"
    yield "a matrix of no rows", sparse_file(shape=(0, 4)), "outside the limits"
    yield "a matrix of 2^40 rows", sparse_file(shape=(1 << 40, 4)), "outside the limits"
    yield "three dimensions", sparse_file(shape=(1, 2, 2)), "expected one or two dimensions"


def plain(value):
    """What Python makes of a value, as parts of a larger pickle."""
    return [(unframed(value)[2:-1], 1)]


def alike():
    """(name, file with lists, file with arrays): the same numbers."""
    count = 1200
    values, primes = [n % 256 - 128 for n in range(count)], [n * 7 % 10_000 for n in range(count)]
    shape, columns, pointers, scales = (3, 400), list(range(400)) * 3, [0, 400, 800, 1200], [1.5, 2, -0.25]
    of_arrays = {
        "values": array("i1", [count], struct.pack(f"<{count}b", *values)),
        "indices": array("i2", [count], struct.pack(f"<{count}h", *columns)),
        "indptr": array("u8", [4], struct.pack("<4Q", *pointers)),
        "primes": array("u2", [count], struct.pack(f"<{count}H", *primes)),
        "scale": array("f8", [3], struct.pack("<3d", *scales)),
    }
    of_lists = {"values": values, "indices": columns, "indptr": pointers, "primes": primes, "scale": scales}
    for kind in (list, tuple):
        found = sparse_file(shape=shape, **{key: plain(kind(numbers)) for key, numbers in of_lists.items()})
        yield f"{count} numbers in a {kind.__name__}", found, sparse_file(shape=shape, **of_arrays)

    def with_scales(scale, count):
        indptr = array("i4", [count + 1], struct.pack(f"<{count + 1}i", 0, *[2] * count))
        return sparse_file(shape=(count, 4), indptr=indptr, scale=scale)

    whole = [(1 << 40) + 1, -3, (1 << 24) + 1, (1 << 62) + (1 << 38) + 1, 0, (1 << 53) + (1 << 29) + 1]
    yield "whole scales", with_scales(plain(whole), 6), with_scales(array("i8", [6], struct.pack("<6q", *whole)), 6)
    fine = [0.1, 1e-46, 1e-40, -0.0, 1.8e19, 1 + 2**-24, 1 + 3 * 2**-24, 2**-149, 2**-150 * 1.5]
    yield "scales to round", with_scales(plain(fine), 9), with_scales(array("f8", [9], struct.pack("<9d", *fine)), 9)
    many = [n / 7 for n in range(20)]
    row = struct.pack("<20d", *many)
    yield "scales in a row", with_scales(plain([many]), 20), with_scales(array("f8", [1, 20], row), 20)
    yield "scales in a column", with_scales(plain([[s] for s in many]), 20), with_scales(array("f8", [20, 1], row), 20)
    yield "scales in tuples", with_scales(plain(tuple((s,) for s in many)), 20), with_scales(array("f8", [20], row), 20)
    yield "one scale in lists", with_scales(plain([[0.5]]), 20), with_scales(array("f8", [1], struct.pack("<d", 0.5)), 20)
    none = array("i4", [0], b"")
    zeros = array("i4", [2], bytes(8))
    nothing = {key: plain(value) for key, value in {"values": [], "indices": (), "primes": [], "indptr": [0, 0]}.items()}
    yield "lists of nothing", sparse_file(**nothing), sparse_file(values=none, indices=none, primes=none, indptr=zeros)
    twenty = [(f"{key} {name}", key, body) for key in ("values", "primes") for name, body in (
        ("from the memo", b"](K\x01q\x07" + b"h\x07" * 19 + b"e"),
        ("one by one", b"]" + b"K\x01a" * 20),
        ("in two parts", b"](" + b"K\x01" * 18 + b"e(K\x01M\x01\x00e"),
        ("of every size", b"](" + b"K\x01M\x01\x00J\x01\x00\x00\x00\x8a\x01\x01\x8a\x08\x01" + bytes(7) + b"K\x01" * 15 + b"e"),
    )]
    for name, key, body in twenty:
        numbers = {
            "values": array("i1", [20], b"\x01", 20),
            "indices": array("i1", [20], bytes(range(20))),
            "indptr": array("i1", [2], b"\x00\x14"),
            "primes": array("i1", [20], b"\x01", 20),
        }
        yield name, sparse_file(shape=(1, 20), **(numbers | {key: [(body, 1)]})), sparse_file(shape=(1, 20), **numbers)
    shared = plain([0, 3])
    both = {"indices": [*shared, (b"q\x07", 1)], "primes": [(b"h\x07", 1)]}
    prime_array = array("i1", [2], b"\x00\x03")
    # The columns come before the prime indices.
    yield "one list as two parts", sparse_file(**both), sparse_file(indices=prime_array, primes=prime_array)


def make_json(name, cases):
    def shown(value):
        return [[part.hex(), count] for part, count in value if part] if type(value) is list else value

    lines = ",\n".join(json.dumps({key: shown(value) for key, value in case.items()}) for case in cases)
    write(name, f"[\n{lines}\n]\n".encode())
    print(lines.count("\n") + 1, "cases in", name)


def make_hostile():
    make_json("hostile.json", ({"name": name, "parts": parts, "says": says} for name, parts, says in hostile()))
    make_json("alike.json", ({"name": name, "lists": lists, "arrays": arrays} for name, lists, arrays in alike()))


if __name__ == "__main__":
    make_hostile() if sys.argv[1] == "hostile" else make_files(sys.argv[1])

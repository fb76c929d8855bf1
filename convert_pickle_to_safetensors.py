#!/usr/bin/env python3
"""Converts a UPG file of version 1 (a Python pickle) to version 2, without executing the pickle.

    python3 convert_pickle_to_safetensors.py OLD.upg NEW.safetensors [--model DIR] [--buffers FILE ...]

Needs numpy. `upg convert` produces the same bytes without Python; docs/migrating-from-v1.md has the schema.

A pickle is a program: Python's own `pickle` would run it, with all that it imports. The parser here knows
the opcodes and globals that such a file needs and interprets a call as the description of an array. It
refuses the file at the first other opcode or global. Nothing is imported or called by name. Arrays stay in
the file until they are converted, a part at a time.
"""
import argparse
import codecs
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import struct
import sys

import numpy as np

# Limits of a pickle, so that a hostile one costs neither memory nor time.
MOST_OBJECTS = 1 << 19
MOST_OPCODES = 1 << 21
LONGEST_TEXT = 1 << 12
MOST_TEXT = 1 << 26
LONGEST_NAME = 256
LONGEST_NOTE = 256
MOST_DIMENSIONS = 4
# Least run of numbers that stays in the file. A shape, or the state of a dtype, has fewer.
SHORTEST_RUN = 16
MOST_OF_A_STATE = 64

# Limits of the UPG format, version 2.
MOST_ROWS, MOST_COLS, LARGEST_MATRIX, MOST_LAYERS = 1 << 24, 1 << 20, 1 << 32, 100_000
LARGEST_HEADER = 100_000_000 - 64
PRIME_COUNT = 10_000
LARGEST_SCALE = np.float32(2.0**64)
LARGEST_DELTA = 255
ALIGNMENT = 64
FIGURE_DIGITS = 24
# Most entries, padding included: for each byte that is read, and in addition.
MOST_ENTRIES = (16, 1 << 25)
# Entries and rows that are converted at once.
CHUNK = 1 << 18

METHOD = "prime_sparse_v1"
TOP_KEYS = ("model_type", "source", "compression_method", "target_compression", "files")
FILE_KEYS = ("filename", "tensors")
TENSOR_KEYS = (
    "name", "shape", "dtype", "original_bytes", "compressed_bytes", "compression_method", "sparsity_level",
    "quantization", "manifold_encoded",
)
VALUES, INDICES, POINTERS = ("values", "data"), ("indices", "col_indices"), ("indptr", "row_pointers")
PRIMES, SCALES = ("prime_indices",), ("scale", "scales")
PARTS = (VALUES, INDICES, POINTERS, PRIMES, SCALES)
MAX_TEXT_FILE, MAX_TOKENIZER = 16 << 20, 256 << 20


class ConversionError(Exception):
    """The reason why a file is not converted: what was found, where, and how to fix it."""


# ---------------------------------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------------------------------


class Global:
    """An allowed global, by its meaning here."""

    def __init__(self, kind, name):
        self.kind, self.name = kind, name


# (module, name), exactly; no other is known, whatever Python could import.
ALLOWED = {
    ("collections", "OrderedDict"): "OrderedDict",
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
    ("_codecs", "encode"): "encode",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "_reconstruct",
    ("numpy.core.numeric", "_frombuffer"): "_frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "_frombuffer",
    ("numpy.core.multiarray", "scalar"): "scalar",
    ("numpy._core.multiarray", "scalar"): "scalar",
    ("scipy.sparse.csr", "csr_matrix"): "csr_matrix",
    ("scipy.sparse._csr", "csr_matrix"): "csr_matrix",
    ("scipy.sparse._csr", "csr_array"): "csr_matrix",
}
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# Opcodes of numbers and the length of their operands; LONG1 has its length in a byte.
FORMS = {ord("K"): struct.Struct("<B"), ord("M"): struct.Struct("<H"), ord("J"): struct.Struct("<i"), ord("G"): struct.Struct(">d")}
TRUTHS = {0x88: True, 0x89: False}
LONG1 = 0x8A
LONGEST_NUMBER = 10
TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"


class Text(str):
    """A text, and its position."""

    __slots__ = ("place",)


class LongText:
    """A text that is not read, because it can only represent bytes."""

    def __init__(self, place):
        self.place = place


class Bytes:
    """Bytes that stay in their file; in protocol 2 a byte is a character up to U+00FF there."""

    __slots__ = ("file", "start", "length", "latin1")

    def __init__(self, file, start, length, latin1=False):
        self.file, self.start, self.length, self.latin1 = file, start, length, latin1


class Array:
    """A numpy array whose numbers are still in their file; without a dtype it is not built yet."""

    def __init__(self, dtype=None, shape=(), data=None):
        self.dtype, self.shape, self.data = dtype, tuple(shape), data

    def __len__(self):
        length = 1
        for n in self.shape:
            length *= n
        return length

    def set(self, dtype, shape, fortran, data):
        self.dtype, self.shape, self.data = dtype, tuple(shape), data
        asked = len_of(shape) * dtype.itemsize
        fits = asked <= data.length <= 2 * asked if data.latin1 else asked == data.length
        if not fits:
            raise ConversionError(f"{describe(self)} has {data.length} bytes")
        if fortran and sum(n != 1 for n in shape) > 1:
            raise ConversionError(f"{describe(self)} in the order of Fortran")
        return self


def numbers_from(file, start):
    """Yields (number, end) of the opcodes from byte `start` on, up to the first without a number."""
    block, at, size = b"", 0, 1 << 9
    while True:
        if len(block) - at < LONGEST_NUMBER:
            file.seek(start + len(block))
            start, block, at, size = start + at, block[at:] + file.read(size), 0, 1 << 16
        left = len(block) - at
        opcode = block[at] if left else None
        if opcode in FORMS and left > FORMS[opcode].size:
            (number,) = FORMS[opcode].unpack_from(block, at + 1)
            at += 1 + FORMS[opcode].size
        elif opcode in TRUTHS:
            number, at = TRUTHS[opcode], at + 1
        elif opcode == LONG1 and left > 1 and block[at + 1] <= 8 and left >= 2 + block[at + 1]:
            begin, at = at + 2, at + 2 + block[at + 1]
            number = int.from_bytes(block[begin:at], "little", signed=True)
        else:
            return
        yield number, start + at


class Run:
    """A run of numbers in a list or tuple. They stay in the pickle, each with its opcode."""

    def __init__(self, file, start):
        self.start = self.end = start
        self.count, self.has_floats, self.has_bools = 0, False, False
        for number, self.end in numbers_from(file, start):
            self.count += 1
            self.has_floats |= type(number) is float
            self.has_bools |= type(number) is bool


class NumberList:
    """A list or tuple instead of an array: of numbers, of one list of them, or of lists of one number each."""

    def __init__(self, value, name):
        self.described, self.name = describe(value), name
        self.items, self.count, self.has_floats = [], 0, False
        self.is_flat = not any(type(item) in (list, tuple) for item in value)
        for item in value:
            inner = type(item) in (list, tuple)
            if inner != (not self.is_flat) or (inner and len(value) != 1 and len(item) != 1):
                self.refuse(item)
            for number in item if inner else (item,):
                self.add(number)

    def add(self, item):
        if type(item) is Run and not item.has_bools:
            self.count += item.count
            self.has_floats |= item.has_floats
        elif type(item) in (int, float):
            self.count += 1
            self.has_floats |= type(item) is float
        else:
            self.refuse(item)
        self.items.append(item)

    def refuse(self, item):
        raise ConversionError(f"'{self.name}' is {self.described} with {describe(item)} in it, expected numbers")

    def __len__(self):
        return self.count


class Csr:
    """A scipy.sparse.csr_matrix; `shape` is None until it is built."""

    shape = data = indices = indptr = None


class Dtype:
    """An unfinished numpy dtype: BUILD sets its byte order."""

    def __init__(self, code):
        self.code, self.order = code, "<"

    @property
    def numpy(self):
        return np.dtype(self.code).newbyteorder(self.order)


def len_of(shape):
    length = 1
    for n in shape:
        length *= n
    return length


def count_of(items):
    """Returns the length of a list or tuple, where each number of a run counts."""
    return sum(item.count if type(item) is Run else 1 for item in items)


def sizes(value):
    """Returns a tuple or list of numbers that are not negative; None for anything else."""
    if type(value) not in (tuple, list) or len(value) > MOST_DIMENSIONS:
        return None
    return tuple(value) if all(type(n) is int and n >= 0 for n in value) else None


def describe(value):
    """Describes a value in a few words, without its items."""
    if value is None:
        return "None"
    if type(value) is bool:
        return f"the truth value {str(value).lower()}"
    if type(value) in (int, float):
        return f"the number {value}"
    if type(value) is Text and len(value.encode()) <= 80:
        return f"the text '{value}'"
    if type(value) in (Text, LongText):
        return "a long text"
    if type(value) is Bytes:
        return f"{value.length} bytes"
    if type(value) is dict:
        if len(value) <= 32 and all(len(key.encode()) <= 80 for key in value):
            return f"a dict of [{', '.join(sorted(value))}]"
        return f"a dict of {len(value)} keys"
    if type(value) in (tuple, list):
        return f"a {type(value).__name__} of {count_of(value)}"
    if type(value) is Run:
        kind = "numbers and truth values" if value.has_bools else "numbers" if value.has_floats else "integers"
        return f"{value.count} {kind}"
    if type(value) is NumberList:
        return value.described
    if type(value) is Global:
        return f"the global '{value.name}'"
    if type(value) is Dtype:
        return f"the dtype {value.numpy.name}"
    if type(value) is Array:
        return f"an array of {value.dtype.name} {list(value.shape)}" if value.dtype else "an array without numbers"
    if type(value) is Csr:
        return f"a csr_matrix {list(value.shape)}" if value.shape else "a csr_matrix without its parts"
    return "something else"


REFUSED = {
    ord("0"): "POP", ord("1"): "POP_MARK", ord("2"): "DUP", ord("F"): "FLOAT", ord("I"): "INT", ord("L"): "LONG",
    ord("P"): "PERSID", ord("Q"): "BINPERSID", ord("S"): "STRING", ord("T"): "BINSTRING", ord("U"): "SHORT_BINSTRING",
    ord("V"): "UNICODE", ord("d"): "DICT", ord("g"): "GET", ord("i"): "INST", ord("l"): "LIST", ord("o"): "OBJ",
    ord("p"): "PUT", 0x80: "PROTO", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x8B: "LONG4", 0x8F: "EMPTY_SET",
    0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX",
}


class Unpickler:
    """Reads a pickle of protocol 2 to 5 with the opcodes of a version 1 file. It calls nothing."""

    def __init__(self, files):
        self.files, self.input = files, files[0]
        self.length = os.fstat(files[0].fileno()).st_size
        self.position = self.opcode_at = self.objects = 0
        self.stack, self.marks, self.memo = [], [], {}
        self.text_left, self.next_buffer = MOST_TEXT, 1

    def load(self):
        try:
            return self.run()
        except ConversionError as e:
            raise ConversionError(f"{e} (byte {self.opcode_at} of the pickle)") from None

    def run(self):
        start = self.input.read(len(TORCH))
        self.input.seek(0)
        if start == TORCH:
            raise ConversionError("this is a PyTorch checkpoint, not a version 1 file")
        opcode, protocol = self.read(2)
        if opcode != 0x80 or not 2 <= protocol <= 5:
            raise ConversionError("not a pickle of protocol 2 to 5")
        for _ in range(MOST_OPCODES):
            self.opcode_at = self.position
            opcode = self.read(1)[0]
            if opcode == 0x2E:  # STOP
                return self.stop()
            is_number = opcode in FORMS or opcode in TRUTHS or opcode == LONG1
            if is_number and self.marks and self.marks[-1] == len(self.stack) and self.run_of_numbers():
                continue
            step = self.STEPS.get(opcode)
            if step is None:
                name = REFUSED.get(opcode)
                if name is None:
                    raise ConversionError(f"0x{opcode:02X} is no pickle opcode")
                raise ConversionError(f"the pickle opcode {name}, which no version 1 file has")
            step(self)
        raise ConversionError(f"more than {MOST_OPCODES} opcodes")

    def stop(self):
        value = self.pop()
        if self.stack or self.marks:
            raise ConversionError("the pickle ends with more than one object")
        passed = len(self.files) - 1
        if self.next_buffer <= passed:
            raise ConversionError(f"{passed} buffers were passed, it has {self.next_buffer - 1}")
        if self.position != self.length:
            raise ConversionError(f"{self.length - self.position} bytes after the end of the pickle")
        return value

    # Reading

    def check_left(self, length):
        left = self.length - self.position
        if length > left:
            raise ConversionError(f"cut short: {length} bytes are to follow, the file has {left}")

    def read(self, length):
        self.check_left(length)
        data = self.input.read(length)
        if len(data) != length:
            raise ConversionError("cut short while it was read")
        self.position += length
        return data

    def number(self, form):
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def line(self):
        line = self.input.readline(LONGEST_NAME + 1)
        self.position += len(line)
        if not line.endswith(b"\n"):
            if len(line) > LONGEST_NAME:
                raise ConversionError("the name of a global is too long")
            self.check_left(1)
        try:
            return line[:-1].decode()
        except UnicodeDecodeError:
            raise ConversionError("the name of a global is not UTF-8") from None

    def pass_over(self, length):
        self.check_left(length)
        place = Bytes(0, self.position, length)
        self.position += length
        self.input.seek(self.position)
        return place

    # The stack

    def push(self, value):
        if self.objects == MOST_OBJECTS:
            raise ConversionError(f"more than {MOST_OBJECTS} objects")
        self.objects += 1
        self.stack.append(value)

    def floor(self):
        return self.marks[-1] if self.marks else 0

    def pop_many(self, count):
        start = len(self.stack) - count
        if start < self.floor():
            raise ConversionError("an opcode takes more from the stack than there is")
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop(self):
        return self.pop_many(1)[0]

    def pop_to_mark(self):
        if not self.marks:
            raise ConversionError("an opcode takes more from the stack than there is")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self):
        if len(self.stack) <= self.floor():
            raise ConversionError("an opcode takes more from the stack than there is")
        return self.stack[-1]

    # Opcodes

    def frame(self):
        self.check_left(self.number("<Q"))

    def mark(self):
        self.marks.append(len(self.stack))

    def run_of_numbers(self):
        """Skips the numbers of a list or tuple. Returns False, without moving, if they are few or not all of it."""
        run = Run(self.input, self.opcode_at)
        self.input.seek(run.end)
        is_whole = run.count >= SHORTEST_RUN and self.input.read(1) in (b"e", b"t")
        if is_whole:
            self.position = run.end
            self.push(run)
        self.input.seek(self.position)
        return is_whole

    def long1(self):
        length = self.read(1)[0]
        if length > 8:
            raise ConversionError(f"a number of {length} bytes")
        self.push(int.from_bytes(self.read(length), "little", signed=True))

    def string(self, form):
        length = self.number(form)
        if length > LONGEST_TEXT:
            return self.push(LongText(self.pass_over(length)))
        self.check_left(length)
        self.text_left -= length
        if self.text_left < 0:
            raise ConversionError(f"texts of more than {MOST_TEXT} bytes")
        place = Bytes(0, self.position, length)
        try:
            text = Text(self.read(length).decode())
        except UnicodeDecodeError:
            raise ConversionError("a text that is not UTF-8") from None
        text.place = place
        return self.push(text)

    def bytes_(self, form):
        self.push(self.pass_over(self.number(form)))

    def buffer(self):
        found = len(self.files) - 1
        if self.next_buffer > found:
            what = (
                f"it has more out-of-band buffers than the {found} that were passed"
                if found
                else "its arrays are in out-of-band buffers, which are not in this file"
            )
            raise ConversionError(f"{what}; pass the files of the buffers with --buffers, in the order in which they were written")
        length = os.fstat(self.files[self.next_buffer].fileno()).st_size
        self.push(Bytes(self.next_buffer, 0, length))
        self.next_buffer += 1

    def read_only(self):
        if not self.stack or type(self.stack[-1]) is not Bytes:
            raise ConversionError("no buffer to make read-only")

    def append(self, items):
        if type(self.top()) is not list:
            raise ConversionError(f"a list is to grow, but there is {describe(self.top())}")
        self.top().extend(items)

    def set_items(self, items):
        target = self.top()
        if len(items) % 2:
            raise ConversionError("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is not Text:
                raise ConversionError(f"{describe(key)} as the key of a dict")
            if type(target) is not dict:
                raise ConversionError(f"a dict is to grow, but there is {describe(target)}")
            if key in target:
                raise ConversionError(f"{describe(key)} as a key twice in a dict")
            target[key] = value

    def memoize(self, key):
        value = self.top()
        if len(self.memo) == MOST_OBJECTS:
            raise ConversionError(f"more than {MOST_OBJECTS} places in the memo")
        self.memo[key] = value

    def recall(self, key):
        if key not in self.memo:
            raise ConversionError(f"nothing in the memo at {key}")
        self.stack.append(self.memo[key])

    def stack_global(self):
        module, name = self.pop_many(2)
        if type(module) is not Text or type(name) is not Text:
            raise ConversionError("the name of a global is no text")
        self.find(module, name)

    def find(self, module, name):
        kind = ALLOWED.get((str(module), str(name)))
        if kind is None:
            raise ConversionError(
                f"it asks for the global '{f'{module}.{name}'[:120]}', which no version 1 file has; nothing of it was run; "
                "do not load this file with Python's pickle"
            )
        self.push(Global(kind, f"{module}.{name}"))

    def call(self, is_new):
        target, arguments = self.pop_many(2)
        if type(target) is not Global:
            raise ConversionError(f"a call of {describe(target)}")
        if type(arguments) is not tuple:
            raise ConversionError("a call without a tuple of arguments")
        made = None
        # False and 0 are values too, so only None means nothing.
        if is_new == (target.kind == "csr_matrix"):
            made = getattr(self, f"call_{target.kind}", lambda *_: None)(arguments)
        if made is None:
            shown = ", ".join(describe(a) for a in arguments[:6])
            raise ConversionError(f"a call of '{target.name}' with ({shown})")
        self.push(made)

    # The meaning of a call; None: no version 1 file has such a call.

    def call_csr_matrix(self, arguments):
        return Csr() if arguments == () else None

    def call_OrderedDict(self, arguments):
        return {} if arguments == () else None

    def call_bytes(self, arguments):
        return Bytes(0, 0, 0) if arguments == () else None

    def call_encode(self, arguments):
        if len(arguments) != 2 or type(arguments[1]) is not Text or arguments[1] != "latin1":
            return None
        if type(arguments[0]) not in (Text, LongText):
            return None
        place = arguments[0].place
        return Bytes(place.file, place.start, place.length, latin1=True)

    def call_dtype(self, arguments):
        if len(arguments) != 3 or type(arguments[0]) is not Text:
            return None
        if any(type(a) not in (bool, int) or a not in (0, 1) for a in arguments[1:]):
            return None
        if arguments[0] not in DTYPES:
            raise ConversionError(f"an array of dtype '{arguments[0][:20]}', expected integers or floats of 1 to 8 bytes")
        return Dtype(str(arguments[0]))

    def call__reconstruct(self, arguments):
        if len(arguments) != 3:
            return None
        kind, shape, code = arguments
        plain = type(kind) is Global and kind.kind == "ndarray" and sizes(shape) is not None and type(code) is Bytes
        return Array() if plain else None

    def call__frombuffer(self, arguments):
        # Newer versions also name the order of the axes, if there is more than one.
        if len(arguments) not in (4, 5):
            return None
        data, dtype, shape, order = arguments[:4]
        if type(order) is not Text or order not in ("C", "K", "A", "F"):
            return None
        if type(data) is not Bytes or type(dtype) is not Dtype or sizes(shape) is None:
            return None
        return Array().set(dtype.numpy, sizes(shape), order == "F", data)

    def call_scalar(self, arguments):
        if len(arguments) != 2 or type(arguments[0]) is not Dtype or type(arguments[1]) is not Bytes:
            return None
        array = Array().set(arguments[0].numpy, (), False, arguments[1])
        # A number, as a Python value.
        numbers = ArrayNumbers(self.files, array)
        number = numbers.take(1)[0].item()
        numbers.finish()
        self.input.seek(self.position)
        return min(number, 2**63 - 1) if type(number) is int else number

    def build(self):
        state = self.pop()
        target = self.top()
        built = False
        if type(target) is Dtype:
            built = self.build_dtype(target, state)
        elif type(target) is Array and target.dtype is None:
            built = self.build_array(target, state)
        elif type(target) is Csr and target.shape is None:
            built = self.build_csr(target, state)
        if not built:
            raise ConversionError(f"{describe(state)} as the state of {describe(target)}")

    def build_dtype(self, target, state):
        if type(state) is not tuple or len(state) != 8 or any(type(n) is not int for n in (state[0], *state[5:])):
            return False
        order = state[1]
        if (state[0], *state[2:]) != (3, None, None, None, -1, -1, 0) or type(order) is not Text or order not in "<=|>" or len(order) != 1:
            return False
        target.order = ">" if order == ">" else "<"
        return True

    def build_array(self, target, state):
        if type(state) is not tuple or len(state) != 5:
            return False
        version, shape, dtype, fortran, data = state
        if type(version) is not int or version != 1 or type(fortran) is not bool:
            return False
        if type(data) is not Bytes or type(dtype) is not Dtype or sizes(shape) is None:
            return False
        target.set(dtype.numpy, sizes(shape), fortran, data)
        return True

    def build_csr(self, target, state):
        # scipy has about ten.
        if type(state) is not dict or len(state) > MOST_OF_A_STATE:
            return False
        parts = [state.get(name) for name in ("data", "indices", "indptr")]
        shape = sizes(state.get("_shape"))
        if shape is None or any(type(part) is not Array or part.dtype is None for part in parts):
            return False
        target.shape = shape
        target.data, target.indices, target.indptr = parts
        return True

    STEPS = {
        0x95: frame,
        ord("("): mark,
        ord("N"): lambda self: self.push(None),
        **{opcode: lambda self, truth=truth: self.push(truth) for opcode, truth in TRUTHS.items()},
        **{opcode: lambda self, form=form: self.push(self.number(form.format)) for opcode, form in FORMS.items()},
        LONG1: long1,
        0x8C: lambda self: self.string("<B"),
        ord("X"): lambda self: self.string("<I"),
        0x8D: lambda self: self.string("<Q"),
        ord("C"): lambda self: self.bytes_("<B"),
        ord("B"): lambda self: self.bytes_("<I"),
        0x8E: lambda self: self.bytes_("<Q"),
        0x96: lambda self: self.bytes_("<Q"),
        0x97: buffer,
        0x98: read_only,
        ord("]"): lambda self: self.push([]),
        ord("}"): lambda self: self.push({}),
        ord(")"): lambda self: self.push(()),
        0x85: lambda self: self.push(tuple(self.pop_many(1))),
        0x86: lambda self: self.push(tuple(self.pop_many(2))),
        0x87: lambda self: self.push(tuple(self.pop_many(3))),
        ord("t"): lambda self: self.push(tuple(self.pop_to_mark())),
        ord("a"): lambda self: self.append(self.pop_many(1)),
        ord("e"): lambda self: self.append(self.pop_to_mark()),
        ord("s"): lambda self: self.set_items(self.pop_many(2)),
        ord("u"): lambda self: self.set_items(self.pop_to_mark()),
        ord("q"): lambda self: self.memoize(self.number("<B")),
        ord("r"): lambda self: self.memoize(self.number("<I")),
        0x94: lambda self: self.memoize(len(self.memo)),
        ord("h"): lambda self: self.recall(self.number("<B")),
        ord("j"): lambda self: self.recall(self.number("<I")),
        ord("c"): lambda self: self.find(self.line(), self.line()),
        0x93: stack_global,
        ord("R"): lambda self: self.call(False),
        0x81: lambda self: self.call(True),
        ord("b"): build,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The schema
# ---------------------------------------------------------------------------------------------------------------------


def fields(value, what, known, parts=()):
    """Returns the items of a dict whose keys are all known, without those that are None."""
    if type(value) is not dict:
        raise ConversionError(f"{what} is {describe(value)}, expected a dict")
    names = set(known).union(*parts)
    for key in sorted(value):
        if key not in names:
            expected = ", ".join([*known, *("/".join(p) for p in parts)])
            raise ConversionError(
                f"{what} has '{key[:80]}' ({describe(value[key])}), which version 1 does not have; it has {expected}"
            )
    return {key: item for key, item in value.items() if item is not None}


def listed(value, what):
    if type(value) not in (list, tuple):
        raise ConversionError(f"{what} is {describe(value)}, expected a list")
    return value


def text_of(items, key):
    value = items.get(key)
    if value is not None and type(value) is not Text:
        raise ConversionError(f"'{key}' is {describe(value)}, expected a text")
    return None if value is None else str(value)


def check_note(items, key):
    value = items.get(key)
    short = type(value) is Text and len(value.encode()) <= LONGEST_NOTE
    if not (value is None or short or type(value) in (bool, int, float, Dtype)):
        raise ConversionError(f"'{key}' is {describe(value)}, expected a number, a short text or a truth value")


def numbers(value, name, lists, expected):
    """Returns an array, or a list or tuple instead of one. `lists` caches lists, which tensors can share."""
    if type(value) in (list, tuple):
        if id(value) not in lists:
            lists[id(value)] = NumberList(value, name)
        return lists[id(value)]
    if type(value) is not Array or value.dtype is None:
        raise ConversionError(f"'{name}' is {describe(value)}, expected {expected}")
    return value


def integers(value, name, lists):
    """Returns an array or list of integers, of one dimension."""
    value = numbers(value, name, lists, "an array")
    if type(value) is NumberList:
        if not value.is_flat:
            raise ConversionError(f"'{name}' is {describe(value)} with lists in it, expected one dimension")
        if value.has_floats:
            raise ConversionError(f"'{name}' is {describe(value)} with floats in it, expected integers")
        return value
    if value.dtype.kind not in "iu":
        raise ConversionError(f"'{name}' is {describe(value)}, expected integers")
    if len(value.shape) != 1:
        raise ConversionError(f"'{name}' is {describe(value)}, expected one dimension")
    return value


def parts_of(tensor, lists):
    """Returns (values, indices, pointers, primes, scale), or None if the file has no weights of the tensor."""
    found = []
    for names in PARTS:
        there = [name for name in names if name in tensor]
        if len(there) > 1:
            raise ConversionError(f"both '{there[0]}' and '{there[1]}'")
        found.append(there[0] if there else None)
    if not any(found):
        return None

    def part(number):
        if found[number] is None:
            there = ", ".join(name for name in found if name)
            names = "' or '".join(PARTS[number])
            raise ConversionError(f"no '{names}', but [{there}]")
        return tensor[found[number]], found[number]

    primes = integers(*part(3), lists)
    scale, scale_name = part(4)
    if type(scale) not in (int, float):
        scale = numbers(scale, scale_name, lists, "a number or an array")
    values = tensor.get(found[0]) if found[0] else None
    if type(values) is Csr and values.shape is not None:
        beside = found[1] or found[2]
        if beside:
            raise ConversionError(f"a csr_matrix, and '{beside}' beside it")
        if values.shape != sizes(tensor["shape"]):
            raise ConversionError(f"a csr_matrix {list(values.shape)}, which is not its shape")
        of_csr = [integers(getattr(values, name), name, lists) for name in ("data", "indices", "indptr")]
        return (*of_csr, primes, scale)
    return (*(integers(*part(number), lists) for number in range(3)), primes, scale)


class Tensor:
    """A tensor of the catalogue."""

    def __init__(self, value, method, lists):
        name = value.get("name") if type(value) is dict else None
        self.name = str(name) if type(name) is Text else None
        with self.errors():
            tensor = fields(value, "a tensor", TENSOR_KEYS, PARTS)
            if text_of(tensor, "name") is None:
                raise ConversionError(f"a tensor without a name: {describe(value)}")
            if "shape" not in tensor:
                raise ConversionError("a tensor without a shape")
            self.shape = sizes(tensor["shape"])
            if self.shape is None:
                raise ConversionError(f"'shape' is {describe(tensor['shape'])}, expected a tuple of sizes")
            for key in TENSOR_KEYS[2:]:
                check_note(tensor, key)
            self.parts = parts_of(tensor, lists)
            own = tensor.get("compression_method")
            other = str(own) if type(own) is Text else method
            if self.parts and other not in (None, METHOD):
                raise ConversionError(f"compressed by the method '{other}', expected '{METHOD}'")

    @contextlib.contextmanager
    def errors(self):
        """Adds the name of the tensor to errors."""
        try:
            yield
        except ConversionError as e:
            if self.name is None:
                raise
            raise ConversionError(f"tensor '{self.name}': {e}") from None

    @property
    def size(self):
        """Returns [rows, cols]; a vector is one row."""
        if len(self.shape) not in (1, 2):
            raise ConversionError(f"the shape {list(self.shape)}, expected one or two dimensions")
        rows, cols = (1, *self.shape)[-2:]
        if not (1 <= rows <= MOST_ROWS and 1 <= cols <= MOST_COLS and rows * cols <= LARGEST_MATRIX):
            raise ConversionError(f"the shape {list(self.shape)} is outside the limits")
        return rows, cols


class Catalogue:
    """The tensors that a version 1 file describes."""

    def __init__(self, value):
        top = fields(value, "the file", TOP_KEYS)
        if "files" not in top:
            raise ConversionError(f"no 'files' in the file, which has [{', '.join(sorted(top))}]; it is a pickle, but not of a version 1 model")
        self.method = text_of(top, "compression_method")
        self.tensors, names, lists = [], set(), {}
        for file in listed(top["files"], "'files'"):
            file = fields(file, "an entry of 'files'", FILE_KEYS)
            text_of(file, "filename")
            if "tensors" not in file:
                raise ConversionError("no 'tensors' in an entry of 'files'")
            for value in listed(file["tensors"], "'tensors'"):
                tensor = Tensor(value, self.method, lists)
                # A list can hold the same tensor a million times at no cost.
                if tensor.name in names:
                    raise ConversionError(f"tensor '{tensor.name}': listed twice")
                if len(names) == MOST_LAYERS:
                    raise ConversionError(f"more than {MOST_LAYERS} tensors")
                names.add(tensor.name)
                self.tensors.append(tensor)
        self.model_type, self.source = text_of(top, "model_type"), text_of(top, "source")
        check_note(top, "target_compression")

    def check_weights(self):
        if not any(tensor.parts for tensor in self.tensors):
            count = len(self.tensors)
            what = f"it lists {count} tensors, but has the weights of none" if count else "it lists no tensors"
            raise ConversionError(
                f"{what}; make a real file from the model: upg compress {self.source_to_show() or 'MODEL_DIRECTORY'} "
                f"-o {self.name_to_write()} --encoding t3"
            )
        for tensor in self.tensors:
            if not tensor.parts:
                raise ConversionError(f"tensor '{tensor.name}': its weights are not in the file, though it is listed")

    def source_to_show(self):
        """Returns the source, if it can be an argument of a command without quotes."""
        source = self.source
        if not source or len(source) > 200 or not source.isascii():
            return None
        plain = all(c.isalnum() or c in "._/-" for c in source)
        return source if plain and (source[0].isalnum() or source[0] == "/") else None

    def name_to_write(self):
        parts = [part for part in (self.source_to_show() or "").split("/") if part]
        return f"{parts[-1] if parts else 'model'}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


class ArrayNumbers:
    """Reads the numbers of an array in order, a part at a time."""

    def __init__(self, files, array):
        self.file, self.data, self.dtype = files[array.data.file], array.data, array.dtype
        self.at, self.end = array.data.start, array.data.start + array.data.length
        self.decoder = codecs.getincrementaldecoder("utf-8")() if array.data.latin1 else None
        self.waiting = b""

    def take(self, count):
        wanted = count * self.dtype.itemsize
        if self.decoder is None:
            return np.frombuffer(self.next(wanted), self.dtype)
        parts, held = [self.waiting], len(self.waiting)
        while held < wanted:
            text = self.next(min(wanted - held + 1, self.end - self.at))
            try:
                # One character, one byte.
                part = self.decoder.decode(text).encode("latin1")
            except UnicodeEncodeError:
                raise ConversionError("text in the place of bytes has characters above U+00FF") from None
            except UnicodeDecodeError:
                raise ConversionError("text in the place of bytes has characters above U+00FF") from None
            parts.append(part)
            held += len(part)
        data = b"".join(parts)
        self.waiting = data[wanted:]
        return np.frombuffer(data, self.dtype, count)

    def floats(self, count):
        return self.take(count).astype(np.float32)

    def next(self, length):
        if length > self.end - self.at or (length == 0 and self.decoder is not None):
            raise ConversionError("an array has fewer bytes than its shape says")
        self.file.seek(self.at)
        data = self.file.read(length)
        if len(data) != length:
            raise ConversionError("the file was cut short while it was read")
        self.at += length
        return data

    def finish(self):
        if self.decoder is not None:
            try:
                self.decoder.decode(b"", True)
            except UnicodeDecodeError:
                raise ConversionError("an array has more bytes than its shape says") from None
        if self.at != self.end or self.waiting:
            raise ConversionError("an array has more bytes than its shape says")


class ListNumbers:
    """Reads the numbers of a list in order, a part at a time."""

    def __init__(self, files, numbers):
        self.left = self.all(files[0], numbers.items)

    def all(self, file, items):
        for item in items:
            if type(item) is Run:
                yield from (number for number, _ in itertools.islice(numbers_from(file, item.start), item.count))
            else:
                yield item

    def next(self, count, types):
        part = list(itertools.islice(self.left, count))
        # Every number was checked before.
        if len(part) != count or any(type(number) not in types for number in part):
            raise ConversionError("a list was changed while it was read")
        return part

    def take(self, count):
        return np.array(self.next(count, (int,)), np.int64)

    def floats(self, count):
        """Converts numbers to float32, each rounded separately."""
        part = self.next(count, (int, float))
        out = np.array([0.0 if type(number) is int else number for number in part]).astype(np.float32)
        whole = [i for i, number in enumerate(part) if type(number) is int]
        out[whole] = np.array([part[i] for i in whole], np.int64).astype(np.float32)
        return out

    def finish(self):
        """A list has no length but the number of its items."""


def reader(files, numbers):
    return (ListNumbers if type(numbers) is NumberList else ArrayNumbers)(files, numbers)


def read_scales(files, scale, rows):
    if type(scale) not in (Array, NumberList):
        with np.errstate(over="ignore"):
            scales = np.full(rows, np.float32(float(scale)), np.float32)
    else:
        is_row = type(scale) is NumberList or sum(n != 1 for n in scale.shape) <= 1
        if not is_row or len(scale) not in (1, rows):
            raise ConversionError(f"the scales are {describe(scale)}, for {rows} rows")
        if type(scale) is Array and scale.dtype.kind == "b":
            raise ConversionError(f"{describe(scale)}, expected numbers")
        numbers = reader(files, scale)
        with np.errstate(over="ignore"):
            scales = np.concatenate([numbers.floats(min(CHUNK, len(scale) - at)) for at in range(0, len(scale), CHUNK)])
        numbers.finish()
        if len(scales) == 1:
            scales = np.full(rows, scales[0], np.float32)
    bad = ~(np.abs(scales) <= LARGEST_SCALE)
    if bad.any():
        row = int(np.argmax(bad))
        raise ConversionError(f"the scale of row {row} is {scales[row]}, not a number of magnitude up to 2^64")
    return scales


def check_range(numbers, low, high, name):
    bad = (numbers < low) | (numbers > high)
    if bad.any():
        raise ConversionError(f"a {name} of {numbers[np.argmax(bad)]}, expected {low} to {high}")


class Rows:
    """The arrays of `mdcsr`: values, delta_indices, row_pointers, prime_indices, scales."""

    def __init__(self, files, parts, rows, cols, most):
        values, indices, pointers, primes, scale = parts
        nnz = len(values)
        for name, part in (("indices", indices), ("prime_indices", primes)):
            if len(part) != nnz:
                raise ConversionError(f"{len(part)} {name} for {nnz} values")
        if len(pointers) != rows + 1:
            raise ConversionError(f"{len(pointers)} row pointers for {rows} rows")
        self.scales = read_scales(files, scale, rows)
        self.cols, self.nnz, self.most = cols, nnz, most
        self.chunks, self.stored, self.entries = [], 0, 0
        streams = [reader(files, part) for part in (indices, values, primes)]
        numbers = reader(files, pointers)
        start = int(numbers.take(1)[0])
        if start != 0:
            raise ConversionError(f"the row pointers start with {start}")
        self.row_pointers = np.zeros(rows + 1, "<u4")
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            ends = self.check_ends(first, start, numbers.take(count))
            per_row = self.convert_rows(np.diff(ends, prepend=start), streams)
            self.row_pointers[first + 1 : first + count + 1] = self.row_pointers[first] + np.cumsum(per_row)
            start = int(ends[-1])
        if start != nnz:
            raise ConversionError(f"the row pointers end with {start}, for {nnz} values")
        for stream in (numbers, *streams):
            stream.finish()

    def check_ends(self, first, start, ends):
        """Returns the ends of the rows from `first` on; the row before them ends at `start`."""
        # Compared in their own type, where a large value is not a negative one.
        starts = np.concatenate([np.array([start], ends.dtype), ends[:-1]])
        bad = (ends < starts) | (ends > self.nnz)
        if not bad.any():
            # Columns are all different, so no row has more.
            bad = ends.astype(np.int64) - starts.astype(np.int64) > self.cols
        if bad.any():
            row = int(np.argmax(bad))
            raise ConversionError(
                f"row {first + row} has the entries {starts[row]} to {ends[row]} of {self.nnz}, in {self.cols} columns"
            )
        return ends.astype(np.int64)

    def convert_rows(self, counts, streams):
        """Converts rows with `counts` entries each. Returns how many of each are stored."""
        ends = np.cumsum(counts)
        stored, first = [], 0
        while first < len(counts):
            # Whole rows, of about CHUNK entries together.
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, "right")))
            part = (stream.take(int(ends[last - 1]) - before) for stream in streams)
            stored.append(self.convert(counts[first:last], *part))
            first = last
        return np.concatenate(stored)

    def convert(self, counts, columns, values, primes):
        """Returns the entries of each of these rows in the file."""
        check_range(columns, 0, self.cols - 1, "column")
        check_range(values, -128, 127, "value")
        check_range(primes, 0, PRIME_COUNT - 1, "prime index")
        columns = columns.astype(np.int32)
        row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        same_row = row[1:] == row[:-1]
        if (same_row & (columns[1:] <= columns[:-1])).any():
            order = np.lexsort((columns, row))
            columns, values, primes = columns[order], values[order], primes[order]
            twice = same_row & (columns[1:] == columns[:-1])
            if twice.any():
                raise ConversionError(f"two entries in column {columns[1:][np.argmax(twice)]}")
        # A weight of 0 is left out.
        there = values != 0
        if not there.all():
            row, columns, values, primes = row[there], columns[there], values[there], primes[there]
        self.entries += len(columns)
        gaps = np.diff(columns, prepend=0)
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        gaps[begins] = columns[begins]
        bridges = np.maximum(gaps - 1, 0) // LARGEST_DELTA
        total = len(gaps) + int(bridges.sum(dtype=np.int64))
        self.stored += total
        if self.stored >= 2**32:
            raise ConversionError("more than 2^32 - 1 entries, with those that bridge gaps")
        if self.stored > self.most:
            raise ConversionError(f"more than {self.most} entries, with those that bridge gaps, for a file of this size")
        if total == len(gaps):
            chunk = (values.astype("i1"), gaps.astype("u1"), primes.astype("<u2"))
        else:
            place = np.arange(len(gaps)) + np.cumsum(bridges, dtype=np.int64)
            chunk = (np.zeros(total, "i1"), np.full(total, LARGEST_DELTA, "u1"), np.zeros(total, "<u2"))
            for out, source in zip(chunk, (values, gaps - LARGEST_DELTA * bridges, primes)):
                out[place] = source
        self.chunks.append(chunk)
        return np.bincount(row, bridges + 1, len(counts)).astype(np.int64)

    def arrays(self):
        """Yields (name, dtype, shape, parts) in the order of the file."""
        values, deltas, primes = zip(*self.chunks) if self.chunks else ((), (), ())
        yield "values", "I8", [self.stored], values
        yield "delta_indices", "U8", [self.stored], deltas
        yield "row_pointers", "U32", [len(self.row_pointers)], [self.row_pointers]
        yield "prime_indices", "U16", [self.stored], primes
        yield "scales", "F32", [len(self.scales)], [self.scales.astype("<f4")]

    def dense_row(self):
        """Returns the weights of a vector, which is one row."""
        out = np.zeros(self.cols, np.float32)
        column = 0
        for values, deltas, primes in self.chunks:
            columns = column + np.cumsum(deltas, dtype=np.int64)
            column = int(columns[-1]) if len(columns) else column
            products = (first_primes()[primes] * values).astype(np.float32)
            out[columns] = self.scales[0] * products
        return out


def first_primes():
    if not hasattr(first_primes, "table"):
        sieve = np.ones(104_730, bool)
        sieve[:2] = False
        for n in range(2, 324):
            if sieve[n]:
                sieve[n * n :: n] = False
        first_primes.table = np.flatnonzero(sieve)
    return first_primes.table


# ---------------------------------------------------------------------------------------------------------------------
# The file of version 2
# ---------------------------------------------------------------------------------------------------------------------


def escaped(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def digest(*parts):
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.digest()[:16].hex()


class Writer:
    """Writes tensor by tensor, the header last, whole or not at all."""

    def __init__(self, path, capacity):
        if capacity > LARGEST_HEADER:
            raise ConversionError(f"a header of {capacity} bytes, at most {LARGEST_HEADER}")
        self.path = os.path.realpath(path)
        is_nowhere = os.path.islink(path) and not os.path.exists(path)
        if is_nowhere or (os.path.exists(self.path) and not os.path.isfile(self.path)):
            raise ConversionError(f"{path}: not a regular file")
        folder = os.path.dirname(self.path)
        if not os.path.isdir(folder):
            raise ConversionError(f"{path}: cannot write: no such folder; make the folder {folder} first")
        self.temporary = os.path.join(folder, f".upg-{secrets.token_hex(4)}.partial")
        # With the permissions of a new file; never an existing file.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self.out = os.fdopen(os.open(self.temporary, flags, 0o666), "w+b", 1 << 20)
        start = -(-(8 + capacity) // ALIGNMENT) * ALIGNMENT
        self.capacity, self.position, self.tensors, self.pads = start - 8, 0, [], 0
        self.out.seek(start)

    def tensor(self, name, dtype, shape, parts):
        misaligned = self.position % ALIGNMENT
        if misaligned:
            zeros = bytes(ALIGNMENT - misaligned)
            self.append(f"upg_pad_{self.pads}", "U8", [len(zeros)], [zeros])
            self.pads += 1
        self.append(name, dtype, shape, parts)

    def append(self, name, dtype, shape, parts):
        sha, begin = hashlib.sha256(), self.position
        for part in parts:
            part = memoryview(part).cast("B") if len(part) else b""
            sha.update(part)
            self.out.write(part)
            self.position += len(part)
        self.tensors.append((name, dtype, shape, begin, self.position, sha.digest()[:16].hex()))

    @property
    def file_length(self):
        return 8 + self.capacity + self.position

    def finish(self, metadata, layers):
        table = sorted(self.tensors, key=lambda t: t[0].encode())
        metadata = dict(metadata)
        metadata["format"] = "upg"
        # A file with only mdcsr has version 2.0.
        metadata["version"] = "2.0"
        metadata["num_layers"] = str(len(layers))
        metadata["layers"] = escaped(layers)
        metadata["checksums"] = escaped({t[0]: t[5] for t in table})
        lines = [f"{name}\n{dtype}\n{','.join(map(str, shape))}\n" for name, dtype, shape, *_ in table]
        for key in sorted(metadata, key=str.encode):
            lines.append(f"{key}\n{len(metadata[key].encode())}\n{metadata[key]}\n")
        metadata["checksum"] = digest("".join(lines).encode())
        header = {"__metadata__": {key: metadata[key] for key in sorted(metadata, key=str.encode)}}
        for name, dtype, shape, begin, end, _ in self.tensors:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        header = escaped(header).encode()
        if len(header) > self.capacity:
            raise ConversionError(f"a header of {len(header)} bytes, room for {self.capacity}")
        self.out.seek(0)
        self.out.write(struct.pack("<Q", self.capacity) + header.ljust(self.capacity))
        self.out.flush()
        os.fsync(self.out.fileno())
        self.out.close()
        os.replace(self.temporary, self.path)
        if os.name == "posix":
            # Some file systems do not support this; the file is in its place.
            with contextlib.suppress(OSError):
                folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)

    def abandon(self):
        try:
            # On a full disk the buffer cannot be written here either.
            with contextlib.suppress(OSError):
                self.out.close()
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.temporary)


def header_capacity(layers, other, metadata):
    """Returns the bytes reserved for the header: those of the Rust writer."""

    def entry(name):
        return 2 * len(escaped(name).encode()) + 330

    total = 2048 + len(escaped(metadata).encode()) + sum(entry(name) for name in other)
    for index, layer in enumerate(layers):
        total += len(escaped(escaped(layer)).encode()) + 80
        for array in ("values", "delta_indices", "row_pointers", "prime_indices", "scales"):
            total += entry(f"layer_{index}_{array}")
    return total


def check_name(name, is_layer):
    """Checks names by rules 5 and 14."""
    bad = (
        not name
        or name.startswith(("layer_", "upg_pad_"))
        or name in ("tokenizer.json", "__metadata__")
        or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    )
    if bad:
        raise ConversionError("a name that no file may have")


# ---------------------------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------------------------


def read_file(folder, name, cap, as_text=True):
    path = os.path.join(folder, name)
    try:
        if not os.path.isfile(path):
            if os.path.exists(path):
                raise ConversionError(f"{path}: not a regular file")
            return None
        with open(path, "rb") as file:
            data = file.read(cap + 1)
    except OSError as e:
        raise ConversionError(f"{path}: cannot read: {e}") from None
    if len(data) > cap:
        raise ConversionError(f"{path}: more than {cap} bytes")
    if not as_text:
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConversionError(f"{path}: not UTF-8 text") from None


def template_of(text, path):
    """Returns the default chat template of a tokenizer config, with JSON as strict as in the Rust reader."""

    def number(text):
        value = float(text)
        if not np.isfinite(value):
            raise ValueError(f"{text[:40]} is out of range")
        return value

    def constant(name):
        raise ValueError(f"{name} is no JSON")

    def check(value, depth):
        if depth > 127:
            raise ValueError("nested too deep")
        if type(value) is str:
            value.encode()
        for item in value.items() if type(value) is dict else enumerate(value) if type(value) is list else ():
            check(item[0], depth)
            check(item[1], depth + 1)

    try:
        config = json.loads(text, parse_float=number, parse_int=number, parse_constant=constant)
        check(config, 0)
    except (ValueError, RecursionError) as e:
        raise ConversionError(f"{path}: not JSON: {e}") from None
    if type(config) is not dict:
        raise ConversionError(f"{path}: not a JSON object")
    template = config.get("chat_template")
    if template is None:
        return None
    if type(template) is list:
        named = [t for t in template if type(t) is dict and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if type(template) is not str:
        raise ConversionError(f"{path}: chat_template is neither a text nor a list with a 'default'")
    return template


def read_model_files(folder):
    """Returns (metadata, tokenizer.json or None): the contents of a Hugging Face directory without weights."""
    if folder is None:
        return {}, None
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
    texts = {name: read_file(folder, name, MAX_TEXT_FILE) for name in names}
    if texts["config.json"] is None:
        raise ConversionError(f"{folder}: no config.json in this directory")
    texts["chat_template"] = read_file(folder, "chat_template.jinja", MAX_TEXT_FILE)
    if texts["chat_template"] is None and texts["tokenizer_config.json"] is not None:
        texts["chat_template"] = template_of(texts["tokenizer_config.json"], f"{folder}/tokenizer_config.json")
    tokenizer = read_file(folder, "tokenizer.json", MAX_TOKENIZER, as_text=False)
    return {name: text for name, text in texts.items() if text is not None}, tokenizer


def convert_upg_to_safetensors(pickle_path, output_path, model_dir=None, buffers=(), progress=None):
    """Converts the version 1 file `pickle_path` to a version 2.0 file at `output_path`, whole or not at all.

    `model_dir`: a Hugging Face directory whose config, tokenizer and chat template go into the file.
    `buffers`: the files of the out-of-band buffers of a pickle of protocol 5, in order.
    `progress`: called with (tensors done, tensors in all, name).

    Returns a dict that describes the result. Memory: about 4 bytes an entry and 8 a row of the largest
    tensor, and 100 MB. Raises ConversionError, and OSError if files cannot be read or written.
    """
    read = [pickle_path, *buffers]
    if model_dir is not None:
        names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
        read += [os.path.join(model_dir, name) for name in names]
    if os.path.realpath(output_path) in {os.path.realpath(path) for path in read}:
        raise ConversionError(f"{output_path}: the output would overwrite a file of the input")
    with contextlib.ExitStack() as stack:
        files = []
        for path in [pickle_path, *buffers]:
            # Before it is opened: opening a pipe waits for its other end.
            if os.path.exists(path) and not os.path.isfile(path):
                raise ConversionError(f"{path}: not a regular file")
            files.append(stack.enter_context(open(path, "rb")))
        try:
            catalogue = Catalogue(Unpickler(files).load())
            catalogue.check_weights()
            metadata, tokenizer = read_model_files(model_dir)
            return write(files, catalogue, output_path, metadata, tokenizer, progress)
        except ConversionError as e:
            raise ConversionError(f"{pickle_path}: {e}") from None


def check_shared(catalogue, most):
    """Checks that rows and entries of all tensors fit the file, as tensors can share arrays. Zeros count too."""
    left = most
    for tensor in catalogue.tensors:
        with tensor.errors():
            values, _, pointers, *_ = tensor.parts
            left -= len(values) + len(pointers)
            if left < 0:
                raise ConversionError(f"more than {most} rows and entries together, for a file of this size")


def write(files, catalogue, output_path, metadata, tokenizer, progress):
    most = MOST_ENTRIES[0] * sum(os.fstat(file.fileno()).st_size for file in files) + MOST_ENTRIES[1]
    check_shared(catalogue, most)
    layers, other = [], []
    for tensor in catalogue.tensors:
        with tensor.errors():
            rows, cols = tensor.size
            check_name(tensor.name, len(tensor.shape) == 2)
            if len(tensor.shape) == 1:
                other.append(tensor.name)
            else:
                layers.append({"name": tensor.name, "rows": rows, "cols": cols, "encoding": "mdcsr"})
    if len(layers) > MOST_LAYERS:
        raise ConversionError(f"{len(layers)} matrices, at most {MOST_LAYERS}")
    recipe = {"converted_from": "UPG 1", "source": catalogue.source, "compression_method": catalogue.method}
    metadata = dict(metadata)
    metadata["model"] = catalogue.model_type if catalogue.model_type is not None else "unknown"
    metadata["recipe"] = escaped(recipe)
    metadata["compression_ratio"] = metadata["bits_per_weight"] = "0" * FIGURE_DIGITS
    writer = Writer(output_path, header_capacity(layers, [*other, "tokenizer.json"], metadata))
    try:
        index = entries = weights = 0
        left = most
        for number, tensor in enumerate(catalogue.tensors):
            if progress:
                progress(number, len(catalogue.tensors), tensor.name)
            with tensor.errors():
                rows, cols = tensor.size
                converted = Rows(files, tensor.parts, rows, cols, most)
                left -= converted.stored
                if left < 0:
                    raise ConversionError(f"more than {most} entries, with those that bridge gaps, for a file of this size")
            entries, weights = entries + converted.entries, weights + rows * cols
            if len(tensor.shape) == 1:
                writer.tensor(tensor.name, "F32", [cols], [converted.dense_row().astype("<f4")])
                continue
            for name, dtype, shape, parts in converted.arrays():
                writer.tensor(f"layer_{index}_{name}", dtype, shape, parts)
            index += 1
        if tokenizer is not None:
            writer.tensor("tokenizer.json", "U8", [len(tokenizer)], [tokenizer])
        length = writer.file_length
        metadata["compression_ratio"] = f"{4.0 * weights / length:.4f}"
        metadata["bits_per_weight"] = f"{8.0 * length / weights:.4f}"
        writer.finish(metadata, layers)
    except BaseException:
        writer.abandon()
        raise
    return {
        "matrices": len(layers),
        "vectors": len(other),
        "entries": entries,
        "weights": weights,
        "file_bytes": length,
        "can_run": "config.json" in metadata,
    }


def main():
    parser = argparse.ArgumentParser(
        description="Converts a UPG file of version 1 (a Python pickle) to version 2, without executing the pickle.",
        epilog="`upg convert` does the same without Python, and can also encode the weights again.",
    )
    parser.add_argument("pickle", metavar="OLD", help="UPG file of version 1")
    parser.add_argument("output", metavar="NEW", help="file to write; it appears whole or not at all")
    parser.add_argument("--model", metavar="DIR", help="Hugging Face directory whose config, tokenizer and chat template go into the file")
    parser.add_argument("--buffers", metavar="FILE", nargs="+", default=[], help="files of the out-of-band buffers of a pickle of protocol 5, in order")
    parser.add_argument("--quiet", action="store_true", help="no progress and no summary")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")

    def progress(done, of, name):
        shown = "".join(c if c.isprintable() else "?" for c in name)
        print(f"\r\033[K{done}/{of}  {shown[:100]}", end="", file=sys.stderr, flush=True)

    shows = sys.stderr.isatty() and not args.quiet
    try:
        done = convert_upg_to_safetensors(args.pickle, args.output, args.model, args.buffers, progress if shows else None)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ConversionError, OSError) as e:
        message = "".join(c if c.isprintable() else "?" for c in str(e))
        print(f"{chr(13) if shows else ''}convert_pickle_to_safetensors.py: {message}", file=sys.stderr)
        sys.exit(1)
    if shows:
        print("\r\033[K", end="", file=sys.stderr)
    if not args.quiet:
        share = 100.0 * done["entries"] / done["weights"]
        print(
            f"{args.output}: {done['file_bytes'] / 1e6:.2f} MB, {done['matrices']} matrices as mdcsr and {done['vectors']} vectors, "
            f"{share:.1f} % of their weights are not zero"
        )
        if not done["can_run"]:
            print("without config and tokenizer: it cannot be run; --model DIR takes them from the model's directory")


if __name__ == "__main__":
    main()

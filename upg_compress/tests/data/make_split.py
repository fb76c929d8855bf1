#!/usr/bin/env python3
"""Writes split/: files of families/ again, in parts, with llama.cpp's `gguf` package.

split/llama3-0000N-of-0000M.gguf   12 tensors a part; the first one has tensors too
split/qwen3-0000N-of-0000M.gguf    9 tensors a part; the first one has metadata only

Needs: pip install gguf. Usage: make_split.py
"""

from pathlib import Path

import gguf

HERE = Path(__file__).parent


def split(family, tensors, small_first):
    reader = gguf.GGUFReader(HERE / "families" / family / "model.gguf")
    arch = reader.fields["general.architecture"].contents()
    out = HERE / "split"
    out.mkdir(exist_ok=True)
    w = gguf.GGUFWriter(
        out / f"{family}.gguf", arch, split_max_tensors=tensors, small_first_shard=small_first
    )
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        w.add_key_value(key, field.contents(), kind, sub_type=item)
    for t in reader.tensors:
        w.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


split("llama3", 12, False)
split("qwen3", 9, True)

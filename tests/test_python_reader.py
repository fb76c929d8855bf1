"""Tests that upg_format_v2.md is enough to write a reader: the Python reader decodes every encoding to the
floats of the Rust one, and the safetensors package opens every file.

    python3 tests/test_python_reader.py path/to/upg
"""
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import upg_reader  # noqa: E402

ENCODINGS = ["mdcsr", "q8", "q4", "t2", "t3", "t4", "s8", "s4"]


def main(upg):
    model = ROOT / "upg_kernel/tests/data/tiny-models/phi3"
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        sparse = sparse_copy(model, folder / "sparse")
        for encoding in ENCODINGS:
            file, exported = folder / f"{encoding}.safetensors", folder / encoding
            options = ["--encoding", encoding, "--embedding", encoding, "--sparse", "never"]
            run(upg, "compress", sparse, "-o", file, *options)
            run(upg, "decompress", file, "-o", exported, "--dtype", "f32")
            rust = load_file(exported / "model.safetensors")
            count = 0
            for layer, matrix in upg_reader.layers(file):
                assert layer["encoding"] == encoding, layer
                expected = rust[layer["name"]]
                assert matrix.dtype == expected.dtype == np.float32
                assert matrix.tobytes() == expected.tobytes(), f"{encoding}: {layer['name']}"
                count += 1
            assert count == 10, f"{count} layers in a model of two blocks"
            print(f"{encoding}: {count} layers, every float equal")


def sparse_copy(model, out):
    """Writes the model in F32 with two fifths of its weights zero and one row empty."""
    out.mkdir()
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = {name: t.astype(np.float32) for name, t in load_bf16(model / "model.safetensors")}
    keep = np.random.default_rng(1)
    for name, t in tensors.items():
        if t.ndim == 2:
            t[keep.random(t.shape) < 0.4] = 0
            t[3] = 0
    save_file(tensors, out / "model.safetensors")
    return out


def load_bf16(path):
    """Widens BF16, which numpy lacks: its values are the upper halves of float32."""
    import json

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__":
            assert t["dtype"] == "BF16", name
            begin, end = t["data_offsets"]
            upper = np.frombuffer(data[start + begin : start + end], np.uint16).astype(np.uint32)
            yield name, (upper << 16).view(np.float32).reshape(t["shape"])


def run(*command):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stderr}"


if __name__ == "__main__":
    main(sys.argv[1])

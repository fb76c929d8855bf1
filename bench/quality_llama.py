"""Prints the figures of llama.cpp's llama-perplexity for a GGUF file, and its size, as JSON.

    python bench/quality_llama.py FILE.gguf OUTPUT

OUTPUT is the output of `llama-perplexity --kl-divergence`. Bits per weight are those of the matrices in
the blocks, with the weights that the file has. Needs the `gguf` package.
"""
import collections
import json
import pathlib
import re
import sys

from gguf import GGUFReader

# Names of a figure and its standard error, as in `upg eval --json`; label in the output; its unit.
FIGURES = [
    ("perplexity", "perplexity_error", "Mean PPL(Q)", 1),
    ("reference_perplexity", "reference_perplexity_error", "Mean PPL(base)", 1),
    ("perplexity_ratio", "perplexity_ratio_error", "Mean PPL(Q)/PPL(base)", 1),
    ("kl_mean", "kl_error", "Mean    KLD", 1),
    ("top1_agreement", "top1_error", "Same top p", 0.01),
]


def main(gguf, output):
    figures = {}
    for name, error, label, unit in FIGURES:
        found = re.search(re.escape(label) + r"\s*:\s*([-0-9.]+)\s*±\s*([-0-9.]+)", output.read_text("utf-8"))
        if not found:
            raise SystemExit(f"{output}: has no line for {label}")
        figures[name], figures[error] = (float(group) * unit for group in found.groups())
    matrices = [t for t in GGUFReader(gguf).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    weights = sum(int(t.n_elements) for t in matrices)
    figures["bits_per_weight_blocks"] = 8 * sum(int(t.n_bytes) for t in matrices) / weights
    figures["types"] = collections.Counter(t.tensor_type.name for t in matrices)
    figures["file_bytes"] = gguf.stat().st_size
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))

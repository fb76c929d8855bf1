#!/usr/bin/env python3
"""Compares encodings of UPG with 4-bit integers on all-MiniLM-L6-v2 (BERT, fp32, never quantized).

    minilm.py inputs MODEL TEXT WORK   runs the model over TEXT and writes its matrices and their inputs to
                                       WORK/inputs.safetensors
    minilm.py score MODEL WORK         compares WORK/outputs.safetensors (example encode_matrices) with the
                                       baselines, as Markdown

The first half of the text calibrates, the second half is scored: |X (Q - W)^T| / |X W^T| of each matrix,
with all others unchanged. The baselines are written from their papers and definitions: round to nearest
(RTN) and GPTQ (arXiv 2210.17323, with act-order as in AutoGPTQ), 4 bits with a scale for every 128
columns.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

WINDOW = 256  # tokens, the longest that the model was trained on
WINDOWS = 32  # of each half of the text
SENTENCES = 8  # windows of the second half whose vectors are compared too
GROUP = 128  # columns that share a scale in the baselines
DAMPING = 0.01  # of the average diagonal, as in GPTQ
LEVELS = 15  # of 4 bits


def erf(x):
    """Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; off by at most 1.5e-7."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    poly = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    return np.sign(x) * (1 - poly * np.exp(-x * x))


class Bert:
    """The forward pass over `[windows, tokens]`, in f32."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name.removeprefix("bert."): w for name, w in load_file(folder / "model.safetensors").items()}
        self.inputs = {}

    def linear(self, name, x, shared=None):
        """Multiplies, and stores `x` as the input of this matrix, under a name that matrices can share."""
        self.inputs[shared or name] = x.reshape(-1, x.shape[-1])
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def norm(self, name, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[name + ".weight"] + self.weights[name + ".bias"]

    def attention(self, layer, x):
        windows, tokens, hidden = x.shape
        heads = self.config["num_attention_heads"]
        split = lambda y: y.reshape(windows, tokens, heads, hidden // heads).swapaxes(1, 2)
        q, k, v = (split(self.linear(f"{layer}.self.{part}", x, f"{layer}.self")) for part in ("query", "key", "value"))
        scores = q @ k.swapaxes(2, 3) / np.float32(math.sqrt(hidden // heads))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return self.linear(f"{layer}.output.dense", mixed.swapaxes(1, 2).reshape(x.shape))

    def run(self, tokens):
        """Returns the hidden states after the last layer."""
        names = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
        word, position, kind = (self.weights[name] for name in names)
        x = self.norm("embeddings.LayerNorm", word[tokens] + position[: tokens.shape[1]] + kind[0])
        for i in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{i}"
            x = self.norm(f"{layer}.attention.output.LayerNorm", x + self.attention(f"{layer}.attention", x))
            wide = self.linear(f"{layer}.intermediate.dense", x)
            wide = (wide * 0.5 * (1 + erf(wide / math.sqrt(2)))).astype(np.float32)
            x = self.norm(f"{layer}.output.LayerNorm", x + self.linear(f"{layer}.output.dense", wide))
        return x

    def sentences(self, tokens):
        """Returns a normalized vector for each window: the mean over its tokens."""
        mean = self.run(tokens).mean(1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def windows(folder, text):
    """Returns token ids `[WINDOWS, WINDOW]` of each half of the text, with special tokens around each window."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start, end = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    size, half = WINDOW - 2, len(ids) // 2
    if half < WINDOWS * size:
        sys.exit(f"the text has {len(ids)} tokens, {2 * WINDOWS * size} are needed")
    part = lambda first: [[start, *ids[i : i + size], end] for i in range(first, first + WINDOWS * size, size)]
    return np.array(part(0)), np.array(part(half))


def matrices(bert):
    """Returns the names of the matrices, each with the name of its inputs."""
    names = [name.removesuffix(".weight") for name in bert.weights if name.startswith("encoder.") and name.endswith(".weight")]
    names = [name for name in names if "LayerNorm" not in name]
    return {name: name.rsplit(".", 1)[0] if ".self." in name else name for name in sorted(names)}


def write_inputs(folder, text, work):
    bert = Bert(folder)
    first, second = windows(folder, text.read_text())
    bert.run(first)
    tensors = {f"inputs/{name}": np.ascontiguousarray(x) for name, x in bert.inputs.items()}
    of = matrices(bert)
    tensors |= {name: bert.weights[name + ".weight"] for name in of}
    save_file(tensors, work / "inputs.safetensors", {name: f"inputs/{shared}" for name, shared in of.items()})
    save_file({"second": second}, work / "tokens.safetensors")


def scale_and_zero(w, symmetric):
    """Returns the scale and the zero of each row of `w`, a group of columns; levels are 0 to 15."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    flat = high == low
    scale = np.where(flat, 1, (high - low) / LEVELS)
    zero = np.full(len(w), (LEVELS + 1) / 2) if symmetric else np.round(-low / scale)
    return scale, zero


def rounded(w, scale, zero):
    return scale * (np.clip(np.round(w / scale) + zero, 0, LEVELS) - zero)


def rtn(w, symmetric):
    """Rounds to the nearest level."""
    q = np.empty_like(w)
    for start in range(0, w.shape[1], GROUP):
        part = w[:, start : start + GROUP]
        scale, zero = scale_and_zero(part, symmetric)
        q[:, start : start + GROUP] = rounded(part, scale[:, None], zero[:, None])
    return q


def gptq(w, hessian, symmetric):
    """Rounds by GPTQ, the columns with the largest inputs first; groups follow that order."""
    w, hessian = w.astype(np.float64), hessian.copy()
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, hessian = w[:, order], hessian[order][:, order]
    hessian += DAMPING * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    q = np.empty_like(w)
    for col in range(w.shape[1]):
        if col % GROUP == 0:
            scale, zero = scale_and_zero(w[:, col : col + GROUP], symmetric)
        q[:, col] = rounded(w[:, col], scale, zero)
        error = (w[:, col] - q[:, col]) / upper[col, col]
        w[:, col + 1 :] -= np.outer(error, upper[col, col + 1 :])
    return q[:, np.argsort(order)].astype(np.float32)


def score(folder, work):
    bert = Bert(folder)
    plain = {name: bert.weights[name + ".weight"] for name in matrices(bert)}
    second = load_file(work / "tokens.safetensors")["second"]
    bert.run(second)
    of = matrices(bert)
    # |X E^T|^2 = tr(E X^T X E^T).
    held_out = {name: x.T.astype(np.float64) @ x.astype(np.float64) for name, x in bert.inputs.items()}
    few = second[:SENTENCES]
    expected = bert.sentences(few)

    hessians = {}
    with safe_open(work / "inputs.safetensors", "np") as file:
        for shared in set(of.values()):
            x = file.get_tensor(f"inputs/{shared}").astype(np.float64)
            hessians[shared] = x.T @ x
    variants = {}
    for kind, symmetric in (("symmetric", True), ("asymmetric", False)):
        # A scale of 16 bits, and 4 bits for the zero.
        bits = 4 + (16 if symmetric else 20) / GROUP
        variants[f"INT4-g128 {kind}, RTN"] = bits, lambda name, s=symmetric: rtn(plain[name], s)
        variants[f"INT4-g128 {kind}, GPTQ"] = bits, lambda name, s=symmetric: gptq(plain[name], hessians[of[name]], s)
    outputs = safe_open(work / "outputs.safetensors", "np")
    bits = outputs.metadata()
    for encoding in ("q8", "q4", "t4", "t3", "t2"):
        for kind in ("", " calibrated"):
            variant = f"{encoding}{kind}"
            variants[f"`{encoding}`{kind}"] = (
                float(bits[encoding]),
                lambda name, v=variant: outputs.get_tensor(f"{v}/{name}"),
            )

    print("| | bits per weight | error of weights | error of outputs | largest | cosine of sentences |")
    print("|---|---|---|---|---|---|")
    size_of = lambda w, hessian: np.sqrt(np.sum((w @ hessian) * w))
    for label, (size, decoded) in variants.items():
        matrix_errors, output_errors, layers = [], [], {}
        for name, w in plain.items():
            layers[name + ".weight"] = q = decoded(name)
            error, hessian = q.astype(np.float64) - w, held_out[of[name]]
            matrix_errors.append(np.linalg.norm(error) / np.linalg.norm(w))
            output_errors.append(size_of(error, hessian) / size_of(w, hessian))
        changed = Bert(folder)
        changed.weights |= layers
        cosine = np.mean(np.sum(changed.sentences(few) * expected, axis=1))
        mean = lambda errors: np.sqrt(np.mean(np.square(errors)))
        print(
            f"| {label} | {size:.2f} | {mean(matrix_errors):.4f} | {mean(output_errors):.4f} | {max(output_errors):.4f} "
            f"| {cosine:.5f} |",
            flush=True,
        )


def main():
    match sys.argv[1:]:
        case ["inputs", model, text, work]:
            write_inputs(Path(model), Path(text), Path(work))
        case ["score", model, work]:
            score(Path(model), Path(work))
        case _:
            sys.exit(__doc__)


main()

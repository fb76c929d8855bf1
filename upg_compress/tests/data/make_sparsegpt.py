#!/usr/bin/env python3
"""Makes sparsegpt.safetensors: a matrix, inputs of it, and the matrix as SparseGPT prunes it.

`fasterprune` of github.com/IST-DASLab/sparsegpt (sparsegpt.py), repeated in float64 with numpy: with the inverse of the
Hessian and its Cholesky factor, where UPG has the factors of the Hessian itself. Of two equal scores at the threshold the
original prunes both, here neither goes.

Needs: pip install numpy safetensors. Usage: make_sparsegpt.py
"""
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROWS, COLS, INPUTS, BLOCK, DAMPING = 70, 150, 200, 128, 0.01
RNG = np.random.default_rng(7)


def fasterprune(w, h, sparsity):
    w = w.copy()
    h = h + DAMPING * np.mean(np.diag(h)) * np.eye(COLS)
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T
    for start in range(0, COLS, BLOCK):
        end = min(start + BLOCK, COLS)
        block, factor = w[:, start:end], hinv[start:end, start:end]
        scores = block**2 / np.diag(factor) ** 2
        threshold = np.sort(scores.flatten())[round(scores.size * sparsity)]
        mask = scores < threshold
        errors = np.zeros_like(block)
        for i in range(end - start):
            q = np.where(mask[:, i], 0, block[:, i])
            errors[:, i] = (block[:, i] - q) / factor[i, i]
            block[:, i:] -= np.outer(errors[:, i], factor[i, i:])
            block[:, i] = q
        w[:, end:] -= errors @ hinv[start:end, end:]
    return w


# Values that f16 holds exactly; inputs whose columns depend on each other, some of them large.
w = RNG.standard_normal((ROWS, COLS)).astype(np.float16)
x = RNG.standard_normal((INPUTS, COLS))
x[:, 1:] += 0.8 * x[:, :-1]
x[:, COLS // 3] *= 8
x = x.astype(np.float16)
w64, x64 = w.astype(np.float64), x.astype(np.float64)
pruned = fasterprune(w64, x64.T @ x64, 0.5)
print("kept", np.mean(pruned != 0), "outputs", np.linalg.norm(x64 @ (pruned - w64).T) / np.linalg.norm(x64 @ w64.T))
save_file({"weights": w, "inputs": x, "pruned": pruned.astype(np.float32)}, Path(__file__).parent / "sparsegpt.safetensors")

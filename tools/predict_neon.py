#!/usr/bin/env python3
"""Prints the cycles that llvm-mca predicts for the inner loops of the kernels for 64-bit ARM.

Nothing is measured: all loads hit the L1 cache, all branches are predicted.

Usage: tools/predict_neon.py [LLVM_MCA]

Needs Rust with the standard library for aarch64-unknown-linux-gnu (tools/test_neon.sh adds it) and llvm-mca
(Debian, Ubuntu: apt install llvm-19, then llvm-mca-19).
"""

import re
import subprocess
import sys
from pathlib import Path

TARGET = "aarch64-unknown-linux-gnu"
PROCESSORS = ["neoverse-v2", "apple-m1"]
# Parts of the mangled names of the functions whose loops a weight passes through.
ENCODINGS = {
    "`q8`": ["products.*5BytesKb1"],
    "`q4`": ["products.*7Nibbles"],
    "`s8`": ["KeptKb0_E12expand_block", "products.*4Kept"],
    "`s4`": ["KeptKb1_E12expand_block", "products.*4Kept"],
}
for k in (2, 3, 4):
    ENCODINGS[f"`t{k}`"] = [f"products.*7TrellisKj{k}_"]


def assembly():
    """Returns the assembly of the crate, as `cargo build --release` compiles it."""
    command = f"cargo rustc --package upg_kernel --lib --locked --target {TARGET} --message-format json"
    flags = "-C opt-level=3 -C overflow-checks=off -C debug-assertions=off -C codegen-units=1"
    flags += " -C debuginfo=0 -C symbol-mangling-version=v0 --emit asm"
    out = subprocess.run(
        [*command.split(), "--", *flags.split()], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    folder = re.findall(r'"([^"]*/deps)/libupg_kernel-[^"]*rmeta"', out)[-1]
    return max(Path(folder).glob("upg_kernel-*.s"), key=lambda f: f.stat().st_mtime).read_text()


def functions(text):
    """Yields pairs of a mangled name and the lines of its function."""
    for match in re.finditer(r"^(_R\w+):\n(.*?)^\.Lfunc_end", text, re.M | re.S):
        # Names repeat no constant: `KB13_` is the one that came before.
        name = re.sub(r"^(.*?products(Kj\d_).*?Trellis)KB\w+?_", r"\1\2", match[1])
        yield name, [line.split("//")[0].strip() for line in match[2].splitlines()]


def innermost_loops(lines):
    """Yields lists of instructions, each from a label to the branch back to it."""
    at = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        target = re.fullmatch(r"(?:b|b\.\w+|c?bn?z|tbn?z)\s.*?(\.L\w+)", line)
        start = at.get(target[1], i) if target else i
        if start < i:
            loops.append((start, i))
    for start, end in loops:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
            yield [l for l in lines[start:end] if l and not l.startswith(".")]


def cycles(mca, processor, loop):
    """Returns the cycles of one iteration of many."""
    command = [mca, "-march=aarch64", f"-mcpu={processor}", "-iterations=500"]
    out = subprocess.run(command, check=True, input="\n".join(loop), capture_output=True, text=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", out)[1]) / 500


def main():
    mca = sys.argv[1] if len(sys.argv) > 1 else "llvm-mca-19"
    found = [f for f in functions(assembly()) if "Widened" not in f[0]]
    print("| |", " | ".join(PROCESSORS), "|")
    print("|---" * (len(PROCESSORS) + 1) + "|")
    for encoding, names in ENCODINGS.items():
        totals = [0.0] * len(PROCESSORS)
        for name in names:
            lines = next((lines for symbol, lines in found if re.search(name, symbol)), None)
            assert lines, f"no function {name}"
            # The longest loop, except those that also handle an end.
            loops = [l for l in innermost_loops(lines) if not any(i.startswith("bl\t") for i in l)]
            loop = max(loops, key=len)
            # An `sdot` multiplies 16 levels, once for each plane; a loop without products expands 64
            # weights.
            weights = 8 * sum(i.startswith("sdot") for i in loop) or 64
            for i, processor in enumerate(PROCESSORS):
                totals[i] += cycles(mca, processor, loop) * 64 / weights
        print(f"| {encoding} |", " | ".join(f"{total:.1f}" for total in totals), "|")


main()

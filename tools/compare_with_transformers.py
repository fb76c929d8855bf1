"""Checks that a decompressed model generates in transformers what the UPG file generates in upg.

    python3 tools/compare_with_transformers.py path/to/upg FILE [PROMPT ...]

Decompresses FILE as F32, continues each prompt greedily by 30 tokens with Hugging Face transformers
(float32, CPU), and compares the text with that of `upg run`. Needs torch and transformers.
"""
import subprocess
import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea, there lived"]
TOKENS = 30


def main(upg, file, prompts):
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        run(upg, "decompress", file, "-o", folder, "--dtype", "f32")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            with torch.no_grad():
                out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
            expected = prompt + tokenizer.decode(out, skip_special_tokens=True) + "\n"
            found = run(upg, "run", file, "-p", prompt, "-n", str(TOKENS), "--temperature", "0", "--quiet")
            different += found != expected
            print(f"{'same' if found == expected else 'DIFFERENT'}: {found!r}")
            if found != expected:
                print(f"transformers: {expected!r}")
    return different


def run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}: {result.stderr}")
    return result.stdout


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:] or PROMPTS) != 0)

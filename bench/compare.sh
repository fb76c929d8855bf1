#!/usr/bin/env bash
# Measures upg beside llama.cpp on this machine, with the same small model in encodings of similar size.
# Safe to re-run: what was built, fetched or made is used again.
set -euo pipefail

usage() {
    cat <<'END'
Usage: bench/compare.sh [--rounds N] [--no-record]

Builds llama.cpp for this processor (once, about 8 minutes on two cores), makes GGUF and UPG files of
SmolLM2-135M-Instruct, and measures both with 1 thread and with all: prompts of 512 tokens, then 128
tokens one by one, in turn, N rounds. Prints a table and writes it to bench/record/, with all figures
as JSON beside it. A record of the same day and processor is replaced. 5 rounds take about 10 minutes.

  --rounds N    measurements of each figure [default: 5]
  --no-record   only print the table

Needs Rust (cargo), C and C++ compilers, Python 3 with pip and venv, git, 4 GB of disk and, the first
time, a network (180 MB). Writes models/, bench/record/ and cargo's target folder. Nothing else should
run on the machine.
END
}

# fail MESSAGE: ends with exit code 1.
fail() {
    echo "compare.sh: $1" >&2
    exit 1
}

rounds=5
record=yes
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --no-record) record= ;;
    --rounds)
        [[ ${2-} =~ ^[1-9][0-9]*$ ]] || { echo "compare.sh: --rounds takes a number from 1 on" >&2 && exit 2; }
        rounds=$2
        shift
        ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/need.sh"
. "$root/bench/llama.sh"
need_tools "$root"
need_venv
need_llama
cd "$root"

echo "1/4  Building upg" >&2
cargo build --release --quiet --package upg_cli --locked
target=$(target_folder)
upg=$target/release/upg

version=$(llama_version)
llama=$target/llama.cpp/$version
echo "2/4  Building llama.cpp (of llama-cpp-python $version)" >&2
build_llama "$llama"

echo "3/4  Making the models" >&2
source=$(python3 tools/get_smollm2.py models)
folder=models/compare
mkdir -p "$folder"
# Encodings, and the GGUF types of about their size.
encodings=(q8 q4 t3)
types_of() {
    case $1 in
    q8) echo Q8_0 ;;
    q4) echo Q4_0 Q4_K_M ;;
    t3) echo Q3_K_M Q2_K ;;
    esac
}

for encoding in "${encodings[@]}"; do
    # An older file may come from an older upg, with other results.
    out=$folder/smollm2-$encoding.safetensors
    if [ ! "$out" -nt "$upg" ]; then
        "$upg" compress "$source" --output "$out" --encoding "$encoding" --no-calibrate >&2
    fi
    for type in $(types_of "$encoding"); do
        out=$folder/smollm2-$type.gguf log=$folder/quantize.log
        if [ "$out" -nt "$llama/bin/llama-quantize" ]; then continue; fi
        # Requantizing costs quality, which is not measured here, but no speed.
        "$llama/bin/llama-quantize" --allow-requantize "$source" "$out.partial" "$type" >"$log" 2>&1 ||
            fail "llama-quantize failed: see $log"
        mv "$out.partial" "$out"
    done
done

# works: succeeds if llama-bench can compute a prompt here.
works() {
    "$llama/bin/llama-bench" -m "$folder/smollm2-Q8_0.gguf" -t 1 -p 64 -n 0 -r 1 >"$folder/llama-bench.log" 2>&1
}

built="built for this processor"
if ! (works) 2>/dev/null && grep -qw amx_int8 /proc/cpuinfo; then
    # Its kernels for AMX end with a segmentation fault on some machines.
    echo "     llama.cpp fails with AMX here; building it without" >&2
    llama=$llama-without-amx
    built="$built without AMX, with which it crashed"
    build_llama "$llama" "-mno-amx-tile -mno-amx-int8"
fi
works || fail "llama-bench fails: see $folder/llama-bench.log"

echo "4/4  Measuring ($rounds rounds)" >&2
raw=$(mktemp -d)
trap 'rm -rf "$raw"' EXIT
cores=$(python3 -c 'import os
try: print(len(os.sched_getaffinity(0)))
except AttributeError: print(os.cpu_count())')
for threads in $(printf '%s\n' 1 "$cores" | uniq); do
    for encoding in "${encodings[@]}"; do
        others=()
        for type in $(types_of "$encoding"); do
            others+=(--compare-llama "$folder/smollm2-$type.gguf")
        done
        echo "     $threads threads: $encoding beside $(types_of "$encoding")" >&2
        "$upg" bench "$folder/smollm2-$encoding.safetensors" "${others[@]}" \
            --llama-bench "$llama/bin/llama-bench" --threads "$threads" \
            --prompt-tokens 512 --generate 128 --repetitions "$rounds" --json >"$raw/$threads-$encoding.json"
    done
done
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit="$commit with changes"; fi
python3 bench/table.py --commit "$commit" --bindings "$version" --built "$built" ${record:+--record bench/record} "$raw"/*.json

#!/usr/bin/env bash
# Measures how much of a small model upg and llama.cpp preserve at each size. Safe to re-run: what was
# built, fetched, made or measured is used again.
set -euo pipefail

usage() {
    cat <<'END_OF_USAGE'
Usage: bench/quality.sh [--text FILE] [--calibrate FILE] [--windows N] [--no-record]

Builds upg and llama.cpp, compresses SmolLM2-135M-Instruct with both in many sizes, and measures the
distance of each from the original: the Kullback-Leibler divergence of next tokens over the same windows
of the same text. Prints a table and writes it to bench/record/, with a plot and all figures as JSON
beside it. A record of the same day and processor is replaced. The first time takes about an hour and a
quarter on two cores.

  --text FILE       text to score [default: the second half of upg_kernel/tests/data/emma.txt]
  --calibrate FILE  text to calibrate both on, its first 64 sequences of 512 tokens [default: the text
                    that comes with upg]
  --windows N       windows of 512 tokens to score [default: 12]
  --no-record       only print the table

Needs Rust (cargo), C and C++ compilers, Python 3 with pip and venv, git, 5 GB of disk and, the first
time, a network (200 MB). Writes models/, bench/record/ and cargo's target folder.
END_OF_USAGE
}

# fail MESSAGE: ends with exit code 1.
fail() {
    echo "quality.sh: $1" >&2
    exit 1
}

text='' calibrate='' windows=12 record=yes
given=$*
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --no-record) record= ;;
    --text | --calibrate)
        [ -f "${2-}" ] || { echo "quality.sh: $1 takes a file" >&2 && exit 2; }
        printf -v "${1#--}" %s "$(realpath "$2")"
        shift
        ;;
    --windows)
        [[ ${2-} =~ ^[1-9][0-9]*$ ]] || { echo "quality.sh: --windows takes a number from 1 on" >&2 && exit 2; }
        windows=$2
        shift
        ;;
    *) usage >&2 && exit 2 ;;
    esac
    shift
done

# Types of llama.cpp: names of llama-quantize.
llama_types=(Q8_0 Q6_K Q5_K_M Q4_K_M Q4_K_S Q4_0 IQ4_XS Q3_K_M IQ3_S IQ3_XXS Q2_K IQ2_M IQ2_XS IQ2_XXS IQ1_M)
# Files of upg: a name, then options of `upg compress`.
upg_recipes=(
    "q8 --encoding q8"
    "q4 --encoding q4"
    "t4 --encoding t4"
    "t3 --encoding t3"
    "t2 --encoding t2"
    "3.5 --bpw 3.5"
    "2.5 --bpw 2.5"
)
# Sequences of 512 tokens that both calibrate on, at most.
sequences=64
# The embedding, which is also the output head, has 8 bits in both, so that the blocks are compared.
llama_embedding=(--token-embedding-type q8_0 --output-tensor-type q8_0)
upg_embedding=(--embedding q8)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/need.sh"
. "$root/bench/llama.sh"
need_tools "$root"
need_venv
need_llama
cd "$root"

echo "1/5  Building upg" >&2
cargo build --release --quiet --package upg_cli --locked
target=$(target_folder)
upg=$target/release/upg

version=$(llama_version)
llama=$target/llama.cpp/$version
echo "2/5  Building llama.cpp (of llama-cpp-python $version)" >&2
build_llama "$llama"

echo "3/5  Making the originals" >&2
source=$(python3 tools/get_smollm2.py models)
folder=models/quality
mkdir -p "$folder"
python=$target/quality-venv/bin/python
make_venv "$target/quality-venv" bench/quality-python.txt
emma=upg_kernel/tests/data/emma.txt
text_name=${text##*/} calibrate_name=${calibrate##*/}
if [ -z "$calibrate" ]; then
    calibrate=upg_compress/data/calibration.txt calibrate_name="the text that comes with upg"
fi
if [ -z "$text" ]; then
    text=$folder/emma-second.txt text_name="the second half of emma.txt"
    tail -c +75166 $emma >"$text"
fi
# Figures depend on two texts and on the numbers of windows and sequences.
results=$folder/$({ echo "$windows $sequences"; sha256sum <"$text"; sha256sum <"$calibrate"; } | sha256sum | head -c 12)
mkdir -p "$results"

# made OUT INPUT... -- COMMAND...: runs COMMAND, which writes OUT.partial, unless OUT is newer than every
# INPUT.
# A function as COMMAND joins its steps by &&, because bash does not end it at a failing step.
made() {
    local out=$1 input stale=
    shift
    while [ "$1" != -- ]; do
        input=$1
        [ "$out" -nt "$input" ] || stale=yes
        shift
    done
    shift
    if [ -z "$stale" ]; then return; fi
    "$@" >"$out.log" 2>&1 || fail "$1 failed: see $out.log"
    mv "$out.partial" "$out"
}

# Waiting threads leave the processor to other programs.
export OMP_WAIT_POLICY=passive
cores=$(python3 -c 'import os
try: print(len(os.sched_getaffinity(0)))
except AttributeError: print(os.cpu_count())')
original=$folder/original.gguf padded=$folder/padded.gguf
make_original=("$python" bench/original_gguf.py "$source")
made "$original" "$source" bench/original_gguf.py -- "${make_original[@]}" "$original.partial"
made "$padded" "$source" bench/original_gguf.py -- "${make_original[@]}" "$padded.partial" --multiple 256

echo "4/5  llama.cpp: ${llama_types[*]}" >&2
imatrix=$results/imatrix.gguf base=$results/base.logits
made "$imatrix" "$padded" "$llama/bin/llama-imatrix" -- "$llama/bin/llama-imatrix" \
    --model "$padded" --file "$calibrate" --ctx-size 512 --chunks "$sequences" --threads "$cores" --no-ppl --output-format gguf \
    --output-file "$imatrix.partial"
perplexity=("$llama/bin/llama-perplexity" --file "$text" --ctx-size 512 --chunks "$windows" --threads "$cores")
made "$base" "$padded" "$llama/bin/llama-perplexity" -- \
    "${perplexity[@]}" --model "$padded" --kl-divergence-base "$base.partial"

# measure_llama TYPE OUT: makes a GGUF file, writes its figures to OUT as JSON, and removes it.
measure_llama() {
    local type=$1 out=$2 gguf=$results/$1.gguf
    "$llama/bin/llama-quantize" --imatrix "$imatrix" "${llama_embedding[@]}" "$padded" "$gguf" "$type" "$cores" &&
        "${perplexity[@]}" --model "$gguf" --kl-divergence-base "$base" --kl-divergence >"$out.measured" &&
        "$python" bench/quality_llama.py "$gguf" "$out.measured" >"$out" &&
        rm "$gguf" "$out.measured"
}

llama_files=()
for type in "${llama_types[@]}"; do
    out=$results/llama-$type.json
    echo "     $type" >&2
    made "$out" "$base" "$imatrix" "$llama/bin/llama-quantize" -- measure_llama "$type" "$out.partial"
    llama_files+=("$type=$out")
done

echo "5/5  upg: ${upg_recipes[*]%% *}" >&2
evaluate=("$upg" eval --text "$text" --windows "$windows" --json)

# measure_upg OUT OPTION...: makes a UPG file, writes its figures to OUT as JSON, and removes it.
measure_upg() {
    local out=$1 file=${1%.json.partial}.safetensors
    shift
    "$upg" compress "$original" --output "$file" "${upg_embedding[@]}" --calibrate "$calibrate" \
        --calibration-tokens $((512 * sequences)) "$@" &&
        "${evaluate[@]}" "$file" --against "$original" --logits "$results/upg.logits" >"$out" &&
        rm "$file"
}

# The original as a UPG file: the reference.
keep=$folder/keep.safetensors whole=$results/original.json
made "$keep" "$original" -- "$upg" compress "$original" --output "$keep.partial" --encoding keep
measure_original() {
    "${evaluate[@]}" "$keep" --cache-type f32 >"$1"
}
made "$whole" "$keep" "$upg" -- measure_original "$whole.partial"
upg_files=()
for recipe in "${upg_recipes[@]}"; do
    read -r name options <<<"$recipe"
    # The name of the file contains the options, so that other options are measured again.
    out=$results/upg-$name$(tr -c 'A-Za-z0-9.*=,\n' _ <<<" $options").json
    echo "     $name" >&2
    # shellcheck disable=SC2086 # options are several words
    made "$out" "$original" "$upg" -- measure_upg "$out.partial" $options
    upg_files+=("$name=$out")
done

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then commit="$commit with changes"; fi
python3 bench/quality_table.py --commit "$commit" --bindings "$version" --windows "$windows" \
    --text "$text_name" --calibrate "$calibrate_name" --original "$whole" --base-log "$base.log" --options="$given" \
    ${record:+--record bench/record} --llama "${llama_files[@]}" --upg "${upg_files[@]}"

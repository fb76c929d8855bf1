#!/usr/bin/env bash
# Works on one model from four threads for hours and checks that memory and threads do not grow.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/soak.sh [MINUTES [FILE [SEED]]]

Builds the example `soak` and runs it on FILE for MINUTES (60). The default FILE is
models/smollm2-q4.safetensors, which is made as by quickstart.sh if it is missing. The work is texts,
streams dropped half way, interrupted passes, errors, batches and chat templates, chosen by SEED (1).
Prints memory and threads every ten seconds. Ends with exit code 1 if a call misbehaves, or if after the
first tenth of the time the allocated bytes grow, the resident size grows by more than 2 %, or the
threads become more (sizes and threads: Linux only).

UPG_SOAK_PROFILE=dev builds with the checks of the tests instead of in the release profile.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
-*) usage >&2 && exit 2 ;;
esac
minutes=${1-60} file=${2-} seed=${3-1} profile=${UPG_SOAK_PROFILE:-release}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/tools/need.sh"
need_tools "$root"
if [ -n "$file" ]; then file=$(realpath "$file"); fi
cd "$root"
# With the features of the tests, so that dependencies are compiled once for both.
build=(cargo build --quiet --workspace --features metal --locked --profile "$profile")
built=$(target_folder)/${profile/dev/debug}
if [ -z "$file" ]; then
    file=models/smollm2-q4.safetensors
    if [ ! -f "$file" ]; then
        gguf=$(python3 tools/get_smollm2.py models)
        "${build[@]}" --bin upg
        "$built/upg" compress "$gguf" --output "$file" --encoding q4 --embedding q4 --no-calibrate
    fi
fi
"${build[@]}" --example soak
exec "$built/examples/soak" "$file" "$minutes" "$seed"

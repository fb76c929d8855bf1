#!/usr/bin/env bash
# Hours of work on one model from four threads: do memory and threads stay as they are?
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/soak.sh [MINUTES [FILE [SEED]]]

Builds the example `soak` and lets it use FILE (models/smollm2-q4.safetensors, which it makes as quickstart.sh does
if it is missing) for MINUTES (60): texts, streams dropped half way, interrupted passes, errors, batches, chat
templates, chosen by SEED (1). Prints memory and threads every ten seconds. Ends with exit code 1 if a call
does what it should not, or if after the first tenth of the time allocated bytes have grown, the resident size by
more than 2 %, or threads are more (sizes and threads: Linux only).

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
        "$built/upg" compress "$gguf" --output "$file" --encoding q4 --embedding q4
    fi
fi
"${build[@]}" --example soak
exec "$built/examples/soak" "$file" "$minutes" "$seed"

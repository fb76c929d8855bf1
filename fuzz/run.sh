#!/usr/bin/env bash
# Builds and runs the fuzz targets.
set -euo pipefail

usage() {
    cat <<'END'
Usage: fuzz/run.sh [--seconds N] [--merge] [--list] [TARGET...]

Runs each fuzz target for N seconds (60), one after the other, with edge coverage and
AddressSanitizer. An input that crashes, takes over 2 seconds or over 512 MB ends the target and is
stored in fuzz/artifacts/TARGET. Prints a line for each target: executions, edges, stored inputs. Ends
with exit code 1 if a target failed.

  --merge   instead of running, replaces fuzz/seeds/TARGET by the smallest inputs that cover what the
            working corpus (fuzz/corpus/TARGET) and the seeds cover
  --list    prints the names of the targets

Without the name of a target, all targets run. Needs cargo-fuzz 0.13 (`cargo install --locked
cargo-fuzz`). The sanitizer is an unstable option of the compiler: on a stable toolchain
RUSTC_BOOTSTRAP=1 is set.
END
}

cd "$(dirname "${BASH_SOURCE[0]}")"
seconds=60 merge=
targets=()
while [ $# -gt 0 ]; do
    case $1 in
    --seconds) seconds=$2 && shift 2 ;;
    --merge) merge=1 && shift ;;
    --list) sed -n 's/^name = "\([a-z_]*\)"$/\1/p' Cargo.toml | grep -v upg_fuzz && exit ;;
    -h | --help) usage && exit ;;
    -*) usage >&2 && exit 2 ;;
    *) targets+=("$1") && shift ;;
    esac
done
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(./run.sh --list)

if ! cargo fuzz --version >/dev/null 2>&1; then
    echo "Missing: cargo-fuzz. Get it with: cargo install --locked cargo-fuzz" >&2
    exit 1
fi
rustc --version | grep -q nightly || export RUSTC_BOOTSTRAP=1
# AddressSanitizer holds freed memory to detect its use, by default 256 MB, which would count as the
# target's.
export ASAN_OPTIONS=quarantine_size_mb=16:detect_leaks=0:allocator_may_return_null=0
# Input files are in memory, if there is such a folder.
[ ! -d /dev/shm ] || export TMPDIR=${TMPDIR:-/dev/shm}

cargo fuzz build --fuzz-dir . >&2
triple=$(rustc -vV | sed -n 's/^host: //p')
bins=target/$triple/release
limits=(-rss_limit_mb=512 -malloc_limit_mb=512 -timeout=2 -max_len=65536)

failed=0
for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" "seeds/$target" "artifacts/$target"
    run=("$bins/$target" "-artifact_prefix=artifacts/$target/")
    if [ -n "$merge" ]; then
        smallest=$(mktemp -d)
        "${run[@]}" "${limits[@]}" -merge=1 "$smallest" "seeds/$target" "corpus/$target" 2>&1 | tail -n 1
        find "seeds/$target" -type f -delete
        find "$smallest" -type f -exec mv -t "seeds/$target" {} +
        rmdir "$smallest"
        continue
    fi
    log=artifacts/$target.log
    dictionary=()
    [ ! -f "$target.dict" ] || dictionary=("-dict=$target.dict")
    status=0
    "${run[@]}" "${limits[@]}" "${dictionary[@]}" "-max_total_time=$seconds" -print_final_stats=1 -verbosity=1 \
        "corpus/$target" "seeds/$target" >"$log" 2>&1 || status=$?
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    edges=$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1 | cut -d' ' -f2)
    printf '%-20s %10s executions, %6s edges, %6s inputs\n' "$target" "${executions:-0}" "${edges:-0}" \
        "$(find "corpus/$target" -type f | wc -l)"
    if [ "$status" -ne 0 ] || [ "${executions:-0}" -eq 0 ]; then
        echo "$target has failed: see fuzz/$log, and the input in fuzz/artifacts/$target" >&2
        failed=1
    fi
done
exit $failed

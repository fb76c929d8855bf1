#!/usr/bin/env bash
# Runs the tests of the unsafe code under AddressSanitizer or ThreadSanitizer.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/sanitize.sh address|thread [SECONDS]

address  checks every access to memory in the tests of the kernels, the memory map, arrays, matrices and
         the team of threads, optimized and without overflow checks as in a release. The test with a
         writer beside every kernel takes SECONDS (60) for each instruction set.
thread   checks every pair of accesses from two threads in the tests of the team of threads.

Needs a C compiler on Linux. The sanitizers are unstable options of the compiler: on a stable toolchain
RUSTC_BOOTSTRAP=1 is set. ThreadSanitizer must see the standard library too, which is rebuilt from its
source (rustup component add rust-src).
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1-}" in
address | thread) sanitizer=$1 ;;
-h | --help) usage && exit ;;
*) usage >&2 && exit 2 ;;
esac
export UPG_STRESS_SECONDS=${2-60}

rustc --version | grep -q nightly || export RUSTC_BOOTSTRAP=1
triple=$(rustc -vV | sed -n 's/^host: //p')
build=()
case $sanitizer in
address)
    tests=(array:: kernels:: mapped:: matrix:: team::)
    # The test harness leaks.
    export ASAN_OPTIONS=detect_leaks=0
    ;;
thread)
    tests=(team::)
    if [ ! -d "$(rustc --print sysroot)/lib/rustlib/src/rust/library" ]; then
        echo "Missing: the source of the standard library. Get it with: rustup component add rust-src" >&2
        exit 1
    fi
    build=(-Zbuild-std)
    ;;
esac

# With a target, the flags do not apply to build scripts. A separate folder, because everything is
# compiled with other flags.
export RUSTFLAGS="-Zsanitizer=$sanitizer ${RUSTFLAGS-}"
CARGO_TARGET_DIR=$(pwd)/target/sanitize-$sanitizer
export CARGO_TARGET_DIR
cargo=(cargo test "${build[@]}" --release --package upg_kernel --lib --locked --target "$triple" --)
all=$("${cargo[@]}" --list)
for filter in "${tests[@]}"; do
    if ! grep -q "^$filter.*: test\$" <<<"$all"; then
        echo "no tests match $filter" >&2
        exit 1
    fi
done
# This compiler does not compile the kernels for Apple GPUs.
"${cargo[@]}" --nocapture "${tests[@]}" --skip metal_kernels

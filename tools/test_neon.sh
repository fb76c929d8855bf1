#!/usr/bin/env bash
# Tests the kernels for 64-bit ARM in an emulator. Safe to re-run: nothing is fetched twice.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/test_neon.sh

Builds the tests of the kernels for 64-bit ARM and runs them in QEMU, as a processor with dot products
of bytes and, with UPG_TEST_KERNELS=1, also as one without. (tools/check_apple.sh runs clippy for such processors.)

Needs Rust (cargo), 2 GB of disk and, the first time, a network. Installs what is missing: with apt-get
(Debian, Ubuntu; as root) a C compiler and library for ARM and QEMU, with rustup the standard library
of Rust for 64-bit ARM. Writes cargo's target folder.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
?*) usage >&2 && exit 2 ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
linux=aarch64-unknown-linux-gnu

install() {
    if ! command -v apt-get >/dev/null; then
        echo "Missing: $*, or what your system calls them; this script can install them with apt-get only" >&2
        exit 1
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

has_linker() {
    command -v aarch64-linux-gnu-gcc >/dev/null && [ -e "$(aarch64-linux-gnu-gcc -print-file-name=libc.a)" ]
}

has_std() {
    local folder
    folder=$(rustc --print target-libdir --target "$1" 2>/dev/null) && ls "$folder"/libstd-* >/dev/null 2>&1
}

# add_std TARGET: adds the standard library; fails if rustup is missing or cannot add it.
add_std() {
    has_std "$1" || { command -v rustup >/dev/null && timeout 300 rustup target add "$1" && has_std "$1"; }
}

has_linker || install gcc-aarch64-linux-gnu libc6-dev-arm64-cross
command -v qemu-aarch64 >/dev/null || install qemu-user
if ! add_std $linux; then
    echo "Missing: the standard library of Rust for $linux. Get it: rustup target add $linux" >&2
    exit 1
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
# A static program needs no libraries in the emulator.
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static"
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# test_as PROCESSOR true|false: runs the tests as PROCESSOR, with or without dot products, which a test
# reports. Output goes to a file.
test_as() {
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu $1" \
        cargo test --package upg_kernel --lib --no-default-features --locked --target $linux -- \
        kernels:: --skip metal_kernels:: --nocapture --test-threads 1 >"$logs/$1" 2>&1 || return
    for line in "dot products: $2" \
        "every_kernel_multiplies_every_encoding_as_the_reference_does ... ok" \
        "every_kernel_multiplies_many_vectors_as_the_reference_does ... ok"; do
        if ! grep -qF "$line" "$logs/$1"; then
            echo "As $1, the tests did not say '$line'" >>"$logs/$1"
            return 1
        fi
    done
}

cargo test --package upg_kernel --lib --no-default-features --locked --target $linux --no-run
# An emulator has one thread, so both run at once.
processors=(max)
test_as max true &
running=($!)
if [ -n "${UPG_TEST_KERNELS-}" ]; then
    processors+=(cortex-a53)
    test_as cortex-a53 false &
    running+=($!)
fi
failed=0
for process in "${running[@]}"; do wait "$process" || failed=1; done
for processor in "${processors[@]}"; do
    echo "As $processor:"
    cat "$logs/$processor"
done
if [ $failed -ne 0 ]; then exit 1; fi
if [ -z "${UPG_TEST_KERNELS-}" ]; then
    echo "SKIPPED: the tests as a processor without dot products; UPG_TEST_KERNELS=1 runs them"
fi

echo "All tests of the kernels for 64-bit ARM passed."

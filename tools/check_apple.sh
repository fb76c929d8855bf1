#!/usr/bin/env bash
# Checks the types of the code for macOS on another system. Safe to re-run.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/check_apple.sh

Runs clippy on the whole workspace for macOS on Apple Silicon, with tests, benchmarks and the feature
`metal`, with kernels compiled at run time and by the build. Nothing is linked or run. (test.sh runs
the kernels for the GPU on the CPU.)

Needs Rust (cargo) with rustup or the source of its standard library, clang, 3 GB of disk and, the
first time, a network. Installs clang if it is missing, with apt-get (Debian, Ubuntu; as root), and
the standard library of Rust for macOS. Writes cargo's target folder.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
?*) usage >&2 && exit 2 ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
. tools/need.sh
macos=aarch64-apple-darwin

need_clang
clang=$(find_clang)
# For C code of dependencies: Apple's headers are missing here, and the result is not used. These
# names are all that ring needs of them.
headers=$root/target/apple-headers
mkdir -p "$headers"
echo '#define TARGET_OS_OSX 1' >"$headers/TargetConditionals.h"
echo '#define assert(condition) ((void)0)' >"$headers/assert.h"
echo 'void abort(void);' >"$headers/stdlib.h"
cat >"$headers/string.h" <<'END'
#include <stddef.h>
int memcmp(const void *, const void *, size_t);
void *memcpy(void *, const void *, size_t);
void *memmove(void *, const void *, size_t);
void *memset(void *, int, size_t);
END
export CC_aarch64_apple_darwin=${clang/++/}
export CFLAGS_aarch64_apple_darwin="-ffreestanding -isystem $headers"
unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_RUSTFLAGS

sysroot=$(rustc --print sysroot)
std=()
if ! ls "$sysroot/lib/rustlib/$macos/lib"/libstd-* >/dev/null 2>&1 &&
    ! { command -v rustup >/dev/null && timeout 300 rustup target add $macos; }; then
    # Compile it from source, which needs a compiler that claims to be a nightly one.
    if ! [ -e "$sysroot/lib/rustlib/src/rust/library/Cargo.toml" ]; then
        echo "Missing: the standard library of Rust for $macos, or its source. Get one: rustup target add $macos" >&2
        exit 1
    fi
    export RUSTC_BOOTSTRAP=1
    std=(-Zbuild-std=std,panic_abort)
fi

check() {
    cargo clippy --features metal --locked --target $macos ${std[@]+"${std[@]}"} "$@" -- -D warnings
}
UPG_METALLIB=none check --workspace --all-targets
# Any file will do: it is embedded, not read.
UPG_METALLIB="$root/upg_kernel/kernels/spmv.metal" check --workspace
echo "The types are those of $macos."

# Sourced by scripts that need the same tools. Prints a message for each missing tool, then ends with
# exit code 1.

need_tools() {
    local root=$1 missing=0 wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    if ! command -v cargo >/dev/null; then
        echo "Missing: cargo (Rust $wanted or newer). Get it from https://rustup.rs, then open a new shell." >&2
        missing=1
    elif ! found=$(cargo --version 2>/dev/null | cut -d' ' -f2) || [ -z "$found" ]; then
        echo "Missing: a Rust toolchain; 'cargo --version' fails. Get one: rustup default stable" >&2
        missing=1
    elif ! at_least "$found" "$wanted"; then
        echo "Too old: cargo $found; Rust $wanted or newer is needed. Get it: rustup update stable" >&2
        missing=1
    fi
    if ! command -v cc >/dev/null; then
        echo "Missing: a C compiler and linker (cc). Debian, Ubuntu: apt install gcc libc6-dev; macOS: xcode-select --install" >&2
        missing=1
    fi
    if ! command -v python3 >/dev/null; then
        echo "Missing: python3. Debian, Ubuntu: apt install python3 python3-pip; else https://www.python.org/downloads" >&2
        missing=1
    elif ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
        echo "Too old: $(python3 --version); Python 3.9 or newer is needed" >&2
        missing=1
    elif ! python3 -m pip --version >/dev/null 2>&1; then
        echo "Missing: pip for python3. Debian, Ubuntu: apt install python3-pip; else python3 -m ensurepip --user" >&2
        missing=1
    fi
    if [ "$missing" -ne 0 ]; then exit 1; fi
}

# Debian has venv in a separate package.
need_venv() {
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        echo "Missing: venv for python3. Debian, Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
}

# make_venv FOLDER REQUIREMENTS [OPTION...]: makes a Python environment with these packages, unless it
# exists. Only wheels with a hash in REQUIREMENTS are installed: a source package would run its own
# code, and fetch more.
make_venv() {
    local folder=$1 requirements=$2
    shift 2
    if cmp -s "$requirements" "$folder/requirements.txt" && "$folder/bin/python" -c '' 2>/dev/null; then return; fi
    rm -rf "$folder" &&
        python3 -m venv "$folder" &&
        "$folder/bin/python" -m pip --disable-pip-version-check --no-input install --quiet \
            --require-hashes --only-binary :all: "$@" --requirement "$requirements" &&
        cp "$requirements" "$folder/requirements.txt"
}

# Prints the clang++, 15 or later, that the tests of the kernels for Apple GPUs use; nothing if there
# is none.
find_clang() {
    local name major
    set -- clang++ clang++-{22,21,20,19,18,17,16,15}
    if [ -n "${UPG_CLANG-}" ]; then set -- "$UPG_CLANG"; fi
    for name in "$@"; do
        major=$("$name" -dM -E -x c++ /dev/null 2>/dev/null | sed -n 's/^#define __clang_major__ //p') || major=0
        if [ "${major:-0}" -ge 15 ]; then
            echo "$name"
            return
        fi
    done
}

need_clang() {
    local package
    if [ -z "$(find_clang)" ] && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
        apt-get update -qq
        for package in clang-{19,18,17,16,15} clang; do
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 && break
        done
    fi
    if [ -z "$(find_clang)" ]; then
        echo "Missing: clang++, 15 or later. Debian, Ubuntu: apt install clang; macOS: xcode-select --install" >&2
        exit 1
    fi
}

# at_least 1.96.0-nightly 1.95: compares major and minor version.
at_least() {
    local f_major f_minor w_major w_minor _
    IFS=.- read -r f_major f_minor _ <<<"$1"
    IFS=.- read -r w_major w_minor _ <<<"$2"
    [ "$f_major" -gt "$w_major" ] || { [ "$f_major" -eq "$w_major" ] && [ "$f_minor" -ge "$w_minor" ]; }
}

# Prints cargo's target folder, whatever the environment or cargo's configuration say.
target_folder() {
    cargo metadata --format-version 1 --no-deps |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])'
}

#!/usr/bin/env bash
# Licences, duplicates and origins of all dependencies, and their known flaws.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/deny.sh

Checks the dependencies in Cargo.lock against deny.toml: licences, versions, registries, and advisories of
https://rustsec.org. Without this version of cargo-deny it builds that first (some minutes), into
~/.cache/upg-tools, and installs nothing else. The advisories are fetched with git each time; where they cannot be had, that part is skipped and one line
says so.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
?*) usage >&2 && exit 2 ;;
esac

cd "$(dirname "$0")/.."
version=0.20.2

# Beside, not in the place of another version that is there.
tools=${XDG_CACHE_HOME:-$HOME/.cache}/upg-tools/cargo-deny-$version
if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $version" ]; then
    export PATH="$tools/bin:$PATH"
    if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $version" ]; then
        echo "Building cargo-deny $version, once (some minutes)" >&2
        cargo install --quiet --locked cargo-deny --version "$version" --root "$tools"
    fi
fi
cargo deny --locked check --hide-inclusion-graph licenses bans sources
# Only a fresh copy counts: an older one lacks the flaws that became known since.
if GIT_TERMINAL_PROMPT=0 cargo deny fetch db >/dev/null 2>&1; then
    cargo deny --locked check --disable-fetch --hide-inclusion-graph advisories
else
    echo "NOT CHECKED: advisories, as https://github.com/RustSec/advisory-db cannot be fetched" >&2
fi

#!/usr/bin/env bash
# Checks licences, duplicates, origins and known flaws of all dependencies.
set -euo pipefail

usage() {
    cat <<'END'
Usage: tools/deny.sh

Checks the dependencies in Cargo.lock against deny.toml: licences, versions, registries, and the
advisories of https://rustsec.org. If this version of cargo-deny is missing, the script first builds
it into ~/.cache/upg-tools (some minutes); it installs nothing else. The advisories are fetched with
git each time. If that fails, this part is skipped and one line says so.
END
}

case "${1-}" in
-h | --help) usage && exit ;;
?*) usage >&2 && exit 2 ;;
esac

cd "$(dirname "$0")/.."
version=0.20.2

# Does not replace another version that is installed.
tools=${XDG_CACHE_HOME:-$HOME/.cache}/upg-tools/cargo-deny-$version
if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $version" ]; then
    export PATH="$tools/bin:$PATH"
    if [ "$(cargo deny --version 2>/dev/null)" != "cargo-deny $version" ]; then
        echo "Building cargo-deny $version, once (some minutes)" >&2
        cargo install --quiet --locked cargo-deny --version "$version" --root "$tools"
    fi
fi
cargo deny --locked check --hide-inclusion-graph licenses bans sources
# Only a fresh copy counts: an older one lacks newer advisories.
if GIT_TERMINAL_PROMPT=0 cargo deny fetch db >/dev/null 2>&1; then
    cargo deny --locked check --disable-fetch --hide-inclusion-graph advisories
else
    echo "NOT CHECKED: advisories, as https://github.com/RustSec/advisory-db cannot be fetched" >&2
fi

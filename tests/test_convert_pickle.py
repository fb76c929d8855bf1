"""Tests that convert_pickle_to_safetensors.py and `upg convert` make the same bytes and refuse the same files.

    python3 tests/test_convert_pickle.py path/to/upg
"""
import json
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
DATA = ROOT / "upg_kernel/tests/data/v1"
SCRIPT = ROOT / "convert_pickle_to_safetensors.py"
CANARY = "upg-v1-canary"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import upg_reader  # noqa: E402
from convert_pickle_to_safetensors import ConversionError, convert_upg_to_safetensors  # noqa: E402

# The most that a refusal may take; measured up to 250 MB and 6 s.
MOST_MEMORY = 600 << 20
MOST_SECONDS = 60


def main(upg):
    # A panic or a crash leaves no file behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for test in (files_of_python, lists_of_numbers, texts_of_a_model, dangerous_pickles, cut_short, changed_bytes, whole_or_nothing):
            print(f"{test.__name__}: {test(pathlib.Path(folder), upg)}")


def at_once(test, cases):
    """Returns the results of `test` for all cases; most of the time goes into the start of Python."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(test, cases))


def both(upg, file, *more):
    """Returns the result of each converter: (bytes or None, error)."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "made.safetensors"
        for command in ([sys.executable, SCRIPT], [upg, "convert"]):
            out.unlink(missing_ok=True)
            result = run([*command, file, out, *more])
            assert result.returncode in (0, 1, 2), f"{file}: {command} ended with {result.returncode}: {result.stderr}"
            assert out.exists() == (result.returncode == 0), f"{file}: {result.stderr}"
            results.append((out.read_bytes() if out.exists() else None, result.stderr))
    return results


def both_of(upg, data):
    """Returns the result of each converter for a file of these bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "old.upg"
        file.write_bytes(data)
        return both(upg, file)


def run(command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=MOST_SECONDS)


def buffers_of(file):
    found = sorted(DATA.glob(f"{file.stem}.*.buffer"))
    return ["--buffers", *found] if found else []


def files_of_python(folder, upg):
    expected = load_file(DATA / "expected.safetensors")
    files = sorted(DATA.glob("numpy*.upg"))
    assert len(files) == 72, len(files)
    made = at_once(lambda file: both(upg, file, *buffers_of(file)), files)
    for file, ((python, error), (rust, _)) in zip(files, made):
        kind = "one" if "-one" in file.name else "rows"
        assert python is not None, error
        assert python == rust, f"{file.name}: the two differ"
        assert python == (DATA / f"{kind}.safetensors").read_bytes(), f"{file.name}: other bytes than recorded"
    for kind in ("rows", "one"):
        path = DATA / f"{kind}.safetensors"
        found = {layer["name"]: matrix for layer, matrix in upg_reader.layers(path)}
        found["model.norm.weight"] = load_file(path)["model.norm.weight"]
        for name, matrix in found.items():
            np.testing.assert_allclose(matrix, expected[f"{kind}/{name}"], rtol=1e-6, atol=0)
        assert len(found) == 4
    return f"{len(files)} files, every byte equal"


def joined(parts):
    return b"".join(bytes.fromhex(part) * count for part, count in parts)


def lists_of_numbers(folder, upg):
    cases = json.loads((DATA / "alike.json").read_text())
    assert len(cases) > 15
    results = at_once(lambda case: [both_of(upg, joined(case[kind])) for kind in ("lists", "arrays")], cases)
    for case, (lists, arrays) in zip(cases, results):
        made = {*lists, *arrays}
        assert len(made) == 1 and (None, "") not in made, f"{case['name']}: {[error for _, error in made]}"
    return f"{len(cases)} made alike, with lists and with arrays"


def texts_of_a_model(folder, upg):
    model = folder / "model"
    model.mkdir()
    tiny = ROOT / "upg_kernel/tests/data/tiny-models/phi3"
    for name in ("config.json", "generation_config.json"):
        (model / name).write_bytes((tiny / name).read_bytes())
    (model / "tokenizer.json").write_text('{"a": "\u00e9\\n"}')
    file = DATA / "numpy2-p5-arrays.upg"
    templates = [
        {},
        {"chat_template": "{{ '\u00e9\"\\\t' }}"},
        {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "y\u2028"}]},
    ]
    for config in templates:
        (model / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
        (python, error), (rust, _) = both(upg, file, "--model", model)
        assert python is not None and python == rust, f"{config}: {error}"
        # Sound, but not a model: no tokenizer of this kind exists.
        made = folder / "made.safetensors"
        made.write_bytes(rust)
        verified = run([upg, "verify", made])
        assert verified.returncode == 1 and "tokenizer" in str(verified.stderr), verified
    # Both must refuse the same files.
    deep = "[" * 200 + "]" * 200
    for text in (
        '{"chat_template": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 400 + "}", '{"a": "\\ud800"}', '{"a": ' + deep + "}",
        '{"chat_template": []}', '{"chat_template": [{"template": "x"}]}', '{"chat_template": [{"name": "default"}]}',
        '{"chat_template": "\\ud800"}', '{"chat_template": 5}', "[]", "{", "", "[" * 100_000,
    ):
        (model / "tokenizer_config.json").write_text(text)
        (python, error), (rust, rust_error) = both(upg, file, "--model", model)
        assert python is None and rust is None, f"{text[:60]}: {error} {rust_error}"
        assert "Traceback" not in error, error
    (model / "chat_template.jinja").write_text("z\x7f")
    (python, error), (rust, _) = both(upg, file, "--model", model)
    assert python is not None and python == rust, error
    return f"{len(templates) + 1} made alike, 14 refused"


def dangerous_pickles(folder, upg):
    cases = json.loads((DATA / "hostile.json").read_text())
    assert len(cases) >= 100

    def refused(case):
        most, slowest = 0, 0
        with tempfile.TemporaryDirectory() as folder:
            file, out = pathlib.Path(folder) / "hostile.upg", pathlib.Path(folder) / "out"
            file.write_bytes(joined(case["parts"]))
            for command in ([sys.executable, SCRIPT, file, out], [upg, "convert", file, out]):
                started = time.monotonic()
                code, error, memory = measured(command)
                most, slowest = max(most, memory), max(slowest, time.monotonic() - started)
                assert code == 1, f"{case['name']}: {command}: {error}"
                assert case["says"] in error, f"{case['name']}: {command}: {error}"
                assert error.count("\n") == 1, error
                assert not out.exists()
                assert not pathlib.Path(CANARY).exists(), f"{case['name']} or one beside it was run"
        return most, slowest

    most, slowest = (max(values) for values in zip(*at_once(refused, cases)))
    assert most < MOST_MEMORY, most
    # A call in a pickle would have made the canary.
    first = cases[0]
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))", first["parts"][0][0]], check=True)
    assert pathlib.Path(CANARY).exists()
    os.remove(CANARY)
    return f"{len(cases)} refused by both, at most {most >> 20} MB and {slowest:.1f} s"


def measured(command):
    """Returns (exit code, standard error, peak memory in bytes) of a command."""
    with tempfile.TemporaryFile("w+") as error:
        child = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=error)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        error.seek(0)
        # Linux counts in units of 1024 bytes, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        return child.returncode, error.read(), usage.ru_maxrss * unit


def in_process(path):
    out = pathlib.Path("python.safetensors")
    out.unlink(missing_ok=True)
    try:
        convert_upg_to_safetensors(path, out)
    except ConversionError:
        assert not out.exists()
        return None
    return out.read_bytes()


def cut_short(folder, upg):
    """Tests every prefix of a file in Python; the Rust tests do the same."""
    data = (DATA / "numpy1-p2-one.upg").read_bytes()
    file = folder / "cut.upg"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert in_process(file) is None, length
    return f"{len(data)} beginnings refused"


def changed_bytes(folder, upg):
    """Tests files with a changed byte: both refuse, or both make the same file."""
    draw = random.Random(1)
    files = sorted(DATA.glob("numpy*-p[245]-*.upg"))

    def changed():
        data = bytearray(draw.choice(files).read_bytes())
        for _ in range(draw.choice((1, 1, 2))):
            data[draw.randrange(len(data))] = draw.choice((0, 1, 2, 5, 0x2E, 0x80, 0xFF, draw.randrange(256)))
        return bytes(data)

    cases = [changed() for _ in range(80)]
    made, refused = 0, 0
    results = at_once(lambda data: both_of(upg, data), cases)
    for data, ((python, error), (rust, rust_error)) in zip(cases, results):
        assert python == rust, f"{data.hex()}: {error!r} {rust_error!r}"
        made, refused = made + (python is not None), refused + (python is None)
    assert made > 5 and refused > 5, (made, refused)
    return f"{made} made alike, {refused} refused alike"


def whole_or_nothing(folder, upg):
    file = folder / "model.upg"
    file.write_bytes((DATA / "numpy2-p5-arrays.upg").read_bytes())
    before = file.read_bytes()
    for missing in (folder / "none.upg", folder):
        assert [data for data, _ in both(upg, missing)] == [None, None]
    link = folder / "link"
    link.symlink_to(file)
    for out in (file, link, folder / "." / "model.upg"):
        for command in ([sys.executable, SCRIPT], [upg, "convert"]):
            result = run([*command, file, out])
            assert result.returncode in (1, 2) and "overwrite" in result.stderr, result.stderr
    assert file.read_bytes() == before
    assert not [name for name in os.listdir() if name.startswith(".upg-")]
    for _, error in both(upg, DATA / "catalogue.upg"):
        assert "has the weights of none" in error and "upg compress microsoft/phi-4 -o phi-4.safetensors" in error, error
    return "no input overwritten, nothing left behind"


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())

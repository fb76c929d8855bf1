"""Prints the measurements of bench/quality.sh as a table; called by it.

    python3 bench/quality_table.py --commit COMMIT --bindings VERSION --windows N --text FILE --calibrate FILE
        --original JSON --base-log LOG [--record FOLDER] --llama NAME=JSON... --upg NAME=JSON...

JSON is the output of `upg eval --json` or of bench/quality_llama.py, LOG that of llama-perplexity on
the original. FOLDER gets DATE-PROCESSOR-quality.md, a plot as .svg and all figures as .json. To update the plot in the
README, run bench/quality_plot.py on that .json.
"""
import argparse
import datetime
import json
import pathlib
import platform
import re

from quality_plot import plot
from table import write

# If the programs disagree more on the original, they do not score the same tokens of the same model.
MOST_APART_PERCENT = 0.5

HEAD = """\
# Quality beside llama.cpp: SmolLM2-135M-Instruct

{date}, commit {commit}, {cpu}; llama.cpp of llama-cpp-python {bindings}.
KL divergence from the original in nats, over {windows} windows of 512 tokens of {text}, the second half of each
scored ({positions} positions); +- is one standard error. Both calibrated on {calibrate}.
Perplexity of the original: {ours:.4f} by upg, {theirs:.4f} by llama.cpp.

    bench/quality.sh{options}

Bits per weight are those of the matrices in the blocks. Embeddings, which are the output head too, are
8-bit in all files. The channels of the original were put into a random order for both programs: it is a
Q4_1 file, and types of llama.cpp with the same blocks of 32 columns would find its grid again. llama.cpp
also got the model padded with zeros, from 576 columns to 768, because its K- and I-quants need that. Its
bits count the zeros as weights, so they are those that a type has with any model; its file sizes are
left out. `llama-quantize` chooses the mix of a type, with an importance matrix. Perplexity is a multiple
of that of the original.

| | | bits per weight | file MB | KL divergence | top-1 agreement | perplexity |
|---|---|---|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser()
    for name in ["commit", "bindings", "text", "calibrate"]:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--original", type=pathlib.Path, required=True)
    parser.add_argument("--base-log", type=pathlib.Path, required=True)
    parser.add_argument("--record", type=pathlib.Path)
    parser.add_argument("--options", default="")
    parser.add_argument("--llama", nargs="+", default=[])
    parser.add_argument("--upg", nargs="+", default=[])
    args = parser.parse_args()
    original = json.loads(args.original.read_text())
    ours, theirs = original["perplexity"], base_perplexity(args.base_log)
    apart = 100 * abs(theirs / ours - 1)
    if apart > MOST_APART_PERCENT:
        raise SystemExit(
            f"The perplexity of the original is {ours:.4f} by upg and {theirs:.4f} by llama.cpp, {apart:.2f} % apart:"
            " they do not score the same tokens of the same model, and their other figures cannot be compared."
        )
    runs = [run("llama.cpp", entry) for entry in args.llama] + [run("upg", entry) for entry in args.upg]
    runs.sort(key=lambda run: -run["bits_per_weight_blocks"])
    today = datetime.date.today()
    cpu = processor()
    text = HEAD.format(
        date=f"{today.day} {today:%B %Y}",
        commit=args.commit,
        cpu=cpu,
        bindings=args.bindings,
        windows=args.windows,
        text=args.text,
        calibrate=args.calibrate,
        positions=original["positions"],
        ours=ours,
        theirs=theirs,
        options=args.options and f" {args.options}",
    )
    text += "".join(line(run) for run in runs)
    print(text, end="")
    if args.record:
        name = re.sub("[^a-z0-9]+", "-", f"{today}-{cpu}".lower()).strip("-") + "-quality"
        everything = {"date": str(today), "commit": args.commit, "cpu": cpu, "llama-cpp-python": args.bindings}
        everything |= {"windows": args.windows, "text": args.text, "calibrate": args.calibrate}
        everything |= {"original": original, "llama_perplexity": theirs, "runs": runs}
        args.record.mkdir(parents=True, exist_ok=True)
        write(args.record / f"{name}.json", json.dumps(everything, indent=1) + "\n")
        write(args.record / f"{name}.svg", plot(runs))
        write(args.record / f"{name}.md", f"{text}\n![KL divergence by bits per weight]({name}.svg)\n")


def base_perplexity(log):
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", log.read_text("utf-8", "replace"))
    if not found:
        raise SystemExit(f"{log}: has no perplexity")
    return float(found[1])


def run(engine, entry):
    name, _, path = entry.partition("=")
    return {"engine": engine, "name": name, **json.loads(pathlib.Path(path).read_text())}


def line(run):
    megabytes = f"{run['file_bytes'] / 1e6:.1f}" if run["engine"] == "upg" else ""
    cells = [
        run["engine"],
        f"`{run['name']}`",
        f"{run['bits_per_weight_blocks']:.2f}",
        megabytes,
        f"{run['kl_mean']:.4f} +- {run['kl_error']:.4f}",
        f"{100 * run['top1_agreement']:.1f} %",
        f"{run['perplexity_ratio']:.3f} +- {run['perplexity_ratio_error']:.3f}",
    ]
    return "| " + " | ".join(cells) + " |\n"


def processor():
    """Returns the name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor() or "unknown processor"])[0]


if __name__ == "__main__":
    main()

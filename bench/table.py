"""Prints the measurements of bench/compare.sh as a table; called by it.

    python3 bench/table.py --commit COMMIT --bindings VERSION --built HOW [--record FOLDER] JSON...

Each JSON is the output of `upg bench --compare-llama ... --json`. FOLDER gets DATE-PROCESSOR.md, and
DATE-PROCESSOR.json with all figures.
"""
import argparse
import datetime
import json
import os
import pathlib
import re
import sys

# llama.cpp's threads wait for each other by spinning. If one of them shares its processor, llama.cpp
# loses far more than upg, and the comparison is useless.
MOST_OTHERS_PERCENT = 5

HEAD = """\
# Beside llama.cpp: SmolLM2-135M-Instruct

{date}, commit {commit}, {cpu}, kernels `{kernels}`, upg {version}; llama.cpp {build} (vendored by
llama-cpp-python {bindings}), {built}. Tokens per second: prompts of {prompt} tokens,
then {generate} tokens one by one without a prompt; medians of {rounds} rounds in which the programs take
turns. Load average when the runs began: {least:.2f} to {most:.2f} (the runs before are part of it);
other processes used {others} of the processors meanwhile.

    bench/compare.sh --rounds {rounds}

"MB" are the weights that one token reads, in 10^6 bytes. "Of read" is the rate at which decoding reads
them, as a share of what the same threads read from memory in the same run.

| threads | upg | MB | llama.cpp | MB | prefill upg | llama.cpp | ratio | decode upg | llama.cpp | ratio | of read |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--commit", required=True)
    parser.add_argument("--bindings", required=True)
    parser.add_argument("--built", required=True)
    parser.add_argument("--record", type=pathlib.Path)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.runs]
    order = ["q8", "q4", "t3"]
    runs.sort(key=lambda run: (run["threads"], order.index(encoding(run))))
    today = datetime.date.today()
    text = head(runs, args, today) + "".join(line for run in runs for line in lines(run))
    print(text, end="")
    if args.record:
        if (others_percent(runs) or 0) > MOST_OTHERS_PERCENT:
            raise SystemExit(
                f"Not recorded: other processes used more than {MOST_OTHERS_PERCENT} % of the processors. Run it"
                " again when the machine has nothing else to do; --no-record only prints the table."
            )
        name = re.sub("[^a-z0-9]+", "-", f"{today}-{runs[0]['cpu'] or 'unknown'}".lower()).strip("-")
        args.record.mkdir(parents=True, exist_ok=True)
        everything = {"date": str(today), "commit": args.commit, "llama-cpp-python": args.bindings, "runs": runs}
        write(args.record / f"{name}.json", json.dumps(everything, indent=1) + "\n")
        write(args.record / f"{name}.md", text)


def head(runs, args, today):
    first = runs[0]
    loads = [run["load_average"] or 0 for run in runs]
    return HEAD.format(
        date=f"{today.day} {today:%B %Y}",
        commit=args.commit,
        cpu=first["cpu"] or "unknown processor",
        kernels=first["kernels"],
        version=first["version"],
        build=first["llama"][0]["build"],
        bindings=args.bindings,
        built=args.built,
        prompt=first["prompt_tokens"],
        generate=first["generate"],
        rounds=first["repetitions"],
        least=min(loads),
        most=max(loads),
        others=f"up to {others:.0f} %" if (others := others_percent(runs)) is not None else "an unknown part",
    )


def others_percent(runs):
    """Returns the largest share of the processors that others used in a run; None if unknown."""
    known = [run["others_percent"] for run in runs if run["others_percent"] is not None]
    return max(known, default=None)


def lines(run):
    """Yields a row for each GGUF file that a UPG file was measured beside."""
    for llama in run["llama"]:
        cells = [
            run["threads"],
            f"`{encoding(run)}`",
            f"{run['decode_token_bytes'] / 1e6:.1f}",
            pathlib.PurePath(llama["file"]).stem.removeprefix("smollm2-"),
            f"{llama['model_bytes'] / 1e6:.1f}",
            f"{run['prefill_tps']:.0f}",
            f"{llama['prefill_tps']:.0f}",
            f"{llama['prefill_ratio']:.2f}",
            f"{run['decode_tps']:.1f}",
            f"{llama['decode_tps']:.1f}",
            f"{llama['decode_ratio']:.2f}",
            f"{run['decode_percent_of_read']:.0f} %",
        ]
        yield "| " + " | ".join(map(str, cells)) + " |\n"


def encoding(run):
    return pathlib.PurePath(run["file"]).stem.removeprefix("smollm2-")


def write(path, text):
    """Writes a file, which appears whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    os.replace(scratch, path)
    print(f"Wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()

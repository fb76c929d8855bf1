"""Plots tokens per second against the size of the file as SVG, for the pages.

    python3 bench/speed_plot.py RECORD.json FOLDER    writes FOLDER/speed-light.svg and speed-dark.svg

RECORD.json is a record of bench/compare.sh. The plot has its runs with two threads.
"""
import math
import re

from quality_plot import BOTTOM, LEFT, RIGHT, THEMES, TOP, WIDTH, line, main, mark, page, place, scale, text

HEIGHT = 440
TITLE = "Generated tokens per second, by size of the file"
SUBTITLE = "SmolLM2-135M-Instruct, two cores of an AMD EPYC with AVX-512; up and left is better"
THREADS = 2


def points(runs):
    """Return program, name, megabytes and tokens per second of each file."""
    found = []
    for run in runs:
        if run["threads"] != THREADS:
            continue
        encoding = re.search(r"-(\w+)\.safetensors$", run["file"])[1]
        found.append(("upg", encoding, run["file_bytes"] / 1e6, run["decode_tps"]))
        for other in run["llama"]:
            kind = re.search(r"-(\w+)\.gguf$", other["file"])[1]
            found.append(("llama.cpp", kind, other["model_bytes"] / 1e6, other["decode_tps"]))
    return found


def axes(colours, right, top, x, y):
    """Return grid, numbers and names of both axes."""
    faint = f' fill="{colours["faint"]}"'
    parts = []
    for tick in range(0, right + 1, 25):
        parts.append(line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, colours["grid"]))
        parts.append(text(x(tick), HEIGHT - BOTTOM + 18, tick, "middle", faint))
    for tick in range(0, top + 1, 100):
        parts.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), colours["grid"]))
        parts.append(text(LEFT - 8, y(tick) + 4, tick, "end", faint))
    names = f' font-size="13" fill="{colours["text"]}"'
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, "size of the file (MB)", "middle", names))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    upright = f' transform="rotate(-90 18 {middle})"'
    parts.append(text(18, middle, "tokens per second", "middle", upright + names))
    return parts


def plot(runs, theme):
    """Return the plot as SVG."""
    colours, found = THEMES[theme], points(runs)
    right = math.ceil(max(size for _, _, size, _ in found) / 25) * 25
    top = math.ceil(max(speed for *_, speed in found) / 100) * 100
    x, y = scale(0, right, LEFT, WIDTH - RIGHT), scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = axes(colours, right, top, x, y)
    at = [(x(size), y(speed)) for _, _, size, speed in found]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at]
    for (program, name, *_), point in zip(found, at):
        parts.append(mark(*point, colours[program]))
        lx, ly = place(name, point, taken)
        parts.append(text(lx, ly, name, "start", f' fill="{colours[program][1]}"'))
    return page(colours, TITLE, SUBTITLE, HEIGHT, parts)


if __name__ == "__main__":
    main(__doc__, "speed", plot)

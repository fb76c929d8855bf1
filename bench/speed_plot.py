"""Plots tokens per second against the size of the file as SVG, for the pages.

    python3 bench/speed_plot.py RECORD.json FOLDER    writes FOLDER/speed-light.svg and speed-dark.svg

RECORD.json is a record of bench/compare.sh. The plot has its runs with two threads.
"""
import json
import math
import pathlib
import re
import sys

from quality_plot import FONT, PROGRAMS, THEMES, line, mark, place, scale, text

WIDTH, HEIGHT = 800, 440
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 84, 62
TITLE = "Generated tokens per second, by size of the file"
SUBTITLE = "SmolLM2-135M-Instruct, two cores of an AMD EPYC with AVX-512; up and left is better"
THREADS = 2


def points(record):
    """Return program, name, megabytes and tokens per second of each file."""
    found = []
    for run in record["runs"]:
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


def plot(record, theme):
    """Return the plot as SVG."""
    colours, found = THEMES[theme], points(record)
    right = math.ceil(max(size for _, _, size, _ in found) / 25) * 25
    top = math.ceil(max(speed for *_, speed in found) / 100) * 100
    x, y = scale(0, right, LEFT, WIDTH - RIGHT), scale(0, top, HEIGHT - BOTTOM, TOP)
    parts = [
        f"<title>{TITLE}: {SUBTITLE}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{colours["page"]}"/>',
        text(LEFT, 30, TITLE, "start", f' font-size="18" font-weight="bold" fill="{colours["text"]}"'),
        text(LEFT, 52, SUBTITLE, "start", f' font-size="13" fill="{colours["faint"]}"'),
        *axes(colours, right, top, x, y),
    ]
    at = [(x(size), y(speed)) for _, _, size, speed in found]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at]
    for (program, name, *_), point in zip(found, at):
        parts.append(mark(*point, colours[program]))
        lx, ly = place(name, point, taken)
        parts.append(text(lx, ly, name, "start", f' fill="{colours[program][1]}"'))
    for index, program in enumerate(PROGRAMS):
        lx, ly = WIDTH - RIGHT - 110, TOP + 20 + 22 * index
        parts.append(mark(lx, ly, colours[program]))
        parts.append(text(lx + 14, ly + 4, program, "start", f' font-size="14" fill="{colours["text"]}"'))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="sans-serif" font-size="{FONT}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def main(record, folder):
    content = json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        (folder / f"speed-{theme}.svg").write_text(plot(content, theme))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*map(pathlib.Path, sys.argv[1:]))

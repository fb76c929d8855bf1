"""Plots KL divergence against bits per weight as SVG, for bench/quality_table.py and for the pages.

    python3 bench/quality_plot.py RECORD.json FOLDER    writes FOLDER/quality-light.svg and quality-dark.svg

RECORD.json is a record of bench/quality.sh, where all files of both programs are calibrated.
"""
import json
import math
import pathlib
import sys

WIDTH, HEIGHT = 800, 560
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 84, 62
FONT = 12
TITLE = "KL divergence from the original, by bits per weight"
SUBTITLE = "SmolLM2-135M-Instruct, both programs calibrated on the same text; lower is better"

# Colours on a white page and on a dark one. A program has a fill and a line.
THEMES = {
    "light": {
        "page": "#ffffff",
        "grid": "#e1e4e8",
        "text": "#24292f",
        "faint": "#57606a",
        "upg": ("#c0392b", "#c0392b"),
        "llama.cpp": ("#ffffff", "#1f5f99"),
    },
    "dark": {
        "page": "#0d1117",
        "grid": "#2b323b",
        "text": "#e6edf3",
        "faint": "#9da7b3",
        "upg": ("#ff7b6b", "#ff7b6b"),
        "llama.cpp": ("#0d1117", "#6cb6ff"),
    },
}
PROGRAMS = ["upg", "llama.cpp"]


def plot(runs, theme="light"):
    """Returns the plot of `runs` as SVG, with a title and a line through the best files of each program."""
    colours = THEMES[theme]
    bits = [run["bits_per_weight_blocks"] for run in runs]
    first, last = math.floor(min(bits) - 0.3), math.ceil(max(bits))
    logs = [math.log10(run["kl_mean"]) for run in runs]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    x = scale(first, last, LEFT, WIDTH - RIGHT)
    y = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = axes(colours, (first, last, x), (low, high, y))

    at = {id(run): (x(run["bits_per_weight_blocks"]), y(math.log10(run["kl_mean"]))) for run in runs}
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in at.values()]
    for program in PROGRAMS:
        points = [at[id(run)] for run in best([run for run in runs if run["engine"] == program])]
        taken += [(px - 5, py - 5, px + 5, py + 5) for px, py in along(points)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        stroke = colours[program][1]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2" stroke-opacity="0.6"/>')
    for run in runs:
        parts.append(mark(*at[id(run)], colours[run["engine"]]))
    for run in runs:
        label = name(run)
        lx, ly = place(label, at[id(run)], taken)
        parts.append(text(lx, ly, label, "start", f' fill="{colours[run["engine"]][1]}"'))
    return page(colours, TITLE, SUBTITLE, HEIGHT, parts)


def page(colours, title, subtitle, height, parts):
    """Returns a plot of these parts as SVG, with its titles and the marks of the programs."""
    head = [
        f"<title>{title}: {subtitle}</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="{colours["page"]}"/>',
        text(LEFT, 30, title, "start", f' font-size="18" font-weight="bold" fill="{colours["text"]}"'),
        text(LEFT, 52, subtitle, "start", f' font-size="13" fill="{colours["faint"]}"'),
    ]
    legend = []
    for index, program in enumerate(PROGRAMS):
        lx, ly = WIDTH - RIGHT - 110, TOP + 20 + 22 * index
        legend.append(mark(lx, ly, colours[program]))
        legend.append(text(lx + 14, ly + 4, program, "start", f' font-size="14" fill="{colours["text"]}"'))
    body = "\n".join(head + parts + legend)
    size = f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif" font-size="{FONT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def axes(colours, across, up):
    """Grid, numbers and names of both axes."""
    first, last, x = across
    low, high, y = up
    fill = f' fill="{colours["faint"]}"'
    parts = []
    for tick in range(first, last + 1):
        parts.append(line(x(tick), TOP, x(tick), HEIGHT - BOTTOM, colours["grid"]))
        parts.append(text(x(tick), HEIGHT - BOTTOM + 18, tick, "middle", fill))
    for tick in range(low, high + 1):
        parts.append(line(LEFT, y(tick), WIDTH - RIGHT, y(tick), colours["grid"]))
        parts.append(text(LEFT - 8, y(tick) + 4, f"{10.0**tick:g}", "end", fill))
    fill = f' font-size="13" fill="{colours["text"]}"'
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, "bits per weight in the blocks", "middle", fill))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    upright = f' transform="rotate(-90 18 {middle})"'
    parts.append(text(18, middle, "KL divergence from the original (nats)", "middle", upright + fill))
    return parts


def best(runs):
    """The runs that no run with as few bits or fewer beats, by bits."""

    def is_beaten(run):
        return any(
            other is not run
            and other["bits_per_weight_blocks"] <= run["bits_per_weight_blocks"]
            and other["kl_mean"] <= run["kl_mean"]
            for other in runs
        )

    return sorted((run for run in runs if not is_beaten(run)), key=lambda run: run["bits_per_weight_blocks"])


def along(points):
    """Some points on the lines between these, for labels to keep clear of."""
    return [
        (ax + (bx - ax) * step / 20, ay + (by - ay) * step / 20)
        for (ax, ay), (bx, by) in zip(points, points[1:])
        for step in range(21)
    ]


def name(run):
    """The name of an encoding, or of a budget of bits."""
    is_budget = run["engine"] == "upg" and run["name"].replace(".", "").isdigit()
    return f"--bpw {run['name']}" if is_budget else run["name"]


def scale(low, high, first, last):
    return lambda value: first + (value - low) / (high - low) * (last - first)


def mark(x, y, colours):
    fill, stroke = colours
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def line(x1, y1, x2, y2, stroke):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'


def text(x, y, content, anchor, attributes=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{content}</text>'


def place(label, point, taken):
    """Returns where a label begins: the first free place beside its point, which is then taken."""
    width, (px, py) = 0.62 * FONT * len(label), point
    places = [(px + 8, py - 5), (px - 8 - width, py + 14), (px + 8, py + 4), (px - 8 - width, py + 4)]
    places += [(px + 5, py - 9), (px - 5 - width, py - 9), (px + 5, py + 17), (px - 5 - width, py + 17)]
    places += [(px + 8, py - 20), (px - 8 - width, py + 28), (px - width / 2, py + 22), (px - width / 2, py - 14)]
    for lx, ly in places:
        box = (lx, ly - FONT + 2, lx + width, ly + 2)
        if not any(overlap(box, other) for other in taken):
            break
    else:
        lx, ly = places[0]
        box = (lx, ly - FONT + 2, lx + width, ly + 2)
    taken.append(box)
    return lx, ly


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def main(usage, name, draw):
    """Writes `draw(runs, theme)` of the record on the command line, as FOLDER/name-theme.svg."""
    if len(sys.argv) != 3:
        raise SystemExit(usage)
    record, folder = map(pathlib.Path, sys.argv[1:])
    runs = json.loads(record.read_text())["runs"]
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        (folder / f"{name}-{theme}.svg").write_text(draw(runs, theme))


if __name__ == "__main__":
    main(__doc__, "quality", plot)

"""The plot of bench/quality_table.py: KL divergence by bits per weight, as SVG."""
import math

WIDTH, HEIGHT = 760, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
FONT = 12

# Fill and line of the points of a program.
STYLES = {"upg": ("#c0392b", "#c0392b"), "llama.cpp": ("#ffffff", "#2c5f8a")}


def plot(runs):
    bits = [run["bits_per_weight_blocks"] for run in runs]
    first = math.floor(min(bits) - 0.3)
    logs = [math.log10(run["kl_mean"]) for run in runs]
    x = scale(first, math.ceil(max(bits)), LEFT, WIDTH - RIGHT)
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    y = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for tick in range(first, math.ceil(max(bits)) + 1):
        parts += [line(x(tick), TOP, x(tick), HEIGHT - BOTTOM), text(x(tick), HEIGHT - BOTTOM + 18, tick, "middle")]
    for tick in range(low, high + 1):
        parts += [line(LEFT, y(tick), WIDTH - RIGHT, y(tick)), text(LEFT - 8, y(tick) + 4, f"{10.0**tick:g}", "end")]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "bits per weight of the blocks", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f' transform="rotate(-90 16 {middle})"'
    parts.append(text(16, middle, "KL divergence from the original (nats)", "middle", turned))

    points = [(x(run["bits_per_weight_blocks"]), y(math.log10(run["kl_mean"]))) for run in runs]
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in points]
    for run, (px, py) in zip(runs, points):
        parts.append(mark(px, py, run["engine"]))
    for run, point in zip(runs, points):
        lx, ly = place(run["name"], point, taken)
        parts.append(text(lx, ly, run["name"], "start", f' fill="{STYLES[run["engine"]][1]}"'))
    for index, engine in enumerate(STYLES):
        ly = TOP + 20 + 20 * index
        parts += [mark(WIDTH - 120, ly, engine), text(WIDTH - 108, ly + 4, engine, "start")]
    body = "\n".join(parts)
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="{FONT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return f"{head}\n{body}\n</svg>\n"


def scale(low, high, first, last):
    return lambda value: first + (value - low) / (high - low) * (last - first)


def mark(x, y, engine):
    fill, stroke = STYLES[engine]
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def line(x1, y1, x2, y2):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def text(x, y, content, anchor, attributes=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{attributes}>{content}</text>'


def place(label, point, taken):
    """Where a label begins: beside its point, at the first of some places that nothing has, which it then has."""
    width, (px, py) = 0.62 * FONT * len(label), point
    places = [(px + 8, py + 4), (px - 8 - width, py + 4), (px + 5, py - 9), (px - 5 - width, py - 9)]
    places += [(px + 5, py + 17), (px - 5 - width, py + 17), (px + 8, py - 20), (px - 8 - width, py + 28)]
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

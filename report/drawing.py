"""Figures of runs, drawn with matplotlib where it is installed: accuracy, calibration, training curves."""

import hashlib
import importlib.util
import io
import math
import re
from pathlib import Path

import numpy as np

from report.markup import percent

COLOURS = ("#4c86c6", "#dd8a3e", "#45a08f", "#9a76bd", "#cc6666", "#94795d", "#8a9a3b", "#8c8c8c")  # on black and white
PLAIN_STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font and colour
    "text.parse_math": False,  # a question type such as $x$ is a name, not a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
}
GRID = "#8888884d"
MOST_POINTS = 1000
MOST_PANELS = 12  # reliability diagrams


def have_matplotlib() -> bool:
    """Figures are optional: the page says how to have them."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_figures(result: dict, curves: dict[str, list[dict]]) -> dict:
    """{name: matplotlib Figure}: accuracy, calibration, curves, as far as there is something to draw."""
    if not have_matplotlib():
        return {}
    import matplotlib

    with matplotlib.rc_context(PLAIN_STYLE):
        figures = {
            "accuracy": draw_accuracy(result["runs"]),
            "calibration": draw_calibration(result["runs"]),
            "curves": draw_curves(result["runs"], curves),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_accuracy(runs: list[dict]):
    """A group of bars for each question type, one bar a run: exact, its interval, and the best baseline as a tick."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(kind for run in runs for kind in run["types"]))
    rows = [(short_label(kind), [run["types"].get(kind) for run in runs]) for kind in kinds]
    rows.append(("all questions", [run["micro"] for run in runs]))
    height = 0.8 / len(runs) if len(runs) > 1 else 0.6
    figure = Figure(figsize=(8.6, 1 + len(rows) * (0.16 + 0.2 * len(runs))), layout="constrained")
    axes = figure.subplots()
    for row, (_, entries) in enumerate(rows):
        for i, entry in enumerate(entries):
            if entry is None:
                continue  # this run has no such question
            y = row + (i - (len(runs) - 1) / 2) * height
            axes.barh(y, entry["exact"], height * 0.86, color=colour_of(i))
            if entry["interval"]:
                axes.plot(entry["interval"], [y, y], "|-", color="black", linewidth=1, markersize=5, clip_on=False)
            for best in [max(entry["baselines"].values())] if entry["baselines"] else []:
                axes.plot([best, best], [y - height * 0.43, y + height * 0.43], color="black", linewidth=2.5)
            axes.text(1.015, y, percent(entry["exact"]), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first type on top
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{x} %" for x in range(0, 101, 20)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    keys = [Patch(color=colour_of(i), label=short_label(run["name"])) for i, run in enumerate(runs) if len(runs) > 1]
    keys.append(Line2D([], [], color="black", marker="|", linewidth=1, label="95 % interval"))
    tick = {"marker": "|", "markersize": 9, "markeredgewidth": 2.5, "linestyle": ""}
    if any(run["micro"]["baselines"] for run in runs):
        keys.append(Line2D([], [], color="black", label="best blind baseline", **tick))
    figure.legend(handles=keys, loc="outside upper left", ncols=min(len(keys), 3), frameon=False, fontsize=8)
    return figure


def draw_calibration(runs: list[dict]):
    """Reliability diagrams with the number of answers in each bin below; of several runs that of all questions."""
    from matplotlib.figure import Figure

    panels = calibration_panels(runs)
    if not panels:
        return None
    most = sorted(range(len(panels)), key=lambda i: (not panels[i][3], -panels[i][1]["n"]))[:MOST_PANELS]
    panels = [panels[i][:3] for i in sorted(most)]
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(0.4 + 2.9 * columns, 3.5 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[3.2, 1] * lines)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (name, calibration, colour) in enumerate(panels):
        above, below = grid[2 * (i // columns)][i % columns], grid[2 * (i // columns) + 1][i % columns]
        bins = [b for b in calibration["bins"] if b["n"]]
        middles, widths = [(b["low"] + b["high"]) / 2 for b in bins], [b["high"] - b["low"] for b in bins]
        above.set_axis_on()
        above.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
        confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        above.bar(middles, accuracy, [0.94 * w for w in widths], color=colour, alpha=0.45)
        above.plot(confidence, accuracy, "o", color=colour, markersize=4, clip_on=False)
        above.set(xlim=(0, 1), ylim=(0, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
        above.set_xticklabels([])
        above.set_title(f"{name}\nECE {calibration['ece']:.3f}, n {calibration['n']:,}", fontsize=9, loc="left")
        below.set_axis_on()
        below.bar(middles, [b["n"] for b in bins], [0.94 * w for w in widths], color=colour, alpha=0.8)
        for x, b in zip(middles, bins, strict=True):
            below.annotate(str(b["n"]), (x, b["n"]), (0, 1.5), textcoords="offset points", ha="center", fontsize=6)
        below.set(xlim=(0, 1), xticks=np.linspace(0, 1, 6), yticks=[])
        below.set_ylim(0, 1.35 * max((b["n"] for b in bins), default=1))
        below.spines["left"].set_visible(False)
        if i + columns >= len(panels):  # the last of its column
            below.set_xlabel("its probability")
        if i % columns == 0:
            above.set_ylabel("share of right ones")
            below.set_ylabel("answers")
    return figure


def calibration_panels(runs: list[dict]) -> list[tuple]:
    """(title, calibration, colour, of all questions?) of everything that has a calibration."""
    panels = []
    for i, run in enumerate(runs):
        prefix = f"{short_label(run['name'], 24)}: " if len(runs) > 1 else ""
        found = [("all questions", run["micro"])] if "calibration" in run["micro"] else []
        if len(runs) == 1 or not found:
            found += [(short_label(kind, 24), entry) for kind, entry in run["types"].items() if "calibration" in entry]
        for name, entry in found:
            panels.append((prefix + name, entry["calibration"], colour_of(i), entry is run["micro"]))
    return panels


def draw_curves(runs: list[dict], curves: dict[str, list[dict]]):
    """Loss with its validation, learning rate and gradient norm over the steps, as far as they were written."""
    from matplotlib.figure import Figure

    shown = [(i, run["name"], curves[run["name"]]) for i, run in enumerate(runs) if curves.get(run["name"])]
    names = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
    names = {k: v for k, v in names.items() if any(k in line for _, _, lines in shown for line in lines)}
    if not names:
        return None
    figure = Figure(figsize=(8.6, 0.5 + 1.75 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), squeeze=False, sharex=True)[:, 0]
    for axes, (field, name) in zip(panels, names.items(), strict=True):
        for i, run, lines in shown:
            axes.plot(*series(lines, field), color=colour_of(i), linewidth=1, alpha=0.85, label=short_label(run))
        for i, _, lines in shown if field == "loss" else []:
            label = "validation" if i == shown[-1][0] else None
            style = {"color": "black", "linewidth": 0.8, "markerfacecolor": colour_of(i), "markersize": 4.5}
            axes.plot(*series(lines, "val_loss"), "o-", label=label, **style)
        axes.set_ylabel(name)
        axes.grid(True, color=GRID, linewidth=0.6)
        scale(axes, logarithmic=field != "lr")
    panels[-1].set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def series(lines: list[dict], field: str) -> tuple[list, list]:
    """Steps and values; of very many the lowest and highest of each stretch, so that no spike is lost.

    What is not finite leaves a gap.
    """
    found = [(line["step"], line[field]) for line in lines if isinstance(line.get(field), int | float)]
    values = [value if math.isfinite(value) else math.nan for _, value in found]
    kept = range(len(found))
    if len(found) > MOST_POINTS:
        stretches = np.array_split(np.arange(len(found)), MOST_POINTS // 2 - 1)
        lowest = {min(part, key=lambda i: values[i] if values[i] == values[i] else -math.inf) for part in stretches}
        highest = {max(part, key=lambda i: values[i] if values[i] == values[i] else -math.inf) for part in stretches}
        kept = sorted({0, len(found) - 1} | lowest | highest)
    return [found[i][0] for i in kept], [values[i] for i in kept]


def scale(axes, logarithmic: bool) -> None:
    """Plain numbers on the axis: matplotlib writes powers as formulas, which PLAIN_STYLE switches off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if logarithmic and len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if values.max() > 30 * values.min() else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def colour_of(i: int) -> str:
    """Of the run with number i, in all figures the same."""
    return COLOURS[i % len(COLOURS)]


def short_label(text: str, most: int = 40) -> str:
    """A name short enough for a figure, without characters that XML refuses."""
    text = "".join(c if c.isprintable() else " " for c in str(text))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def figure_svg(figure) -> str:
    """The figure as SVG to put into a page: no background, its black is the colour of the text around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**PLAIN_STYLE, "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # its style element would hold for all of the page
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg role="img" fill="currentColor" stroke-linejoin="round" ', 1)
    own = hashlib.sha256(svg.encode()).hexdigest()[:8]  # two figures of a page share no ID

    def adapt(tag) -> str:
        text = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", tag[0])
        return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{own}-", text)

    return re.sub(r"<[^>]*>", adapt, svg)  # inside tags alone: what the texts say is left as it is


def write_figures(folder: Path, figures: dict) -> None:
    """NAME.svg and NAME.png of each figure, on white, as a paper wants them."""
    if not figures:
        return
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(PLAIN_STYLE):
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", facecolor="white", dpi=200)

"""Figures of runs, drawn with matplotlib where it is installed: accuracy, calibration, training curves."""

import io
import math
from pathlib import Path

import numpy as np

from inputs.show import shorten

COLOURS = ("#4c86c6", "#dd8a3e", "#45a08f", "#9a76bd", "#cc6666", "#94795d", "#8a9a3b", "#8c8c8c")  # on black and white
STYLE = Path(__file__).with_name("figures.mplstyle")
MOST_PANELS = 12  # reliability diagrams


def draw_figures(result: dict, curves: dict[str, list[dict]]) -> dict:
    """{name: matplotlib Figure} of what there is to draw; {} without matplotlib: the page says how to have them."""
    try:
        import matplotlib.style
    except ImportError:
        return {}
    with matplotlib.style.context(STYLE):
        figures = {
            "accuracy": draw_accuracy(result["runs"]),
            "calibration": draw_calibration(result["runs"]),
            "curves": draw_curves(result["runs"], curves),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_accuracy(runs: list[dict]):
    """A group of bars for each question type, one bar a run: exact, its interval, and the best baseline as a tick."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run["types"]))
    groups = [(short_label(k), [(i, r["types"][k]) for i, r in enumerate(runs) if k in r["types"]]) for k in kinds]
    groups.append(("all questions", [(i, run["micro"]) for i, run in enumerate(runs)]))
    height = 0.8 / len(runs) if len(runs) > 1 else 0.6
    figure = new_figure(8.6, 1 + len(groups) * (0.16 + 0.2 * len(runs)))
    axes, keys = figure.subplots(), {}
    for place, (_, entries) in enumerate(groups):
        for i, entry in entries:
            y = place + (i - (len(runs) - 1) / 2) * height
            bar = {"color": COLOURS[i % len(COLOURS)], "label": short_label(runs[i]["name"])}
            keys[i] = axes.barh(y, entry["exact"], height * 0.86, **bar)
            if entry["interval"]:
                line = {"linewidth": 1, "markersize": 5, "clip_on": False, "label": "95 % interval"}
                (keys["interval"],) = axes.plot(entry["interval"], [y, y], "|-k", **line)
            if entry["baselines"]:
                tick = {"markersize": 13, "markeredgewidth": 2.5, "label": "best blind baseline"}
                (keys["baseline"],) = axes.plot(max(entry["baselines"].values()), y, "|k", **tick)
            axes.text(1.015, y, f"{100 * entry['exact']:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [name for name, _ in groups])
    axes.set_xticks(np.linspace(0, 1, 6), [f"{x} %" for x in range(0, 101, 20)])
    axes.set(xlim=(0, 1), ylim=(len(groups) - 0.5, -0.5))  # the first type on top
    axes.xaxis.grid(True)
    figure.legend(handles=[keys[key] for key in sorted(keys, key=str)], loc="outside upper left", ncols=3)
    return figure


def draw_calibration(runs: list[dict]):
    """Reliability diagrams: of one run those of all questions and of its types, of several that of all questions."""
    entries = [(run["name"], run["micro"]) for run in runs]
    if len(runs) == 1:
        entries = [("all questions", runs[0]["micro"]), *runs[0]["types"].items()]
    panels = [(name, entry["calibration"]) for name, entry in entries if "calibration" in entry][:MOST_PANELS]
    if not panels:
        return None
    columns, lines = min(3, len(panels)), math.ceil(len(panels) / 3)
    figure = new_figure(0.4 + 2.9 * columns, 2.9 * lines)
    grid, fifths = figure.subplots(lines, columns, squeeze=False).ravel(), np.linspace(0, 1, 6)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, calibration) in zip(grid, panels, strict=False):
        bins = [b for b in calibration["bins"] if b["n"]]
        confidence, accuracy, n = ([b[field] for b in bins] for field in ("confidence", "accuracy", "n"))
        middles, width = [(b["low"] + b["high"]) / 2 for b in bins], 0.94 / len(calibration["bins"])
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
        axes.bar_label(axes.bar(middles, accuracy, width, color=COLOURS[0], alpha=0.45), n, fontsize=6, padding=3)
        axes.plot(confidence, accuracy, "o", color=COLOURS[0], markersize=4, clip_on=False)
        axes.set(xlim=(0, 1), ylim=(0, 1.08), xticks=fifths, yticks=fifths)
        axes.set(xlabel="its probability", ylabel="share of right ones")
        title = f"{short_label(name)}\nECE {calibration['ece']:.3f}, n {calibration['n']:,}"
        axes.set_title(title, fontsize=9, loc="left")
    return figure


def draw_curves(runs: list[dict], curves: dict[str, list[dict]]):
    """Loss with its validation, gradient norm and learning rate over the steps, up to the planned end."""
    names = {"loss": "loss (log scale)", "grad_norm": "gradient norm\n(log scale)", "lr": "learning\nrate"}
    names = {k: v for k, v in names.items() if any(k in line for lines in curves.values() for line in lines)}
    if not names:
        return None
    heights = [{"loss": 2.8, "grad_norm": 1.4, "lr": 0.7}[field] for field in names]  # inches
    figure = new_figure(8.6, 0.7 + sum(heights))
    panels = figure.subplots(len(names), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (field, name) in zip(panels, names.items(), strict=True):
        if field != "lr":
            axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:g}")  # matplotlib writes powers as formulas, which STYLE switches off
        axes.yaxis.set_minor_formatter("{x:g}")
        for i, run in enumerate(runs):
            lines, colour = curves.get(run["name"], []), COLOURS[i % len(COLOURS)]
            steps, values = series(lines, field)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            smooth = values if field == "lr" else smoothed(values)
            axes.plot(steps, smooth, color=colour, linewidth=1.3, label=short_label(run["name"]))
            if field == "loss":
                steps, values = series(lines, "val_loss")
                style = {"color": "black", "linewidth": 0.8, "markerfacecolor": colour}
                axes.plot(steps, values, "o-", label=None if i else "validation (star: best)", markersize=4.5, **style)
                at = int(np.nanargmin([*values, math.inf]))  # behind the last where there is none
                axes.plot(steps[at:][:1], values[at:][:1], "*", markersize=11, **style)
            if isinstance(run.get("steps"), int):
                axes.axvline(run["steps"], color="#888888", linestyle=":", label=None if i else "planned end")
        axes.set_ylabel(name)
        axes.grid(True, which="both")
    panels[-1].set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def smoothed(values: list) -> np.ndarray:
    """The mean of each value and its neighbours, a fiftieth of all together."""
    window, ones = np.ones(max(1, len(values) // 50)), np.ones(len(values))
    return np.convolve(values, window, "same") / np.convolve(ones, window, "same") if values else ones


def series(lines: list[dict], field: str) -> tuple[list, list]:
    """Steps and values, as far as they were written. What is not finite leaves a gap."""
    found = [(line["step"], line[field]) for line in lines if isinstance(line.get(field), int | float)]
    return [step for step, _ in found], [value if math.isfinite(value) else math.nan for _, value in found]


def short_label(text: str) -> str:
    """A name short enough for a figure, without characters that XML refuses."""
    return shorten("".join(c if c.isprintable() else " " for c in str(text)), 40)


def figure_svg(figure) -> str:
    """The figure as SVG, on white as a paper wants it: what the page shows, too."""
    import matplotlib.style

    buffer = io.StringIO()
    with matplotlib.style.context(STYLE):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    return buffer.getvalue()


def write_figures(folder: Path, figures: dict) -> None:
    """NAME.svg and NAME.png of each figure."""
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.svg").write_text(figure_svg(figure), "utf-8")
        figure.savefig(folder / f"{name}.png", facecolor="white", dpi=200)

import base64
import hashlib
import html
import importlib.util
import io
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import runtime

# ------------------------------------------------------------------------------------------------------------
# Figures
# ------------------------------------------------------------------------------------------------------------

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
    return importlib.util.find_spec("matplotlib") is not None


def draw_figures(report: dict, curves: dict[str, list[dict]]) -> dict:
    """{name: matplotlib Figure}: accuracy, calibration, curves, as far as there is something to draw."""
    if not have_matplotlib():
        return {}
    import matplotlib

    with matplotlib.rc_context(PLAIN_STYLE):
        figures = {
            "accuracy": _draw_accuracy(report["runs"]),
            "calibration": _draw_calibration(report["runs"]),
            "curves": _draw_curves(report["runs"], curves),
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _draw_accuracy(runs: list[dict]):
    """A group of bars for each question type, one bar a run: exact, its interval, and the best floor as a tick."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(kind for run in runs for kind in run["types"]))
    rows = [(_label(kind), [run["types"].get(kind) for run in runs]) for kind in kinds]
    rows.append(("all questions", [run["all"] for run in runs]))
    height = 0.8 / len(runs) if len(runs) > 1 else 0.6
    figure = Figure(figsize=(8.6, 1 + len(rows) * (0.16 + 0.2 * len(runs))), layout="constrained")
    axes = figure.subplots()
    for row, (_, entries) in enumerate(rows):
        for i, entry in enumerate(entries):
            if entry is None:
                continue  # this run has no such question
            y = row + (i - (len(runs) - 1) / 2) * height
            axes.barh(y, entry["exact"], height * 0.86, color=_colour(i))
            if entry["interval"]:
                axes.plot(entry["interval"], [y, y], "|-", color="black", linewidth=1, markersize=5, clip_on=False)
            for floor in [max(entry["floors"].values())] if entry["floors"] else []:
                axes.plot([floor, floor], [y - height * 0.43, y + height * 0.43], color="black", linewidth=2.5)
            axes.text(1.015, y, _percent(entry["exact"]), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first type on top
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{x} %" for x in range(0, 101, 20)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    keys = [Patch(color=_colour(i), label=_label(run["name"])) for i, run in enumerate(runs) if len(runs) > 1]
    keys.append(Line2D([], [], color="black", marker="|", linewidth=1, label="95 % interval"))
    floor = {"marker": "|", "markersize": 9, "markeredgewidth": 2.5, "linestyle": ""}
    if any(run["all"]["floors"] for run in runs):
        keys.append(Line2D([], [], color="black", label="best floor without images", **floor))
    figure.legend(handles=keys, loc="outside upper left", ncols=min(len(keys), 3), frameon=False, fontsize=8)
    return figure


def _draw_calibration(runs: list[dict]):
    """Reliability diagrams with the number of answers in each bin below; of several runs that of all questions."""
    from matplotlib.figure import Figure

    panels = _calibration_panels(runs)
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


def _calibration_panels(runs: list[dict]) -> list[tuple]:
    """(title, calibration, colour, of all questions?) of everything that has a calibration."""
    panels = []
    for i, run in enumerate(runs):
        prefix = f"{_label(run['name'], 24)}: " if len(runs) > 1 else ""
        found = [("all questions", run["all"])] if "calibration" in run["all"] else []
        if len(runs) == 1 or not found:
            found += [(_label(kind, 24), entry) for kind, entry in run["types"].items() if "calibration" in entry]
        for name, entry in found:
            panels.append((prefix + name, entry["calibration"], _colour(i), entry is run["all"]))
    return panels


def _draw_curves(runs: list[dict], curves: dict[str, list[dict]]):
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
            axes.plot(*_series(lines, field), color=_colour(i), linewidth=1, alpha=0.85, label=_label(run))
        for i, _, lines in shown if field == "loss" else []:
            label = "validation" if i == shown[-1][0] else None
            style = {"color": "black", "linewidth": 0.8, "markerfacecolor": _colour(i), "markersize": 4.5}
            axes.plot(*_series(lines, "val_loss"), "o-", label=label, **style)
        axes.set_ylabel(name)
        axes.grid(True, color=GRID, linewidth=0.6)
        _scale(axes, logarithmic=field != "lr")
    panels[-1].set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    return figure


def _series(lines: list[dict], field: str) -> tuple[list, list]:
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


def _scale(axes, logarithmic: bool) -> None:
    """Plain numbers on the axis: matplotlib writes powers as formulas, which PLAIN_STYLE switches off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if logarithmic and len(values) and values.min() > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if values.max() > 30 * values.min() else (1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _label(text: str, most: int = 40) -> str:
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
    # its style element would be the whole page's
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


# ------------------------------------------------------------------------------------------------------------
# Thumbnails
# ------------------------------------------------------------------------------------------------------------

PICTURES = {".jpg", ".jpeg", ".png"}  # several of them in a row are the frames of a clip
ANIMATIONS = {".gif", ".webp", ".apng"}
VOLUMES = {".nii", ".gz", ".npy", ".npz"}
KNOWN = PICTURES | ANIMATIONS | VOLUMES | {".wav"}
HEIGHT, STRIP_HEIGHT, WIDEST = 112, 84, 448  # pixels
MOST_FRAMES = 4
MOST_PIXELS, MOST_MOVING_PIXELS, MOST_VOXELS = 50_000_000, 1_000_000_000, 2**27
MOST_ALIKE = 5  # faults of one kind that are named
NEEDS_NIBABEL = "volumes need pip install nibabel"
MOST_SOUND = 400_000  # bytes, 12 seconds of 16 kHz


def thumbnails(folder: Path | None, records: list[dict], budget_bytes: int) -> tuple[list[dict], list[list[int]], list]:
    """What the records show, small enough for one page: media, for each record the indices into them, and faults.

    Wrong predictions come first, then right ones spread evenly over the records; when the budget (characters of all
    data URIs) is full, nothing more is opened. Sound is heavy, so pictures come before it, with three quarters of the
    budget. What cannot be shown is left out; the faults name some files of each kind of fault, and count the others.
    """
    media, of, faults = [], [[] for _ in records], {}  # faults: text -> its kind
    named = {name for record in records for name in record["media"]}
    if folder is None or not named:
        return media, of, []
    if not folder.is_dir():
        where = "start report.py in the folder where the run was started"
        return media, of, [f"the data folder {folder} is not here: {where}"]
    unknown = sum(Path(name).suffix.lower() not in KNOWN for name in named)
    jobs = [(i, thing) for i, record in enumerate(records) for thing in _things(record["media"])]
    with_sound = any(kind == "sound" for _, (kind, _) in jobs)
    budgets = {False: budget_bytes * (0.75 if with_sound else 1), True: budget_bytes}  # of pictures; of all
    made, used, full = {}, 0, {False: False, True: False}  # thing -> index into media; None: it cannot be made

    def first(job) -> tuple:
        i, (kind, _) = job
        # the bits of the index reversed: 0, n/2, n/4, 3n/4 …, of which every beginning is spread evenly
        return kind == "sound", records[i]["correct"], int(f"{i:040b}"[::-1], 2)

    for i, thing in sorted(jobs, key=first):
        sound = thing[0] == "sound"
        if thing not in made and not full[sound]:
            try:
                entry = _thumbnail(folder, *thing)
            except Exception as error:  # damaged files make a decoder raise anything
                made[thing] = None
                text = _fault(folder, thing[1], error)
                faults[text] = _kind_of_fault(text, thing[1])
                continue
            full[sound] = used + len(entry["src"]) > budgets[sound]
            if not full[sound]:
                made[thing] = len(media)
                media.append(entry)
                used += len(entry["src"])
        if made.get(thing) is not None:
            of[i].append(made[thing])
    left = Counter(kind for kind, _ in {thing for _, thing in jobs} - made.keys())
    told = _few_of_each(faults)
    told += [f"{unknown:,} {'file' if unknown == 1 else 'files'} of no known kind"] if unknown else []
    told += [f"no room left: {n:,} × {kind}" for kind, n in sorted(left.items())]
    return media, of, told


def _fault(folder: Path, names: tuple[str, ...], error: Exception) -> str:
    """The error with the name of a file, but not with where on this machine it lies, nor with a training's advice."""
    text = (str(error) or type(error).__name__).replace(f"{folder.resolve()}/", "")
    text = re.sub(r"; [^;]*--skip-bad[^;]*$", "", text)
    return text if text == NEEDS_NIBABEL or any(name in text for name in names) else f"{', '.join(names)}: {text}"


def _kind_of_fault(text: str, names: tuple[str, ...]) -> str:
    """The text without what differs from file to file: names and numbers."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "")
    return re.sub(r"\d[\d,.]*", "0", text)


def _few_of_each(faults: dict[str, str]) -> list[str]:
    """The first faults of each kind, and how many more are like them."""
    kinds = {}
    for text, kind in faults.items():
        kinds.setdefault(kind, []).append(text)
    told = []
    for texts in kinds.values():
        told += texts[:MOST_ALIKE]
        told += [f"… and {len(texts) - MOST_ALIKE:,} more like the last"] if len(texts) > MOST_ALIKE else []
    return told


def _things(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """What a record's files are: pictures together, of which at most four are shown; others one by one."""
    kinds = [(Path(name).suffix.lower(), name) for name in names]
    frames = [name for suffix, name in kinds if suffix in PICTURES]
    things = [("pictures", tuple(frames[i] for i in _evenly(len(frames), MOST_FRAMES)))] if frames else []
    for suffix, name in kinds:
        if suffix in ANIMATIONS:
            things.append(("pictures", (name,)))
        elif suffix in VOLUMES:
            things.append(("volume", (name,)))
        elif suffix == ".wav":
            things.append(("sound", (name,)))
    return things


def _evenly(count: int, n: int) -> list[int]:
    """n of `count`, the first and the last among them; all where there are no more than n."""
    return list(range(count)) if count <= n else [round(i * (count - 1) / (n - 1)) for i in range(n)]


def _thumbnail(folder: Path, kind: str, names: tuple[str, ...]) -> dict:
    paths = [runtime.inside(folder, name) for name in names]
    if kind == "sound":
        return {"kind": "sound", "src": _sound(paths[0]), "name": names[0]}
    if kind == "volume":
        voxels, spacing = _open_volume(paths[0])
        if voxels.dtype != np.uint8 or voxels.ndim != 4 or voxels.shape[3] != 3:
            return {"kind": "slices", "src": _jpeg(_slices(voxels, spacing)), "name": names[0]}
        frames = [Image.fromarray(np.array(voxels[i])) for i in _evenly(len(voxels), MOST_FRAMES)]  # a video
    elif len(paths) > 1:
        frames = [_open_frames(path, 1)[0] for path in paths]
    else:
        frames = _open_frames(paths[0], MOST_FRAMES)
    if len(frames) > 1:
        return {"kind": "strip", "src": _jpeg(_side_by_side(frames)), "name": ", ".join(names)}
    frames[0].thumbnail((WIDEST, HEIGHT))
    return {"kind": "image", "src": _jpeg(frames[0]), "name": names[0]}


def _open_frames(path: Path, most: int) -> list[Image.Image]:
    """Up to `most` frames of an image or animation, evenly chosen; a JPEG is decoded no larger than it is needed."""
    with Image.open(path, formats=["JPEG", "PNG", "GIF", "WEBP"]) as image:
        # an MPO holds one picture twice; an APNG may begin with what is shown where it cannot be played
        single, first = image.format in ("JPEG", "MPO"), int(getattr(image, "default_image", False))
        count = 1 if single else getattr(image, "n_frames", 1) - first
        pixels = image.width * image.height
        if pixels > MOST_PIXELS or pixels * count > MOST_MOVING_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, {count} frames: too large for a thumbnail")
        if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1"):
            raise ValueError(f"colour mode {image.mode}")
        image.draft("RGB", (1, 2 * HEIGHT))
        frames = []
        for i in _evenly(count, most):
            image.seek(first + i)
            frames.append(ImageOps.exif_transpose(image).convert("RGB"))
    return frames


def _side_by_side(pictures: list[Image.Image], height: int = STRIP_HEIGHT, gap: int = 2) -> Image.Image:
    widths = [min(WIDEST, max(1, round(height * p.width / p.height))) for p in pictures]
    strip = Image.new("RGB", (sum(widths) + gap * (len(widths) - 1), height), (128, 128, 128))
    for i, (picture, width) in enumerate(zip(pictures, widths, strict=True)):
        strip.paste(picture.resize((width, height)), (sum(widths[:i]) + gap * i, 0))
    return strip


def _open_volume(path: Path) -> tuple[np.ndarray, tuple]:
    """The array and the distances of its voxels; of NIfTI files the first time point, x to the right, z up."""
    if path.name.lower().endswith((".nii", ".nii.gz")):
        try:
            import nibabel
        except ImportError:
            raise ImportError(NEEDS_NIBABEL) from None
        image = nibabel.load(path)
        _refuse_large(image.shape[:3])
        if not any(int(image.header.get(code, 0)) for code in ("qform_code", "sform_code")):
            raise ValueError("no orientation: left and right are not known")  # nibabel would guess them
        while image.ndim > 3:
            image = image.slicer[..., 0]
        image = nibabel.as_closest_canonical(image)
        return np.asarray(image.dataobj), image.header.get_zooms()[:3]
    if path.suffix.lower() == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            _refuse_large((archive.zip.getinfo(f"{archive.files[0]}.npy").file_size // 4,))
            return archive[archive.files[0]], (1, 1, 1)
    return np.load(path, mmap_mode="r", allow_pickle=False), (1, 1, 1)


def _refuse_large(shape: tuple) -> None:
    if math.prod(shape) > MOST_VOXELS:
        raise ValueError(f"{math.prod(shape):,} voxels: too large for a thumbnail")


def _slices(voxels: np.ndarray, spacing: tuple) -> Image.Image:
    """Through the middle, as radiologists see them: from the feet, the front, the side; the patient's right is left."""
    while voxels.ndim > 3:
        voxels = voxels[..., 0]  # the first time point, the first channel
    if voxels.ndim < 3:
        raise ValueError(f"an array of {voxels.ndim} axes is no volume")
    _refuse_large(voxels.shape)
    x, y, z = (size // 2 for size in voxels.shape)
    planes = [(voxels[:, :, z], 0, 1), (voxels[:, y], 0, 2), (voxels[x], 1, 2)]  # slice, its axis to the left, up
    planes = [(np.nan_to_num(plane.astype(np.float32), posinf=0, neginf=0), a, b) for plane, a, b in planes]
    low, high = np.percentile(np.concatenate([plane.ravel() for plane, _, _ in planes]), [1, 99])
    pictures = []
    for plane, left, up in planes:
        grey = (255 * np.clip((plane - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(grey.T[::-1, ::-1]))
        width = round(HEIGHT * picture.width * spacing[left] / (picture.height * spacing[up]))
        pictures.append(picture.resize((max(1, min(WIDEST, width)), HEIGHT)))
    return _side_by_side(pictures, HEIGHT)


def _sound(path: Path) -> str:
    if path.stat().st_size > MOST_SOUND:
        raise ValueError(f"{path.stat().st_size:,} bytes of sound: too large for the page")
    content = path.read_bytes()
    if content[:4] != b"RIFF":
        raise ValueError("no WAV file")
    return f"data:audio/wav;base64,{base64.b64encode(content).decode()}"


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------------

ON_A_PAGE = 24
LONGEST_TEXT = 600  # characters of a question or answer in the gallery
MOST_LINES = 200  # of a list of findings
MOST_LABELS = 40
TEXT = "text"  # the class of a column that holds no numbers
CALIBRATION = (
    "All is of the most probable candidate, which need not be the answer given. Bars: the share of right ones among "
    "those of about this probability; dots: their mean probability. On the dashed line a model is right as often as it "
    "says. Below: how many answers. ECE is the mean distance from the line, each answer counting the same."
)
MORE_CALIBRATION = (
    f" Only {MOST_PANELS} diagrams are drawn, of all questions and of the types with most answers; the table of "
    "accuracy has the ECE of the others."
)
FLOORS = (
    "A floor is what a model that never sees an image gets: always the most frequent training answer of the question "
    "type, that of the very same question, or the answer of the nearest, most similar training question. A run that is "
    "not clearly above the best of the three has not shown that it sees."
)
HOW_TO_READ = {  # what it is about -> what a reader should know
    "exact": "right is the answer, or another form of it that the data allow, apart from case and punctuation.",
    "tolerant": "right is also a size that is close enough, and a count that stands alone in a sentence.",
    "floors": "type, question and nearest are three ways to answer without seeing; the <u>best</u> one is underlined, "
    "and is chosen on these same questions.",
    "95 %": "the interval of a bootstrap over whole groups (patients, videos or images), to which one group all right "
    "and one all wrong are added, each worth one question, so that it is not too short near 100 % or with few groups.",
    "balanced, precision, recall, F1": "means over the labels, each counting the same.",
    "scored": "the share where the most probable of the candidates is right.",
    "AUROC, mAP": "how well probabilities set right candidates before wrong ones: 1 is perfect; AUROC 0.5 is chance.",
    "ECE": "how far probabilities are, on average, from the share that is right: 0 is perfect.",
}


def page(report: dict, gallery: list, media: list, masks: list, figures: dict, faults: list = ()) -> str:
    """One HTML file that needs no other and reaches for nothing: figures, predictions and what they were made from.

    figures are those of draw_figures, media and faults those of thumbnails. Whatever comes from the data is escaped
    here, and in the browser set as text, never as HTML.
    """
    figure = {name: figure_svg(drawn) for name, drawn in figures.items()}
    calibration = CALIBRATION
    calibration += MORE_CALIBRATION if len(_calibration_panels(report["runs"])) > MOST_PANELS else ""
    sections = [
        ("accuracy", "Accuracy", _accuracy(report["runs"]) + _bars(figure)),
        ("blind", "Without the images", _blind(report["runs"])),
        ("comparisons", "Comparisons", _comparisons(report["comparisons"]) + _seeds(report["seeds"])),
        ("answers", "Answers given", _confusions(report["runs"])),
        ("calibration", "Calibration", _figure(figure.get("calibration"), calibration)),
        ("curves", "Training", _figure(figure.get("curves"), f"At most {MOST_POINTS:,} points a curve.")),
        ("gallery", "Predictions", _gallery(report["runs"], gallery, media, faults)),
        ("masks", "What is learned", _masks(masks)),
        ("audit", "Scorer audit", _audit(report["audit"])),
        ("gate", "Data", _gate(report["gate"])),
        ("settings", "Settings", _settings(report["runs"])),
    ]
    sections = [(name, title, content) for name, title, content in sections if content]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{title}</h2>{content}</section>' for name, title, content in sections)
    title = _text(report["title"])
    own = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()  # no other script runs
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'; img-src data:; media-src data:"
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1></header>
<nav aria-label="Sections">{links}</nav>
<main>{body}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""
    return text.encode("utf-8", "replace").decode()  # half a character, which JSON may hold, is none that UTF-8 has


def _accuracy(runs: list[dict]) -> str:
    parts, floors = [], any(run["all"]["floors"] for run in runs)
    if len(runs) > 1:
        columns = [("run", TEXT), ("n", ""), ("exact", ""), ("95 %", "range"), ("tolerant", ""), ("mean of types", "")]
        columns += [("best floor", ""), ("above it", ""), ("95 %", "range")] if floors else []
        rows = []
        for run in runs:
            cells = [_text(run["name"]), f"{run['n']:,}", *_exact(run["all"]), _percent(run["macro"]["exact"])]
            best = _percent(max(run["all"]["floors"].values(), default=None))
            rows.append([*cells, *([best, *_above(run["all"])] if floors else [])])
        parts.append(_table(columns, rows))
    parts.append(f"<p>All shares in %. {FLOORS if floors else ''}</p>{_how_to_read(floors)}")
    for run in runs:
        heading = f"<h3>{_text(run['name'])}</h3>" if len(runs) > 1 else f'<p class="run">{_text(run["name"])}</p>'
        groups = run["all"]["groups"]
        how = [f"{run['n']:,} questions", f"{groups:,} {'group' if groups == 1 else 'groups'}"]
        how += [f"{what} {_text(run[what])}" for what in ("split", "decode") if run.get(what)]
        how += [f"{_text(name)} {value:.4g}" for name, value in run["own"].items()]
        parts += [heading, _lead(run["all"]), *(f"<p>{_text(note)}</p>" for note in run["notes"])]
        parts += [f'<p class="quiet">{", ".join(how)}</p>', _types_table(run)]
    return "".join(parts)


def _how_to_read(floors: bool) -> str:
    lines = [f"<li><b>{name}</b>: {text}</li>" for name, text in HOW_TO_READ.items() if floors or name != "floors"]
    return f"<details><summary>How to read this</summary><ul>{''.join(lines)}</ul></details>"


def _lead(entry: dict) -> str:
    """The one sentence of a run: what share is right, and whether that is more than a blind guess."""
    share = f"<strong>{_percent(entry['exact'])} %</strong> exactly right"
    if entry["interval"]:
        share += f" ({_range(entry['interval'])})"
    above, interval = entry["above_floor"], entry["above_floor_interval"]
    if above is None:
        return f'<p class="lead">{share}</p>'  # without floors; the notes say how to have them
    told = f"{_percent(abs(above))} points {'above' if above >= 0 else 'below'} the best floor"
    if interval:
        told += f" ({_signed_range(interval)})"
    return f'<p class="lead">{share}, {told} {_mark(entry)}</p>'


# field -> heading of the columns that only some runs have; the first are means over a type's labels
OF_LABELS = {"balanced": "balanced", "precision": "precision", "recall": "recall", "f1": "F1"}
OF_LABELS |= {"auroc": "AUROC", "map": "mAP"}
EXTRA = {**OF_LABELS, "scored": "scored", "ece": "ECE"}
PLAIN = {"auroc", "map", "ece"}  # numbers, not shares in %


def _types_table(run: dict) -> str:
    entries = {kind: _with_ece(entry) for kind, entry in run["types"].items()}
    everything = _with_ece(run["all"])
    extra = [f for f in EXTRA if any(entry.get(f) is not None for entry in (*entries.values(), everything))]
    columns = [("question type", TEXT), ("n", ""), ("exact", ""), ("95 %", "range"), ("tolerant", "")]
    floors = bool(run["all"]["floors"])
    if floors:
        columns += [("type", "first"), ("question", ""), ("nearest", ""), ("points", "first"), ("95 %", "range")]
    columns += [(EXTRA[field], "first" if field == extra[0] else "") for field in extra]
    of_labels = sum(field in OF_LABELS for field in extra)
    groups = [("", 5), ("floors", 3 * floors), ("above the best floor", 2 * floors)]
    groups += [("mean over the labels", of_labels), ("", len(extra) - of_labels)]

    def row(name: str, entry: dict) -> list[str]:
        cells = [name, f"{entry['n']:,}", *_exact(entry)]
        cells += [*_floors(entry), *_above(entry)] if floors else []
        return cells + [(_number if field in PLAIN else _percent)(entry.get(field)) for field in extra]

    rows = []
    for kind, entry in entries.items():
        alone = ' <span class="badge">one answer only</span>' if entry.get("single_class") else ""
        rows.append(row(_name(kind) + alone, entry))
    macro = run["macro"]
    mean = ["mean of types", "", _percent(macro["exact"]), "", _percent(macro["tolerant"])]
    mean += [*_floors(macro), _signed(macro["exact"] - max(macro["floors"].values()))] if macro["floors"] else []
    totals = [row("all questions", everything), mean + [""] * (len(columns) - len(mean))]
    return _table(columns, rows, totals, groups)


def _with_ece(entry: dict) -> dict:
    return entry | {"ece": entry["calibration"]["ece"]} if "calibration" in entry else entry


def _exact(entry: dict) -> list[str]:
    return [f"<b>{_percent(entry['exact'])}</b>", _range(entry["interval"]), _percent(entry["tolerant"])]


def _floors(entry: dict) -> list[str]:
    """The three floors; the best one, which counts, is set off."""
    shown = {name: _percent(entry["floors"].get(name)) for name in ("type", "question", "nearest")}
    return [f"<u>{share}</u>" if name == entry.get("best_floor") else share for name, share in shown.items()]


def _above(entry: dict) -> list[str]:
    return [_signed(entry["above_floor"]), f"{_signed_range(entry['above_floor_interval'])} {_mark(entry)}"]


def _mark(entry: dict) -> str:
    """Says where a run is not above its best floor; a single group has no interval and shows neither."""
    interval = entry["above_floor_interval"]
    if entry["above_floor"] is None:
        return ""
    if entry["above_floor"] <= 0 or (interval and interval[0] <= 0):
        return '<span class="badge bad">not above the floor</span>'
    return "" if interval else '<span class="badge">one group: not shown</span>'


def _bars(figure: dict) -> str:
    if not figure:
        return '<p class="quiet">Figures need matplotlib: <code>pip install matplotlib</code></p>'
    return _figure(figure.get("accuracy"), "Share of exactly right answers.")


def _figure(svg: str | None, caption: str) -> str:
    return f'<figure><div class="wide">{svg}</div><figcaption>{caption}</figcaption></figure>' if svg else ""


def _blind(runs: list[dict]) -> str:
    columns = [("run", TEXT), ("images", TEXT), ("n", ""), ("exact", ""), ("95 %", "range")]
    columns += [("its own are above by", "first"), ("95 %", "range")]
    names = {"blank": "blank", "shuffled": "those of another group"}
    rows = []
    for run in runs:
        if run["blind"]:
            own = [_text(run["name"]), "its own", _count(run["n"]), f"<b>{_percent(run['all']['exact'])}</b>"]
            rows.append([*own, _range(run["all"]["interval"]), "", ""])
        for how, entry in run["blind"].items():
            interval = entry["difference_interval"]
            lost = entry["difference"] <= 0 or (interval and interval[0] <= 0)
            mark = '<span class="badge bad">no better than blind</span>' if lost else ""
            cells = ["", _text(names.get(how, how)), _count(entry.get("n")), _percent(entry["exact"])]
            rows.append(
                [*cells, _range(entry["interval"]), _signed(entry["difference"]), f"{_signed_range(interval)} {mark}"]
            )
    if not rows:
        return ""
    return "<p>The same model, asked the same questions with other images.</p>" + _table(columns, rows)


def _comparisons(comparisons: list[dict]) -> str:
    columns = [("question type", TEXT), ("n", ""), ("points", ""), ("95 %", "range"), ("", TEXT)]
    parts = []
    for pair in comparisons:
        entries = [*((_name(kind), entry) for kind, entry in pair["types"].items()), ("all questions", pair["all"])]
        rows = [
            [name, f"{e['n']:,}", _signed(e["difference"]), _signed_range(e["interval"]), _better(pair, e["interval"])]
            for name, e in entries
        ]
        parts.append(f"<h3>{_text(pair['a'])} minus {_text(pair['b'])}</h3>")
        parts.append(f'<p class="quiet">Paired over the {pair["n"]:,} questions that both answer.</p>')
        parts.append(_table(columns, rows[:-1], rows[-1:]))
    chance = "<p>Of 20 such lines one is expected to exclude zero by chance alone.</p>"
    return chance + "".join(parts) if parts else ""


def _better(pair: dict, interval: list | None) -> str:
    if interval is None:
        return "one group: not shown"
    if interval[0] <= 0 <= interval[1]:
        return "no difference shown"
    return f"{_text(pair['a'] if interval[0] > 0 else pair['b'])} is higher here"


def _seeds(seeds: list[dict]) -> str:
    parts = []
    columns = [("question type", TEXT), ("mean", ""), ("standard deviation", ""), ("least", ""), ("most", "")]
    for group in seeds:
        rows = [
            [_name(kind), *(_percent(entry[field]) for field in ("mean", "sd", "least", "most"))]
            for kind, entry in [*group["types"].items(), ("all questions", group["all"])]
        ]
        names = f"{', '.join(map(_text, group['runs']))}; seeds {', '.join(map(_text, group['seeds']))}"
        parts += [f"<h3>Over {len(group['runs'])} seeds</h3>", f'<p class="quiet">{names}</p>']
        parts.append(_table(columns, rows[:-1], rows[-1:]))
    return "".join(parts)


def _confusions(runs: list[dict]) -> str:
    """A table a type, folded: a row each true label, how often each label was said, and the label's figures."""
    parts = []
    for run in runs:
        found = [(kind, entry) for kind, entry in run["types"].items() if entry.get("per_label")]
        parts += [f"<h3>{_text(run['name'])}</h3>"] if found and len(runs) > 1 else []
        for kind, entry in found:
            told = f"{entry['n']:,} questions, {_percent(entry['exact'])} % exactly right"
            summary = f'<summary><b>{_name(kind)}</b> <span class="quiet">{told}</span></summary>'
            parts.append(f"<details>{summary}{_confusion(entry)}</details>")
    note = (
        "<p>Rows are true answers. Cells are shaded by their share of the row, right ones blue, wrong ones orange.</p>"
    )
    return note + "".join(parts) if parts else ""


def _confusion(entry: dict) -> str:
    labels, per_label = list(entry["labels"]), entry["per_label"]
    table = entry.get("confusion")
    columns = [("true answer", TEXT), ("n", "")]
    columns += [(_text(label), "label") for label in labels] + [("<i>(none of these)</i>", "label")] if table else []
    columns += [("precision", "first"), ("recall", ""), ("F1", "")]
    groups = [("", 2), ("answered", len(labels) + 1), ("", 3)] if table else None
    most = len(labels) if table else MOST_LABELS
    rows = []
    for i, label in enumerate(labels[:most]):
        figures = per_label.get(label, {})
        cells = [_text(label), f"{figures.get('n', 0):,}"]
        if table:
            total = max(1, sum(table[i]))
            cells += [_shaded(count, count / total, right=i == j) for j, count in enumerate(table[i])]
        rows.append(cells + [_percent(figures.get(field)) for field in ("precision", "recall", "f1")])
    return _table(columns, rows, groups=groups) + _more(len(labels) - most, "answers")


def _shaded(count: int, share: float, right: bool) -> str:
    kind = "right" if right else "wrong"
    return f'<td class="{kind}" style="--share:{share:.2f}">{count:,}</td>' if count else '<td class="quiet">0</td>'


# What became of a question: the gallery knows these by their number.
STATES = ("right", "tolerantly right", "wrong", "no answer")


def _gallery(runs: list[dict], gallery: list[dict], media: list[dict], faults: list[str]) -> str:
    """The predictions as JSON, which SCRIPT shows a page at a time, with the controls to choose among them."""
    if not gallery:
        return ""
    kinds = list(dict.fromkeys(record["type"] for record in gallery))
    number = {kind: i for i, kind in enumerate(kinds)}
    rows = [_row(record, number[record["type"]]) for record in gallery]
    ended = [sum(row[6] == state for row in rows) for state in range(len(STATES))]
    everything = ("all", "", len(rows))
    asked = [(run["name"], i, sum(row[0] == i for row in rows)) for i, run in enumerate(runs)]
    typed = [(kind, i, sum(row[2] == i for row in rows)) for kind, i in number.items()]
    results = [("right", "0", ended[0]), ("wrong or unanswered", "2 3", ended[2] + ended[3])]
    results += [("only tolerantly right", "1", ended[1]), ("unanswered", "3", ended[3])]
    orders = [("as in the data", "", None), ("most probable first", "-1", None), ("least probable first", "1", None)]
    controls = _choice("run", [everything, *asked]) if len(runs) > 1 else ""
    controls += _choice("type", [everything, *typed]) + _choice("result", [everything, *results])
    controls += _choice("order", orders) if any(row[7] is not None for row in rows) else ""
    controls += '<label>search <input id="search" type="search" placeholder="question, answer, prediction, id"></label>'
    pager = (
        '<div class="pager"><button type="button" data-turn="-1">Previous</button><span></span>'
        '<button type="button" data-turn="1">Next</button></div>'
    )
    embedded = [[entry["kind"], entry["src"], entry["name"]] for entry in media]
    data = {"states": STATES, "types": kinds, "runs": [run["name"] for run in runs], "rows": rows, "size": ON_A_PAGE}
    return f"""{_shown(gallery, media, faults)}
<form class="controls" role="search" aria-label="Predictions">{controls}</form>
<div class="found"><output id="count" aria-live="polite"></output><span id="printed"></span>{pager}</div>
<noscript><p>The predictions need JavaScript.</p></noscript>
<div id="cards"></div>
{pager}
<script type="application/json" id="gallery-data">{_json(data)}</script>
<script type="application/json" id="gallery-media">{_json(embedded)}</script>"""


def _row(record: dict, kind: int) -> list:
    """A record as a list, which in ten thousand of them takes half the room of one with field names."""
    said = record["prediction"]
    state = 3 if said is None else 0 if record["correct"] else 1 if record["tolerant"] else 2
    p = record.get("p")
    p = round(p, 4) if p is not None and math.isfinite(p) else None
    texts = [_short(record["question"]), _short(record["answer"]), None if said is None else _short(said)]
    row = [record["run"], str(record["id"]), kind, *texts, state, p, list(record["media"])]
    return [*row, [_short(form) for form in record["also_right"]]] if record.get("also_right") else row


def _short(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"


def _choice(name: str, options: list[tuple]) -> str:
    """A labelled select of (text, value, how many records it leaves)."""
    shown = [(_text(text), value, "" if n is None else f" ({n:,})") for text, value, n in options]
    inner = "".join(f'<option value="{value}">{text}{n}</option>' for text, value, n in shown)
    return f'<label>{name} <select id="{name}">{inner}</select></label>'


def _shown(gallery: list[dict], media: list[dict], faults: list[str]) -> str:
    """What the reader should know of the pictures: how many there are, how they lie, and which are missing."""
    if faults and not media:
        return f"<p>No pictures: {_text(faults[0])}</p>{_not_shown(faults[1:])}"
    told = []
    seen = sum(bool(record["media"]) for record in gallery)
    if media and seen < len(gallery):
        told.append(f"{seen:,} of {len(gallery):,} are shown with their pictures or sound, wrong ones first.")
    volumes = [entry["name"].lower() for entry in media if entry["kind"] == "slices"]
    nifti = [name for name in volumes if name.endswith((".nii", ".nii.gz"))]
    if volumes:
        told.append("Of volumes only the middle slices are shown.")
    if nifti:
        told.append("NIfTI files are seen as by radiologists, from feet, front and side: the patient’s right is left.")
    if len(nifti) < len(volumes):
        told.append(".npy and .npz files do not say how they lie: they are taken as x to the right (RAS).")
    if media:
        told.append("The page contains pictures of the data: share it only as you may share these.")
    return (f'<p class="quiet">{" ".join(told)}</p>' if told else "") + _not_shown(faults)


def _not_shown(faults: list[str]) -> str:
    return f"<details><summary>What is not shown</summary>{_list(faults)}</details>" if faults else ""


def _masks(masks: list[dict]) -> str:
    """Each run's first row, token by token."""
    kinds = {"media": "media", "masked": "read, not learned", "learned": "learned"}
    legend = "".join(f'<span class="token {kind}">{text}</span> ' for kind, text in kinds.items())
    parts = []
    for mask in masks:
        tokens = []
        for text, kind, count in mask["tokens"]:
            kind = kind if kind in kinds else "masked"
            times = f" × {count:,}" if count > 1 else ""
            shown = text if kind == "media" else _readable(text)
            tokens.append(f'<span class="token {kind}">{_text(shown)}{times}</span>')
        heading = f"<h3>{_text(mask['run'])}</h3>" if len(masks) > 1 else ""
        parts += [heading, f'<p class="quiet">Row {_text(mask["id"])}</p><div class="tokens">{"".join(tokens)}</div>']
    legend = f"<p>Boxes are tokens; × says how many: {legend}</p>"
    return legend + "".join(parts) if parts else ""


def _readable(token: str) -> str:
    """A token with its tokenizer's marks for a space and the end of a line as signs that readers know."""
    for mark in ("▁", "Ġ"):
        token = token.replace(mark, "·")
    for mark in ("Ċ", "<0x0A>"):
        token = token.replace(mark, "\n")
    return token.replace("\n", "↵\n")


def _audit(audit: dict | None) -> str:
    if not audit:
        return ""
    listed = audit["failures"]
    failed = max(audit.get("failed") or 0, len(listed))  # the lists are cut, the totals are not
    declared = max(audit.get("declared") or 0, len(audit["same"]))
    badge = '<span class="badge bad">failed</span>' if failed else '<span class="badge good">passed</span>'
    text = f"{audit['answers']:,} different answers, {audit['pairs']:,} pairs of them scored against each other. "
    text += f"{declared:,} are right for each other: the same after normalising, or declared to be."
    why = "The scorer is asked what must be wrong: one that calls wrong answers right makes every figure here too high."
    parts = [_of_run(audit), f"<p>{why}</p><p>{badge} {text}</p>"]
    if failed:
        parts.append(f"<p>{failed:,} wrong answers were called right or left out:</p>{_list(listed, failed)}")
    if audit["probes"]:
        parts.append("<p>Each of these was given as the answer to every row; none may count as right.</p>")
        rows = [[_text(name), f"{n:,}"] for name, n in audit["probes"].items()]
        parts.append(_table([("probe", TEXT), ("rows tested", "")], rows))
    if audit["same"]:
        rows = [[_text(a), _text(b)] for a, b in audit["same"][:MOST_LINES]]
        table = _table([("answer", TEXT), ("is right for", TEXT)], rows)
        more = _more(declared - len(rows), "pairs")
        summary = f"<summary>{declared:,} pairs that are right for each other</summary>"
        parts.append(f"<details>{summary}{table}{more}</details>")
    return "".join(parts)


def _of_run(found: dict) -> str:
    return f'<p class="quiet">Of the run {_text(found["run"])}.</p>' if found.get("run") else ""


def _gate(gate: dict | None) -> str:
    if not gate:
        return ""
    parts = [_of_run(gate)]
    if gate["findings"]:
        rows = [[_text(f["kind"]), _text(f["where"]), _text(f["text"])] for f in gate["findings"][:MOST_LINES]]
        parts.append(_table([("finding", TEXT), ("where", TEXT), ("", TEXT)], rows))
        parts.append(_more(len(gate["findings"]) - MOST_LINES, "findings"))
    else:
        parts.append('<p><span class="badge good">passed</span> Nothing was found.</p>')
    splits = gate["splits"]
    if splits:
        kinds = list(dict.fromkeys(kind for split in splits.values() for kind in split["question_types"]))
        rows = [[_name(kind), *(_count(s["question_types"].get(kind)) for s in splits.values())] for kind in kinds]
        totals = [[what, *(_count(split[what]) for split in splits.values())] for what in ("questions", "files")]
        columns = [("question type", TEXT), *((_text(name), "") for name in splits)]
        parts += ["<h3>Splits</h3>", _table(columns, rows, totals), "<h3>Most frequent answers</h3>"]
        lists = []
        for name, split in splits.items():
            n = max(1, split["questions"])
            rows = [[_text(answer), f"{of:,}", _percent(of / n)] for answer, of in split["answers"].items()]
            lists.append(f"<div>{_table([(_text(name), TEXT), ('n', ''), ('%', '')], rows)}</div>")
        parts.append(f'<div class="beside">{"".join(lists)}</div>')
    return "".join(parts)


def _settings(runs: list[dict]) -> str:
    """Settings and versions, a column each run, what differs between them marked; then the commands. All folded."""
    columns = [("", TEXT), *((_text(run["name"]) if len(runs) > 1 else "value", TEXT) for run in runs)]
    commits = [{"git commit": run["git_commit"]} if run["git_commit"] else {} for run in runs]
    tables = {
        "Settings": [run["settings"] for run in runs],
        "Versions": [run["versions"] | commit for run, commit in zip(runs, commits, strict=True)],
    }
    parts = []
    for title, of in tables.items():
        rows = []
        for name in dict.fromkeys(name for values in of for name in values):
            values = [_value(values[name]) if name in values else "–" for values in of]
            differs = ' <span class="badge">differs</span>' if len(set(values)) > 1 else ""
            rows.append([_text(name) + differs, *(f"<code>{value}</code>" for value in values)])
        if rows:
            parts.append(f"<details><summary>{title}</summary>{_table(columns, rows)}</details>")
    started = [[*(["python", run["script"]] if run.get("script") else []), *run["argv"]] for run in runs]
    commands = [shlex.join(map(str, words)) for words in started if words]
    if commands:
        lines = "".join(f"<pre>{_text(command)}</pre>" for command in commands)
        parts.append(f"<details><summary>Commands</summary>{lines}</details>")
    return "".join(parts)


def _value(value) -> str:
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _table(
    columns: list[tuple], rows: list[list[str]], totals: list[list[str]] = (), groups: list | None = None
) -> str:
    """A table in a box of its own, which scrolls where it is too wide.

    Cells are HTML, or a whole <td>; the first of a row names it.
    columns: (heading, class); groups: (heading, how many columns it spans), a line above the headings.
    """
    head = ""
    if groups:
        spans = (f'<th colspan="{n}" scope="colgroup" class="group">{text}</th>' for text, n in groups if n)
        head = f"<tr>{''.join(spans)}</tr>"
    head += "<tr>" + "".join(f'<th scope="col"{_class(kind)}>{text}</th>' for text, kind in columns) + "</tr>"

    def lines(rows) -> str:
        return "".join(
            f'<tr><th scope="row">{row[0]}</th>'
            + "".join(
                cell if cell.startswith("<td") else f"<td{_class(kind)}>{cell}</td>"
                for cell, (_, kind) in zip(row[1:], columns[1:], strict=True)
            )
            + "</tr>"
            for row in rows
        )

    foot = f'<tbody class="totals">{lines(totals)}</tbody>' if totals else ""
    table = f"<table><thead>{head}</thead><tbody>{lines(rows)}</tbody>{foot}</table>"
    return f'<div class="wide">{table}</div>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _text(value) -> str:
    return html.escape(str(value))


def _name(kind: str) -> str:
    """A question type, which may go on in the next line after each underscore."""
    return _text(kind).replace("_", "_<wbr>")


def _json(value) -> str:
    """JSON that may stand in a script element: nothing in it can end that element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _count(n: int | None) -> str:
    return "–" if n is None else f"{n:,}"


def _signed(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:+.1f}".replace("-", "−")


def _range(interval: list | None) -> str:
    return "" if interval is None else f"{_percent(interval[0])} – {_percent(interval[1])}"


def _signed_range(interval: list | None) -> str:
    return "" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"


def _list(lines: list[str], total: int = 0) -> str:
    """The lines, and how many there are beside them: in all `total`, where the list itself is already cut."""
    shown = [f"<li>{_text(line)}</li>" for line in lines[:MOST_LINES]]
    return f"<ul>{''.join(shown)}</ul>{_more(max(total, len(lines)) - len(shown), 'lines')}"


def _more(n: int, what: str) -> str:
    return f'<p class="quiet">… and {n:,} more {what}.</p>' if n > 0 else ""


STYLE = """
:root { --ink: #1d2125; --quiet: #646b73; --line: #dfe2e6; --paper: #fff; --card: #f7f8f9; --accent: #2b66a8;
  --good: #1d7044; --bad: #a8321f; --well: #eceef1; --right: 76 134 198; --wrong: 221 138 62; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6e9; --quiet: #989fa7; --line: #363b41; --paper: #16181b; --card: #1e2124; --accent: #86b4e6;
    --good: #74c69a; --bad: #f0937f; --well: #0f1113; }
}
* { box-sizing: border-box; }
html { scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, nav { max-width: 80rem; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; font-weight: 650; margin: 2rem 0 .75rem; }
h2 { font-size: 1.2rem; font-weight: 650; margin: 0 0 .75rem; }
h3, .run { font-size: 1rem; font-weight: 600; margin: 1.75rem 0 .25rem; }
p { max-width: 46rem; margin: .5rem 0; }
section { padding: 2rem 0 1.5rem; border-top: 1px solid var(--line); }
section:first-child { border-top: 0; padding-top: 1.25rem; }
a { color: var(--accent); }
code, pre { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; background: var(--card); padding: .75rem 1rem; border-radius: 4px; margin: .5rem 0; }
nav { position: sticky; top: 0; z-index: 2; display: flex; gap: 1.25rem; overflow-x: auto; white-space: nowrap;
  background: var(--paper); box-shadow: 0 1px 0 var(--line); scrollbar-width: none; }
nav a { padding: .6rem 0; color: var(--quiet); text-decoration: none; font-size: .9rem; }
nav a:hover, nav a:focus-visible { color: var(--ink); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
td.quiet { font-size: inherit; }
.lead { font-size: 1.05rem; max-width: none; }
.lead strong { font-size: 1.5rem; font-weight: 650; }

.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: baseline; white-space: nowrap; }
thead th { font-weight: 500; color: var(--quiet); border-bottom: 1px solid var(--line); vertical-align: bottom; }
thead .group { text-align: center; border-bottom: 0; padding-bottom: 0; }
tbody th, .text { text-align: left; }
tbody th { font-weight: 400; position: sticky; left: 0; background: var(--paper); }
tbody th, td.text { white-space: normal; min-width: 8rem; max-width: 36rem; overflow-wrap: break-word; }
tbody th { max-width: 16rem; }
thead th:first-child { text-align: left; padding-left: 0; }
tbody th { padding-left: 0; }
tbody tr + tr > * { border-top: 1px solid color-mix(in srgb, var(--line) 55%, transparent); }
.totals > tr:first-child > * { border-top: 1px solid var(--quiet); }
.range { text-align: left; color: var(--quiet); padding-left: 0; }
.first { padding-left: 1.25rem; }
.label { max-width: 9rem; white-space: normal; overflow-wrap: break-word; }
td b { font-weight: 650; }
td u { text-decoration-thickness: 1px; text-underline-offset: 3px; }
td.right { background: rgb(var(--right) / calc(.12 + .5 * var(--share))); }
td.wrong { background: rgb(var(--wrong) / calc(.12 + .5 * var(--share))); }
.beside { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.beside > div { min-width: 0; }

.badge { display: inline-block; font-size: .86em; line-height: 1.4; padding: 0 .45rem; border-radius: 3px;
  border: 1px solid currentColor; color: var(--quiet); white-space: nowrap; vertical-align: .08em; }
.badge.good { color: var(--good); }
.badge.bad { color: var(--bad); font-weight: 600; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; min-width: 34rem; max-width: 58rem; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { max-width: 46rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .2rem 0; }

.controls { display: flex; flex-wrap: wrap; gap: .6rem 1rem; margin: 1rem 0; }
.controls label { display: flex; flex-direction: column; font-size: .8rem; color: var(--quiet); min-width: 0; }
.controls label:last-child { flex: 1 1 14rem; }
select, input, button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; padding: .35rem .5rem; max-width: 100%; }
select { max-width: 17rem; }
button { cursor: pointer; }
button:disabled { color: var(--quiet); opacity: .55; cursor: default; }
.found { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: .5rem 1rem; }
.pager { display: flex; align-items: center; gap: .75rem; font-variant-numeric: tabular-nums; font-size: .9rem; }
#printed { display: none; }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 6px; overflow: hidden;
  display: flex; flex-direction: column; break-inside: avoid; }
.card > .media { background: var(--well); display: flex; flex-direction: column; }
.card img { display: block; width: 100%; height: 7.5rem; object-fit: contain; }
.card audio { display: block; width: 100%; height: 2.4rem; }
.card dl { display: grid; grid-template-columns: auto 1fr; gap: .15rem .75rem; margin: .75rem .9rem; flex: 1;
  align-content: start; }
.card dt { color: var(--quiet); font-size: .8rem; line-height: 1.75; }
.card dd { margin: 0; white-space: pre-wrap; }
.card footer { display: flex; flex-wrap: wrap; gap: .25rem .6rem; align-items: baseline; font-size: .8rem;
  color: var(--quiet); padding: 0 .9rem .7rem; }
.card .badge { font-weight: 600; }
.state0 { color: var(--good); }
.state2, .state3 { color: var(--bad); }

.tokens { white-space: pre-wrap;
  font: .85rem/2 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.token { border-radius: 3px; padding: .1rem .15rem; margin-right: 1px; border-bottom: 2px solid transparent; }
.token.masked { background: var(--well); color: var(--quiet); }
.token.media { background: rgb(var(--right) / .25); }
.token.learned { background: rgb(var(--wrong) / .28); border-bottom-color: rgb(var(--wrong)); font-weight: 600; }

@media (max-width: 40rem) {
  header, main, nav { padding: 0 .9rem; }
  tbody th { max-width: 9rem; }
  .controls label, select { flex: 1 1 100%; max-width: 100%; }
}
@media print {
  @page { margin: 14mm; size: A4 landscape; }
  body { font-size: 10pt; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .4rem; }
  #printed { display: inline; }
  nav, .controls, .pager, #count, audio { display: none !important; }
  .wide { overflow: visible; }
  tbody th { position: static; }
  section { padding: 1rem 0; }
  figure svg { width: auto; min-width: 0; max-width: 100%; max-height: 140mm; }
  figure, tr, details { break-inside: avoid; }
  h2, h3, p, summary { break-after: avoid; }
  td.right, td.wrong, .token { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = r"""
"use strict";
(() => {
  // What is folded is printed, too.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach(details => details.open = true);
  });
  addEventListener("afterprint", () => folded.forEach(details => details.open = false));

  const id = name => document.getElementById(name);
  if (!id("gallery-data")) return;
  const data = JSON.parse(id("gallery-data").textContent);
  const media = JSON.parse(id("gallery-media").textContent);
  const rows = data.rows.map(([run, id, type, question, answer, said, state, p, media, also = []]) => {
    const text = [id, question, answer, said ?? "", ...also].join("\n").toLowerCase();
    return {run, id, type, question, answer, said, state, p, media, also, text};
  });
  const number = n => n.toLocaleString("en");
  let found = rows, page = 0;

  // Texts become text nodes alone: whatever the data hold, they are shown, never run.
  function make(tag, name, ...children) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    element.append(...children);
    return element;
  }

  function medium([kind, src, name]) {
    const element = document.createElement(kind === "sound" ? "audio" : "img");
    element.title = name;
    if (kind === "sound") {
      element.controls = true;
      element.preload = "none";
      element.setAttribute("aria-label", name);
    } else {
      element.alt = name;
    }
    element.src = src;
    return element;
  }

  function card(row) {
    const list = make("dl");
    const add = (name, text, kind) => {
      const shown = make("dd", kind, text);
      shown.dir = "auto";
      list.append(make("dt", "", name), shown);
    };
    if (row.question) add("question", row.question);
    add("answer", row.answer);
    if (row.also.length) add("or", row.also.join("\n"), "quiet");
    add("prediction", row.said === null ? "nothing" : row.said.trim() ? row.said : "an empty text",
      row.said && row.said.trim() ? "" : "quiet");
    const marks = ["✓", "≈", "✗", "✗"];
    const result = `${marks[row.state]} ${data.states[row.state]}`;
    const foot = make("footer", "", make("span", `badge state${row.state}`, result));
    if (row.p !== null) foot.append(make("span", "", `p ${row.p.toFixed(3)}`));
    foot.append(make("span", "", data.types[row.type]), make("span", "", row.id));
    if (data.runs.length > 1) foot.append(make("span", "", data.runs[row.run]));
    const shown = row.media.length ? [make("div", "media", ...row.media.map(i => medium(media[i])))] : [];
    return make("article", "card", ...shown, list, foot);
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / data.size));
    page = Math.min(Math.max(page, 0), pages - 1);
    id("cards").replaceChildren(...found.slice(page * data.size, (page + 1) * data.size).map(card));
    id("count").textContent = `${number(found.length)} of ${number(rows.length)}`;
    const told = `page ${number(page + 1)} of ${number(pages)}`, shown = id("cards").childElementCount;
    id("printed").textContent = `${told}: ${number(shown)} of ${number(found.length)} predictions`;
    for (const pager of document.querySelectorAll(".pager")) {
      const [previous, place, next] = pager.children;
      place.textContent = told;
      previous.disabled = page === 0;
      next.disabled = page === pages - 1;
    }
  }

  function choose() {
    const value = name => id(name) ? id(name).value : "";
    const run = value("run"), type = value("type"), states = value("result").split(" ");
    const text = id("search").value.trim().toLowerCase(), order = Number(value("order"));
    found = rows.filter(row => (run === "" || row.run === Number(run)) && (type === "" || row.type === Number(type))
      && (states[0] === "" || states.includes(String(row.state))) && row.text.includes(text));
    if (order) found.sort((a, b) => (a.p === null) - (b.p === null) || order * (a.p - b.p));  // without p: last
    page = 0;
    show();
  }

  document.querySelector(".controls").addEventListener("input", choose);
  document.querySelector(".controls").addEventListener("submit", event => event.preventDefault());
  for (const button of document.querySelectorAll(".pager button")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.turn);
      show();
      // A disabled button loses the focus: the other one takes it.
      if (button.disabled) button.parentElement.querySelector("button:enabled").focus();
      if (id("cards").getBoundingClientRect().top < 0) id("gallery").scrollIntoView();
    });
  }
  choose();
  // Back may fill in the form once more, after this has run; a page that was kept is as it was left.
  addEventListener("pageshow", event => event.persisted || choose());
})();
"""

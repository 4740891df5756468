"""The page's first section: what share each run answers rightly, in all and by question type, beside the baselines."""

from report.markup import (
    TEXT,
    count,
    escape,
    figure,
    number,
    percent,
    percent_range,
    signed,
    signed_range,
    table,
    type_name,
)

BASELINES = (
    "A baseline is what a model that never sees an image gets: always the most frequent training answer of the "
    "question type, that of the very same question, or the answer of the nearest, most similar training question. A "
    "run without a clear gain over the best of the three has not shown that it sees."
)
HOW_TO_READ = {  # what it is about -> what a reader should know
    "exact match": "the answer, or another form of it that the data allow, apart from case and punctuation.",
    "relaxed match": "also a size that is close enough, and a count that stands alone in a sentence.",
    "baselines": "type, question and nearest are three ways to answer without seeing; the <u>best</u> one is "
    "underlined, and is chosen on these same questions. The gain is over that one, in percentage points.",
    "95 %": "the interval of a bootstrap over complete groups (patients, videos or images), to which one group all "
    "right and one all wrong are added, each worth one question, so that it is not too short near 100 % or with few "
    "groups.",
    "micro, macro": "the mean over all questions; the mean over the question types, each counting the same.",
    "balanced, precision, recall, F1": "means over the labels, each counting the same.",
    "ranked": "the share where the most probable of the candidates is right.",
    "AUROC, mAP": "how well probabilities set right candidates before wrong ones: 1 is perfect; AUROC 0.5 is chance.",
    "ECE": "how far probabilities are, on average, from the share that is right: 0 is perfect.",
}
# field -> heading of the columns that only some runs have; the first are means over a type's labels
OF_LABELS = {"balanced": "balanced", "precision": "precision", "recall": "recall", "f1": "F1"}
OF_LABELS |= {"auroc": "AUROC", "map": "mAP"}
EXTRA = {**OF_LABELS, "ranked": "ranked", "ece": "ECE"}
PLAIN = {"auroc", "map", "ece"}  # numbers, not shares in %


def section(runs: list[dict]) -> str:
    """The runs side by side where there are several; then of each its sentence, its notes and its question types."""
    baselines = any(run["micro"]["baselines"] for run in runs)
    parts = [side_by_side(runs, baselines)] if len(runs) > 1 else []
    parts.append(f"<p>All shares in %. {BASELINES if baselines else ''}</p>{how_to_read(baselines)}")
    for run in runs:
        heading = f"<h3>{escape(run['name'])}</h3>" if len(runs) > 1 else f'<p class="run">{escape(run["name"])}</p>'
        groups = run["micro"]["groups"]
        how = [f"{run['n']:,} questions", f"{groups:,} {'group' if groups == 1 else 'groups'}"]
        how += [f"{what} {escape(run[what])}" for what in ("split", "decode") if run.get(what)]
        how += [f"{escape(name)} {value:.4g}" for name, value in run["own"].items()]
        parts += [heading, lead(run["micro"]), *(f"<p>{escape(note)}</p>" for note in run["notes"])]
        parts += [f'<p class="quiet">{", ".join(how)}</p>', types_table(run)]
    return "".join(parts)


def side_by_side(runs: list[dict], baselines: bool) -> str:
    """A line a run, over all its questions; with `baselines` also the best of these and the gain over it."""
    columns = [("run", TEXT), ("n", ""), ("exact", ""), ("95 %", "range"), ("relaxed", ""), ("macro", "")]
    columns += [("best baseline", ""), ("gain", ""), ("95 %", "range")] if baselines else []
    rows = []
    for run in runs:
        cells = [escape(run["name"]), f"{run['n']:,}", *exact(run["micro"]), percent(run["macro"]["exact"])]
        best = percent(max(run["micro"]["baselines"].values(), default=None))
        rows.append([*cells, *([best, *gain(run["micro"])] if baselines else [])])
    return table(columns, rows)


def how_to_read(baselines: bool) -> str:
    """What the columns mean, folded."""
    shown = {name: text for name, text in HOW_TO_READ.items() if baselines or name != "baselines"}
    lines = "".join(f"<li><b>{name}</b>: {text}</li>" for name, text in shown.items())
    return f"<details><summary>How to read this</summary><ul>{lines}</ul></details>"


def lead(entry: dict) -> str:
    """The one sentence of a run: what share is right, and whether that is more than a blind guess."""
    share = f"<strong>{percent(entry['exact'])} %</strong> exact match"
    if entry["interval"]:
        share += f" ({percent_range(entry['interval'])})"
    if entry["gain"] is None:
        return f'<p class="lead">{share}</p>'  # without baselines; the notes say how to have them
    side = "above" if entry["gain"] >= 0 else "below"
    text = f"{percent(abs(entry['gain']))} points {side} the best baseline"
    if entry["gain_interval"]:
        text += f" ({signed_range(entry['gain_interval'])})"
    return f'<p class="lead">{share}, {text} {mark(entry)}</p>'


def types_table(run: dict) -> str:
    """A line a question type, then all questions and the mean of the types."""
    entries = {kind: with_ece(entry) for kind, entry in run["types"].items()}
    everything, macro = with_ece(run["micro"]), run["macro"]
    extra = [f for f in EXTRA if any(entry.get(f) is not None for entry in (*entries.values(), everything))]
    columns = [("question type", TEXT), ("n", ""), ("exact", ""), ("95 %", "range"), ("relaxed", "")]
    baselines = bool(run["micro"]["baselines"])
    if baselines:
        columns += [("type", "first"), ("question", ""), ("nearest", ""), ("points", "first"), ("95 %", "range")]
    columns += [(EXTRA[field], "first" if field == extra[0] else "") for field in extra]
    of_labels = sum(field in OF_LABELS for field in extra)
    groups = [("", 5), ("baselines", 3 * baselines), ("gain over the best", 2 * baselines)]
    groups += [("mean over the labels", of_labels), ("", len(extra) - of_labels)]

    def row(name: str, entry: dict) -> list[str]:
        cells = [name, count(entry["n"]), *exact(entry)]
        cells += [*blind(entry), *gain(entry)] if baselines else []
        return cells + [(number if field in PLAIN else percent)(entry.get(field)) for field in extra]

    rows = []
    for kind, entry in entries.items():
        alone = ' <span class="badge">one answer only</span>' if entry.get("single_class") else ""
        rows.append(row(type_name(kind) + alone, entry))
    mean = ["mean of types (macro)", "", percent(macro["exact"]), "", percent(macro["relaxed"])]
    if macro["baselines"]:
        mean += [*blind(macro), signed(macro["exact"] - max(macro["baselines"].values()))]
    totals = [row("all questions (micro)", everything), mean + [""] * (len(columns) - len(mean))]
    return table(columns, rows, totals, groups)


def with_ece(entry: dict) -> dict:
    """The entry with its calibration error as a field of its own, as the columns want it."""
    return entry | {"ece": entry["calibration"]["ece"]} if "calibration" in entry else entry


def exact(entry: dict) -> list[str]:
    """Exact match, its interval, relaxed match."""
    return [f"<b>{percent(entry['exact'])}</b>", percent_range(entry["interval"]), percent(entry["relaxed"])]


def blind(entry: dict) -> list[str]:
    """The three baselines; the best one, which counts, is set off."""
    shown = {name: percent(entry["baselines"].get(name)) for name in ("type", "question", "nearest")}
    return [f"<u>{share}</u>" if name == entry.get("best_baseline") else share for name, share in shown.items()]


def gain(entry: dict) -> list[str]:
    """The gain over the best baseline, in points, and its interval with a badge."""
    return [signed(entry["gain"]), f"{signed_range(entry['gain_interval'])} {mark(entry)}"]


def mark(entry: dict) -> str:
    """A badge where a run shows no gain over its best baseline; a single group has no interval and shows nothing."""
    if entry["gain"] is None:
        return ""
    interval = entry["gain_interval"]
    if entry["gain"] <= 0 or (interval and interval[0] <= 0):
        return '<span class="badge bad">no gain shown</span>'
    return "" if interval else '<span class="badge">one group: not shown</span>'


def bars(drawn: dict) -> str:
    """The figure of accuracy, or how to have figures."""
    if not drawn:
        return '<p class="quiet">Figures need matplotlib: <code>pip install matplotlib</code></p>'
    return figure(drawn.get("accuracy"), "Share of exact matches.")

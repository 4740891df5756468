"""The report's page, one HTML file that needs no other: the plain values that page.html, its markup, shows.

page.css beside it is its style, page.js filters the predictions.
"""

import base64
import hashlib
import json
import math
import shlex
from pathlib import Path

import jinja2

from report import drawing
from report.scoring import true_candidate
from report.summary import number_line
from report.thumbnails import thumbnails

FOLDER = Path(__file__).parent
MOST_SHOWN = 20_000  # answers in the gallery
MEDIA_BYTES = 8_000_000  # of thumbnails and sounds in a page
ON_A_PAGE = 24
LONGEST_TEXT = 600  # characters of a question or answer
STATES = ("exact match", "relaxed match", "wrong", "no answer")  # page.js knows these by their number


def entries(runs: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
    """The records of all runs with their run's number, type, media (indices) and p; these media; what is not shown."""
    shown, media, faults = [], [], []
    for number, run in enumerate(runs):
        records = run["records"][: MOST_SHOWN // len(runs)]
        left = len(run["records"]) - len(records)
        faults += [f"{left:,} answers of {run['name']}: the page would be too large"] if left else []
        thumbs, of, missing = thumbnails(run.get("data"), records, MEDIA_BYTES // len(runs))
        for record, indices in zip(records, of, strict=True):
            entry = {"run": number, "type": record["question_type"], "media": [len(media) + i for i in indices]}
            shown.append(record | entry | {"p": probability(record)})
        media += thumbs
        faults += missing
    return shown, media, faults


def probability(record: dict) -> float | None:
    """Of what is answered, where it is a candidate in its own words, or the right one in others."""
    chances, answered = record.get("probabilities") or {}, record["prediction"]
    if answered not in chances and record["correct"] and record.get("candidates"):
        answered = true_candidate(record)
    return chances.get(answered)


def page(result: dict, records: list, media: list, examples: list, figures: dict, faults: list = ()) -> str:
    """The page as text, from `result`, what write.write puts into results.json.

    records and media are those of entries, with the faults that it found; examples are the first example of
    each run, token by token; figures are those of drawing.draw_figures. Whatever comes from the data is escaped by
    Jinja2, and in the browser set as text, never as HTML.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # figures that a run does not have are shown as a dash
        extensions=["jinja2.ext.do"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    runs = result["runs"]
    script = "\n" + (FOLDER / "page.js").read_text("utf-8")  # all between the tags counts for its digest
    text = environment.get_template("page.html").render(
        result=result,
        runs=runs,
        baselines=any(run["micro"]["baselines"] for run in runs),
        figures={name: drawing.figure_svg(figure) for name, figure in figures.items()},
        most_panels=drawing.MOST_PANELS,
        shown=predictions(runs, records, media) if records else None,
        faults=faults,
        examples=examples,
        number_line=number_line,
        started=started(runs),
        style=(FOLDER / "page.css").read_text("utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script runs
    )
    return text.encode("utf-8", "replace").decode()  # half a character, which JSON may hold, is none that UTF-8 has


def started(runs: list[dict]) -> dict:
    """How the runs were started: {tables: {title: {setting: [its value in each run]}}, commands}."""
    versions = [run["versions"] | ({"git commit": run["git_commit"]} if run["git_commit"] else {}) for run in runs]
    tables = {}
    for title, of in {"Settings": [run["settings"] for run in runs], "Versions": versions}.items():
        names = dict.fromkeys(name for values in of for name in values)
        tables[title] = {name: [as_text(v[name]) if name in v else "–" for v in of] for name in names}
    commands = [[*(["python", run["script"]] if run.get("script") else []), *run["argv"]] for run in runs]
    return {"tables": tables, "commands": [shlex.join(map(str, words)) for words in commands if words]}


def as_text(value) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def predictions(runs: list[dict], records: list[dict], media: list[dict]) -> dict:
    """What page.js reads, data and media; how many records each choice leaves; and of how many media there are."""
    types = {kind: i for i, kind in enumerate(dict.fromkeys(record["type"] for record in records))}
    rows = [row(record, types[record["type"]]) for record in records]
    names = [run["name"] for run in runs]
    choices = {"run": (0, names), "type": (2, types), "state": (6, STATES)}  # their column, and what it can be
    volumes = [entry["name"].lower() for entry in media if entry["kind"] == "slices"]
    nifti = sum(name.endswith((".nii", ".nii.gz")) for name in volumes)
    return {
        "data": {"states": STATES, "types": list(types), "runs": names, "rows": rows, "size": ON_A_PAGE},
        "media": [[entry["kind"], entry["src"], entry["name"]] for entry in media],
        "left": {k: [sum(row[c] == i for row in rows) for i in range(len(of))] for k, (c, of) in choices.items()},
        "probable": any(row[7] is not None for row in rows),
        "nifti": nifti,
        "arrays": len(volumes) - nifti,
    }


def row(record: dict, kind: int) -> list:
    """A record as a list, which in ten thousand of them takes half the room of one with field names."""
    answered, p = record["prediction"], record.get("p")
    state = 3 if answered is None else 0 if record["correct"] else 1 if record["relaxed"] else 2
    p = round(p, 4) if p is not None and math.isfinite(p) else None
    texts = [short(record["question"]), short(record["answer"]), None if answered is None else short(answered)]
    also = [short(form) for form in record.get("also_right") or []]
    return [record["run"], str(record["id"]), kind, *texts, state, p, record["media"], also]


def short(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"

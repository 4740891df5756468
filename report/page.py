"""The report's page, one HTML file that needs no other: the plain values that page.html, its markup, shows.

page.css beside it is its style, page.js filters the predictions.
"""

import base64
import hashlib
import json
import math
import shlex
from itertools import product
from pathlib import Path

import jinja2

from inputs import sound
from report import drawing
from report.scoring import true_candidate
from report.summary import MOST_CONFUSED, OTHER, labelled, number_line
from report.thumbnails import thumbnails

FOLDER = Path(__file__).parent
MOST_SHOWN = 20_000  # answers in the gallery
MEDIA_BYTES = 8_000_000  # of thumbnails and sounds in a page
ON_A_PAGE = 12  # cards
LONGEST_TEXT = 600  # characters of a question or answer
STATES = ("exact match", "relaxed match", "wrong", "no answer")  # page.js knows these by their number


def entries(runs: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
    """The records of all runs with their run's number, type, media (indices), p, `seen` (the number of what is shown,
    such as a clip) and `cell` (of the confusion table); these media; what is not shown."""
    shown, media, faults, scans = [], [], [], {}
    for number, run in enumerate(runs):
        records = run["records"][: MOST_SHOWN // len(runs)]
        left = len(run["records"]) - len(records)
        faults += [f"{left:,} answers of {run['name']}: the page would be too large"] if left else []
        thumbs, of, missing = thumbnails(run.get("media_root"), records, MEDIA_BYTES // len(runs))
        for record, cell, indices in zip(records, table_cells(run["records"]), of, strict=False):
            looked_at = [name for name in record["media"] if not name.lower().endswith(sound.FILES)] or [record["id"]]
            seen = scans.setdefault((number, *looked_at), len(scans))
            entry = {"run": number, "type": record["question_type"], "media": [len(media) + i for i in indices]}
            shown.append(record | entry | {"p": probability(record), "seen": seen, "cell": cell})
        media += thumbs
        faults += missing
    return shown, media, faults


def table_cells(records: list[dict]) -> list[int | None]:
    """Of each record its cell in its type's confusion table, counted row by row; None where there is no table."""
    cells = {}
    for kind in {record["question_type"] for record in records}:
        at = [i for i, record in enumerate(records) if record["question_type"] == kind]
        labels, found = labelled([records[i] for i in at])
        if len(labels) <= MOST_CONFUSED:
            table = list(product(labels, [*labels, OTHER]))
            cells |= {i: table.index(pair) for i, pair in zip(at, found, strict=True)}
    return [cells.get(i) for i in range(len(records))]


def probability(record: dict) -> float | None:
    """Of what is answered, where it is a candidate in its own words, or the right one in others."""
    chances, answered = record.get("probabilities") or {}, record["prediction"]
    if answered not in chances and record["correct"] and record.get("candidates"):
        answered = true_candidate(record)
    return chances.get(answered)


def page(result: dict, records: list, media: list, examples: list, figures: dict, faults: list = ()) -> str:
    """The page as text, from `result`, what write.write puts into results.json, and what entries found.

    examples are the first example of each run, token by token; figures are those of drawing.draw_figures. Whatever
    comes from the data is escaped by Jinja2, and in the browser set as text, never as HTML.
    """
    settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.do"]}
    settings |= {"undefined": jinja2.ChainableUndefined}  # figures that a run does not have are shown as a dash
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, **settings)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    runs, types = result["runs"], list(dict.fromkeys(record["type"] for record in records))
    rows = [row(record, types.index(record["type"])) for record in records]
    data = {"states": STATES, "types": types, "runs": [run["name"] for run in runs], "rows": rows, "size": ON_A_PAGE}
    shown = {"data": data, "media": [[entry["kind"], entry["src"], entry["name"]] for entry in media]}
    commands = [[*(["python", run["script"]] if run.get("script") else []), *run["argv"]] for run in runs]
    script = "\n" + (FOLDER / "page.js").read_text("utf-8")  # all between the tags counts for its digest
    text = environment.get_template("page.html").render(
        result=result,
        runs=runs,
        baselines=any(run["micro"]["baselines"] for run in runs),
        figures={name: drawing.figure_svg(figure) for name, figure in figures.items()},
        most_panels=drawing.MOST_PANELS,
        shown=shown if rows else None,
        faults=faults,
        examples=examples,
        number_line=number_line,
        json=json,  # the filter tojson writes < as \u003c
        commands=[shlex.join(map(str, words)) for words in commands if words],
        style=(FOLDER / "page.css").read_text("utf-8"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # no other script runs
    )
    return text.encode("utf-8", "replace").decode()  # half a character, which JSON may hold, is none that UTF-8 has


def row(record: dict, kind: int) -> list:
    """A record as a list, which in ten thousand of them takes half the room of one with field names."""
    answered, p = record["prediction"], record.get("p")
    state = 3 if answered is None else 0 if record["correct"] else 1 if record["relaxed"] else 2
    p = round(p, 4) if p is not None and math.isfinite(p) else None
    texts = [short(record["question"]), short(record["answer"]), None if answered is None else short(answered)]
    more = [record["media"], [short(form) for form in record.get("also_right") or []], record["seen"], record["cell"]]
    return [record["run"], str(record["id"]), kind, *texts, state, p, *more]


def short(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"

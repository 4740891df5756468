"""The report's page: one HTML file that needs no other and reaches for nothing.

page.html, page.css and page.js beside this module are its markup, its style, and what filters the predictions. Here
are the plain values that the markup shows.
"""

import base64
import hashlib
import json
import shlex
from pathlib import Path

import jinja2

from report import drawing, gallery

FOLDER = Path(__file__).parent
MOST_LINES = 200  # of a list of findings


def page(result: dict, records: list, media: list, examples: list, figures: dict, faults: list = ()) -> str:
    """The page as text, from `result`, what write.write puts into results.json.

    records and media are those of gallery.entries, with the faults that it found; examples are the first example of
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
        most_lines=MOST_LINES,
        shown=gallery.prepare(runs, records, media) if records else None,
        faults=faults,
        examples=examples,
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

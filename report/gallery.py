"""The page's predictions: which records are shown with which media, embedded as JSON that page.js filters and pages."""

import math

from report.markup import bullets, embedded_json, escape
from report.scoring import true_candidate
from report.thumbnails import thumbnails

MOST_SHOWN = 20_000  # answers in the gallery
MEDIA_BYTES = 8_000_000  # of thumbnails and sounds in a page
ON_A_PAGE = 24
LONGEST_TEXT = 600  # characters of a question or answer
STATES = ("exact match", "relaxed match", "wrong", "no answer")  # the gallery knows these by their number
KEPT = ("id", "question", "answer", "also_right", "prediction", "correct", "relaxed")  # of a record
PAGER = (
    '<div class="pager"><button type="button" data-turn="-1">Previous</button><span></span>'
    '<button type="button" data-turn="1">Next</button></div>'
)


def entries(runs: list[dict]) -> tuple[list[dict], list[dict], list[str]]:
    """The records of all runs as the page shows them, their media, and what cannot be shown.

    Each has run (its number), type, media (indices) and p, the probability of what was answered, beside KEPT.
    """
    shown, media, faults = [], [], []
    for number, run in enumerate(runs):
        records = run["records"][: MOST_SHOWN // len(runs)]
        left = len(run["records"]) - len(records)
        faults += [f"{left:,} answers of {run['name']}: the page would be too large"] if left else []
        thumbs, of, missing = thumbnails(run.get("data"), records, MEDIA_BYTES // len(runs))
        for record, indices in zip(records, of, strict=True):
            entry = {name: record[name] for name in KEPT if name in record}
            entry |= {"run": number, "type": record["question_type"], "media": [len(media) + i for i in indices]}
            shown.append(entry | {"p": probability(record)})
        media += thumbs
        faults += missing
    return shown, media, faults


def probability(record: dict) -> float | None:
    """Of what is answered, where it is a candidate in its own words, or the right one in others."""
    chances, answered = record.get("probabilities") or {}, record["prediction"]
    if answered not in chances and record["correct"] and record.get("candidates"):
        answered = true_candidate(record)
    return chances.get(answered)


def section(runs: list[dict], records: list[dict], media: list[dict], faults: list[str]) -> str:
    """The controls, and the predictions as JSON, which page.js shows a page at a time."""
    if not records:
        return ""
    number = {kind: i for i, kind in enumerate(dict.fromkeys(record["type"] for record in records))}
    rows = [row(record, number[record["type"]]) for record in records]
    data = {"states": STATES, "types": list(number), "runs": [run["name"] for run in runs], "rows": rows}
    data["size"] = ON_A_PAGE
    embedded = [[entry["kind"], entry["src"], entry["name"]] for entry in media]
    return f"""{about_media(records, media, faults)}
<form class="controls" role="search" aria-label="Predictions">{controls(runs, rows, number)}</form>
<div class="found"><output id="count" aria-live="polite"></output><span id="printed"></span>{PAGER}</div>
<noscript><p>The predictions need JavaScript.</p></noscript>
<div id="cards"></div>
{PAGER}
<script type="application/json" id="gallery-data">{embedded_json(data)}</script>
<script type="application/json" id="gallery-media">{embedded_json(embedded)}</script>"""


def row(record: dict, kind: int) -> list:
    """A record as a list, which in ten thousand of them takes half the room of one with field names."""
    answered = record["prediction"]
    state = 3 if answered is None else 0 if record["correct"] else 1 if record["relaxed"] else 2
    p = record.get("p")
    p = round(p, 4) if p is not None and math.isfinite(p) else None
    texts = [short(record["question"]), short(record["answer"]), None if answered is None else short(answered)]
    found = [record["run"], str(record["id"]), kind, *texts, state, p, list(record["media"])]
    return [*found, [short(form) for form in record["also_right"]]] if record.get("also_right") else found


def short(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"


def controls(runs: list[dict], rows: list[list], number: dict[str, int]) -> str:
    """Selects of run, type, result and order, each option with how many records it leaves, and the search field."""
    ended = [sum(row[6] == state for row in rows) for state in range(len(STATES))]
    everything = ("all", "", len(rows))
    asked = [(run["name"], i, sum(row[0] == i for row in rows)) for i, run in enumerate(runs)]
    typed = [(kind, i, sum(row[2] == i for row in rows)) for kind, i in number.items()]
    results = [("exact match", "0", ended[0]), ("wrong or unanswered", "2 3", ended[2] + ended[3])]
    results += [("relaxed match alone", "1", ended[1]), ("unanswered", "3", ended[3])]
    orders = [("as in the data", "", None), ("most probable first", "-1", None), ("least probable first", "1", None)]
    parts = [choice("run", [everything, *asked])] if len(runs) > 1 else []
    parts += [choice("type", [everything, *typed]), choice("result", [everything, *results])]
    parts += [choice("order", orders)] if any(row[7] is not None for row in rows) else []
    search = '<label>search <input id="search" type="search" placeholder="question, answer, prediction, id"></label>'
    return "".join(parts) + search


def choice(name: str, options: list[tuple]) -> str:
    """A labelled select of (text, value, how many records it leaves)."""
    shown = [(escape(text), value, "" if n is None else f" ({n:,})") for text, value, n in options]
    inner = "".join(f'<option value="{value}">{text}{n}</option>' for text, value, n in shown)
    return f'<label>{name} <select id="{name}">{inner}</select></label>'


def about_media(records: list[dict], media: list[dict], faults: list[str]) -> str:
    """What the reader should know of the pictures: how many there are, how they lie, and which are missing."""
    if faults and not media:
        return f"<p>No pictures: {escape(faults[0])}</p>{not_shown(faults[1:])}"
    notes = []
    seen = sum(bool(record["media"]) for record in records)
    if media and seen < len(records):
        notes.append(f"{seen:,} of {len(records):,} are shown with their pictures or sound, wrong ones first.")
    volumes = [entry["name"].lower() for entry in media if entry["kind"] == "slices"]
    nifti = [name for name in volumes if name.endswith((".nii", ".nii.gz"))]
    if volumes:
        notes.append("Of volumes only the middle slices are shown.")
    if nifti:
        notes.append("NIfTI files are seen as by radiologists, from feet, front and side: the patient’s right is left.")
    if len(nifti) < len(volumes):
        notes.append(".npy and .npz files do not say how they lie: they are taken as x to the right (RAS).")
    if media:
        notes.append("The page contains pictures of the data: share it only as you may share these.")
    return (f'<p class="quiet">{" ".join(notes)}</p>' if notes else "") + not_shown(faults)


def not_shown(faults: list[str]) -> str:
    return f"<details><summary>What is not shown</summary>{bullets(faults)}</details>" if faults else ""

"""The page's predictions: which records are shown with which media, and what page.js needs to filter and page them."""

import math

from report.scoring import true_candidate
from report.thumbnails import thumbnails

MOST_SHOWN = 20_000  # answers in the gallery
MEDIA_BYTES = 8_000_000  # of thumbnails and sounds in a page
ON_A_PAGE = 24
LONGEST_TEXT = 600  # characters of a question or answer
STATES = ("exact match", "relaxed match", "wrong", "no answer")  # page.js knows these by their number
KEPT = ("id", "question", "answer", "also_right", "prediction", "correct", "relaxed")  # of a record


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


def prepare(runs: list[dict], records: list[dict], media: list[dict]) -> dict:
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
        "seen": sum(bool(record["media"]) for record in records),
        "nifti": nifti,
        "arrays": len(volumes) - nifti,
    }


def row(record: dict, kind: int) -> list:
    """A record as a list, which in ten thousand of them takes half the room of one with field names."""
    answered, p = record["prediction"], record.get("p")
    state = 3 if answered is None else 0 if record["correct"] else 1 if record["relaxed"] else 2
    p = round(p, 4) if p is not None and math.isfinite(p) else None
    texts = [short(record["question"]), short(record["answer"]), None if answered is None else short(answered)]
    found = [record["run"], str(record["id"]), kind, *texts, state, p, list(record["media"])]
    return [*found, [short(form) for form in record["also_right"]]] if record.get("also_right") else found


def short(text: str) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters)"

"""The figures of one run: accuracy beside the baselines, by label, by how sure the model was."""

from collections import Counter

import numpy as np

from report.intervals import united
from report.read import OF_WHAT
from report.scoring import answer_label, true_candidate
from report.summary import summarise

MOST_LABELS, MOST_CONFUSED = 200, 12  # listed in results.json; shown as a table of who is taken for whom
OTHER = None  # what is none of the labels: no text, or an answer "other" would be taken for it
ABOUT = dict.fromkeys((*OF_WHAT, "split", "decode", "git_differs"))
ABOUT |= {"argv": [], "versions": {}, "settings": {}, "own": {}}  # what is unknown of others' answers


def summarise_run(run: dict) -> dict:
    """What results.json and the page say of a run of read.read_run or predictions.read_predictions.

    That is summary.summarise with label figures and calibration beside, where the run comes from, and notes on what
    a reader should know. Where all examples are of one group, intervals are over its parts that share no media.
    """
    records, notes = resampled(run["records"]), list(run.get("notes", []))
    if len(records) > 1 and len({r["group"] for r in run["records"]}) == 1:
        parts = len({r["group"] for r in records})
        text = f"all examples are of one group, {run['records'][0]['group']}"
        several = f": intervals are of its {parts} parts that share no media, and say nothing about another group"
        notes.append(text + (several if parts > 1 else ", and share their media: there are no intervals"))
    if not records[0]["baselines"]:
        notes.append("what can be answered blindly is not known: give --train, or answer again with --eval-only")
    if run.get("cut_off"):
        notes.append(f"{run['cut_off']} answers were cut off before they ended: raise --max-answer-tokens")
    found = summarise(records)
    for kind, entry in found["types"].items():
        part = [record for record in records if record["question_type"] == kind]
        entry |= label_figures(part) | ranked_figures(part)
    found["micro"] |= ranked_figures(records)
    about = {"name": run["name"]} | {name: run.get(name, unknown) for name, unknown in ABOUT.items()}
    return {**about, **found, "n": len(records), "blind": {}, "notes": notes}


def resampled(records: list[dict]) -> list[dict]:
    """The records with the groups that intervals are over: their own, of a single group the numbers of its parts.

    Records that share a file, directly or through others, are of one part.
    """
    if len({record["group"] for record in records}) > 1:
        return records
    part = united([[("record", i), *record.get("media", [])] for i, record in enumerate(records)])
    return [{**record, "group": part["record", i]} for i, record in enumerate(records)]


def label_figures(records: list[dict]) -> dict:
    """Precision, recall and F1 of each label and their means over the labels (macro), and who is taken for whom.

    Labels are the true answers, each under its shortest form, and where all records allow the same candidates also
    those that never are the answer: such an empty class counts as zero, as does a label that is never predicted. A
    prediction that is no label takes nobody's precision and misses its own label's recall.
    """
    named, true = {}, []  # form -> label; the label of each record
    for record in records:
        own = [answer_label(form) for form in [record["answer"], *record.get("also_right", [])]]
        true.append(min(own, key=len))
        for form in own:
            named.setdefault(form, true[-1])
    candidates = records[0].get("candidates") or []
    shared = all(record.get("candidates") == records[0].get("candidates") for record in records)
    candidates = [answer_label(candidate) for candidate in candidates if shared]
    labels = sorted({*true, *(named.setdefault(candidate, candidate) for candidate in candidates)})
    predicted = []
    for record, own in zip(records, true, strict=True):
        other = named.get(answer_label(record["prediction"]), OTHER)
        predicted.append(own if record["correct"] else OTHER if other == own else other)
    pairs, n_true, n_predicted = Counter(zip(true, predicted, strict=True)), Counter(true), Counter(predicted)
    by_label = {}
    for name in labels:
        right = pairs[name, name]
        precision, recall = right / max(1, n_predicted[name]), right / max(1, n_true[name])
        f1 = 2 * right / max(1, n_predicted[name] + n_true[name])  # 2 P R / (P + R)
        by_label[name] = {"n": n_true[name], "precision": precision, "recall": recall, "f1": f1}
    figures = {c: float(np.mean([entry[c] for entry in by_label.values()])) for c in ("precision", "recall", "f1")}
    figures |= {"labels": labels[:MOST_LABELS], "single_class": len(set(true)) == 1}
    figures |= {"per_label": {name: by_label[name] for name in labels[:MOST_LABELS]}}
    if len(labels) <= MOST_CONFUSED:
        figures["confusion"] = [[pairs[name, other] for other in [*labels, OTHER]] for name in labels]
    return figures


def ranked_figures(records: list[dict]) -> dict:
    """The calibration of the records whose candidates were ranked; {} where none were."""
    ranked = [r for r in records if r.get("probabilities") and r.get("candidates")]
    if not ranked:
        return {}
    likeliest = [max(r["probabilities"], key=r["probabilities"].get) for r in ranked]
    true = [true_candidate(r) for r in ranked]
    sure = [r["probabilities"][name] for r, name in zip(ranked, likeliest, strict=True)]
    return {"calibration": calibration(sure, [s == t for s, t in zip(likeliest, true, strict=True)])}


def calibration(confidence: list[float], right: list[bool], bins: int = 10) -> dict:
    """The expected calibration error, and for each of equally wide bins how sure and how often right.

    ece is the mean over the answers of |share that is right - mean probability| in their bin (Guo et al. 2017). A bin
    holds its upper end.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    edges = np.linspace(0, 1, bins + 1)
    of = np.searchsorted(edges[1:-1], confidence)  # (n,): the bin of each
    found = []
    for i in range(bins):
        inside = of == i
        n = int(inside.sum())
        sure, share = (float(x[inside].mean()) if n else None for x in (confidence, right))
        ends = {"low": float(edges[i]), "high": float(edges[i + 1])}
        found.append({**ends, "n": n, "confidence": sure, "accuracy": share})
    ece = sum(b["n"] / len(right) * abs(b["accuracy"] - b["confidence"]) for b in found if b["n"])
    return {"ece": ece, "n": len(right), "bins": found}

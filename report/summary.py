"""The figures of a run, by type, by label, beside blind baselines, by how sure the model was; and their table."""

import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np

from report.intervals import clustered_interval, resampled_intervals, united
from report.read import OF_WHAT
from report.scoring import answer_label, is_number, number_pair, true_candidate

NUMBER_FIGURES = {"mae": "mean absolute error", "median_error": "median", "correlation": "correlation"}
NUMBER_FIGURES |= {"number_baseline": "error of always the training median", "mae_gain": "gain over it"}
MOST_LABELS, MOST_CONFUSED = 200, 12  # listed in results.json; shown as a table of who is taken for whom
OTHER = None  # what is none of the labels: no text, or an answer "other" would be taken for it
ABOUT = dict.fromkeys((*OF_WHAT, "split", "decode", "git_differs"))
ABOUT |= {"argv": [], "versions": {}, "settings": {}, "own": {}}  # what is unknown of others' answers


def summarise_run(run: dict) -> dict:
    """What results.json and the page say of a run of read.read_run or examples.read_predictions.

    That is `summarise` with label figures and calibration beside, where the run comes from, and notes on what
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
        entry |= ({} if "numbers" in entry else label_figures(part)) | ranked_figures(part)
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


def summarise(records: list[dict]) -> dict:
    """Accuracy of all records (micro), of each question type, and the types' mean (macro).

    Every record counts, answered or not. A record has question_type, answer, group, correct, relaxed, where the
    answer has other forms also_right, and baselines: whether each of `blind_answers` is right. Each entry has n,
    groups, exact, interval (see `clustered_interval`), relaxed, baselines, and the gain: how far exact is above the
    best of these, with the interval of that difference (of each record, right or not less baseline right or not).
    Which baseline is the best is found on these same records, to the baseline's advantage.

    A type whose questions all have the same `candidates` also has `choice_figures`; one of numbers `number_figures`.
    """
    if not records:
        raise ValueError("no examples to summarise")
    kinds = defaultdict(list)
    for record in records:
        kinds[record["question_type"]].append(record)
    types = {kind: accuracy(part) | choice_figures(part) | number_figures(part) for kind, part in sorted(kinds.items())}

    macro = {name: float(np.mean([entry[name] for entry in types.values()])) for name in ("exact", "relaxed")}
    names = records[0]["baselines"]
    macro["baselines"] = {name: float(np.mean([e["baselines"][name] for e in types.values()])) for name in names}
    return {"types": types, "micro": accuracy(records), "macro": macro}


def accuracy(records: list[dict]) -> dict:
    """One entry of `summarise`."""
    groups = [r["group"] for r in records]
    right = np.array([r["correct"] for r in records], dtype=float)
    names = records[0]["baselines"]
    baselines = {name: np.array([r["baselines"][name] for r in records], dtype=float) for name in names}
    best = max(baselines, key=lambda name: baselines[name].mean()) if baselines else None
    gain = right - baselines[best] if baselines else None
    return {
        "n": len(records),
        "groups": len(set(groups)),
        "exact": float(right.mean()),
        "interval": clustered_interval(right, groups),
        "relaxed": sum(r["relaxed"] for r in records) / len(records),
        "baselines": {name: float(found.mean()) for name, found in baselines.items()},
        "best_baseline": best,
        "gain": float(gain.mean()) if baselines else None,
        "gain_interval": clustered_interval(gain, groups, lowest=-1.0) if baselines else None,
    }


def choice_figures(records: list[dict]) -> dict:
    """Figures that always saying the most frequent label does not raise; {} unless all may give the same answers.

    balanced is the mean over the labels of the share of its records answered rightly. Where the candidates were
    ranked: ranked, the share whose likeliest candidate is right, and auroc and map (average precision), the means over
    the labels of one against the others. Without two labels among the true answers balanced and auroc are None.
    """
    labels = records[0].get("candidates")
    if not labels or len(labels) < 2 or any(r.get("candidates") != labels for r in records):
        return {}
    true = [true_candidate(r) for r in records]  # None, a class of its own, where no candidate is right
    answered = {label: [r["correct"] for r, t in zip(records, true, strict=True) if t == label] for label in true}
    shares = [np.mean(right) for right in answered.values()]
    figures = {"balanced": float(np.mean(shares)) if len(shares) > 1 else None}
    if all("probabilities" in r for r in records):
        likeliest = [max(r["probabilities"], key=r["probabilities"].get) for r in records]
        figures["ranked"] = float(np.mean([prediction == t for prediction, t in zip(likeliest, true, strict=True)]))
        for name, area in (("auroc", auroc), ("map", average_precision)):
            by_label = [area([r["probabilities"][x] for r in records], [t == x for t in true]) for x in labels]
            known = [area for area in by_label if area is not None]
            figures[name] = float(np.mean(known)) if known else None
    return figures


def label_figures(records: list[dict]) -> dict:
    """Precision, recall and F1 of each label and their means over the labels (macro), and who is taken for whom.

    Labels are the true answers, each under its shortest form, and where all records allow the same candidates also
    those that never are the answer: such an empty class counts as zero, as does a label that is never predicted. A
    prediction that is no label takes nobody's precision and misses its own label's recall.
    """
    labels, found = labelled(records)
    pairs, (n_true, n_predicted) = Counter(found), map(Counter, zip(*found, strict=True))
    by_label = {}
    for name in labels:
        right = pairs[name, name]
        precision, recall = right / max(1, n_predicted[name]), right / max(1, n_true[name])
        f1 = 2 * right / max(1, n_predicted[name] + n_true[name])  # 2 P R / (P + R)
        by_label[name] = {"n": n_true[name], "precision": precision, "recall": recall, "f1": f1}
    figures = {c: float(np.mean([entry[c] for entry in by_label.values()])) for c in ("precision", "recall", "f1")}
    figures |= {"labels": labels[:MOST_LABELS], "single_class": len(n_true) == 1}
    figures |= {"per_label": {name: by_label[name] for name in labels[:MOST_LABELS]}}
    if len(labels) <= MOST_CONFUSED:
        figures["confusion"] = [[pairs[name, other] for other in [*labels, OTHER]] for name in labels]
    return figures


def labelled(records: list[dict]) -> tuple[list[str], list[tuple]]:
    """The labels of a type, and of each record the true one and the predicted one, or OTHER; see `label_figures`."""
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
    return labels, list(zip(true, predicted, strict=True))


def ranked_figures(records: list[dict]) -> dict:
    """The calibration of the records whose candidates were ranked; {} where none were."""
    ranked = [r for r in records if r.get("probabilities") and r.get("candidates")]
    right = [max(r["probabilities"], key=r["probabilities"].get) == true_candidate(r) for r in ranked]
    sure = [max(r["probabilities"].values()) for r in ranked]
    return {"calibration": calibration(sure, right)} if ranked else {}


def calibration(confidence: list[float], right: list[bool], bins: int = 10) -> dict:
    """The expected calibration error, and for each of equally wide bins how sure and how often right.

    ece is the mean over answers of |share right - mean probability| in their bin, upper end included (Guo et al. 2017).
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    edges = np.linspace(0, 1, bins + 1)
    of = np.searchsorted(edges[1:-1], confidence)  # (n,): the bin of each
    found = []
    for i, (low, high) in enumerate(pairwise(edges.tolist())):
        n = int((of == i).sum())
        sure, share = (float(x[of == i].mean()) if n else None for x in (confidence, right))
        found.append({"low": low, "high": high, "n": n, "confidence": sure, "accuracy": share})
    ece = sum(b["n"] / len(right) * abs(b["accuracy"] - b["confidence"]) for b in found if b["n"])
    return {"ece": ece, "n": len(right), "bins": found}


def number_figures(records: list[dict]) -> dict:
    """How far the predictions of a type `is_number` lie from the true numbers; {} for other types, and with candidates.

    Only of the `numbers` predictions that hold one alone (scoring.number_pair): no other has an error. mae and
    median_error are absolute, correlation is Pearson's, number_baseline is the mae of the training median (a record's
    `median`) on the same questions, and mae_gain how much less the model's is; each with its interval, None: undefined.
    """
    if not is_number(records[0]["question_type"]) or any(r.get("candidates") for r in records):
        return {}
    held = [(r, pair) for r in records if (pair := number_pair(r["prediction"], r["answer"]))]
    said, true = np.array([pair for _, pair in held]).reshape(-1, 2).T
    error, blind = abs(said - true), abs(np.array([r.get("median", math.nan) for r, _ in held]) - true)

    def figures(at) -> list[float]:  # of the predictions in these places
        correlation = np.corrcoef(said[at], true[at])[0, 1] if np.ptp(said[at]) and np.ptp(true[at]) else math.nan
        baseline = blind[at].mean()
        return [error[at].mean(), np.median(error[at]), correlation, baseline, baseline - error[at].mean()]

    values = figures(np.arange(len(held))) if held else [math.nan] * len(NUMBER_FIGURES)
    intervals = resampled_intervals(figures, [r["group"] for r, _ in held]) or [None] * len(values)
    found = {"numbers": len(held)}
    for name, value, interval in zip(NUMBER_FIGURES, values, intervals, strict=True):
        found |= {name: None if math.isnan(value) else float(value), f"{name}_interval": interval}
    return found


def auroc(scores: list[float], positive: list[bool]) -> float | None:
    """The chance that a positive has a higher score than a negative, a tie counting half; None without either."""
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    above, below = scores[positive], np.sort(scores[~positive])
    if not len(above) or not len(below):
        return None
    wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")  # twice: lower, plus equal
    return float(wins.mean() / 2 / len(below))


def average_precision(scores: list[float], positive: list[bool]) -> float | None:
    """The area under precision over recall, as steps: the sum of (R_k - R_(k-1)) P_k over the scores, highest first.

    None without a positive.
    """
    scores, positive = np.asarray(scores, dtype=float), np.asarray(positive, dtype=float)
    if not positive.sum():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores are taken together
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def results_table(results: dict) -> str:
    """The summary as text: a line a question type, then micro and macro; label figures where a type has them."""
    width = max(16, 1 + max(map(len, results["types"])))
    names = list(results["macro"]["baselines"])
    extra = [c for c in ("balanced", "ranked", "auroc") if any(c in r for r in results["types"].values())]
    lines = [f"{'':<{width + 6 + 8 + 16 + 10}}{'blind baselines, by':>{10 * len(names)}}"] if names else []
    lines += [f"{'question type':<{width}}{'n':>6}{'exact':>8}{'95 % interval':>16}{'relaxed':>10}"]
    lines[-1] += "".join(f"{name:>10}" for name in names) + (f"{'gain':>12}{'95 % interval':>18}" if names else "")
    lines[-1] += "".join(f"{column:>10}" for column in extra)
    for kind, entry in [*results["types"].items(), ("micro average", results["micro"])]:
        line = f"{kind:<{width}}{entry['n']:>6}{percent(entry['exact']):>8}{ends(entry['interval']):>16}"
        line += f"{percent(entry['relaxed']):>10}"
        line += "".join(f"{percent(entry['baselines'][name]):>10}" for name in names)
        if names:
            line += f"{percent(entry['gain'], '+'):>12}{ends(entry['gain_interval'], '+'):>18}"
        for column in extra if entry is not results["micro"] else []:
            value = entry.get(column)
            line += f"{f'{value:.3f}' if column == 'auroc' and value is not None else percent(value):>10}"
        lines.append(line)
    macro = results["macro"]
    line = f"{'macro average':<{width + 6}}{percent(macro['exact']):>8}{'':>16}{percent(macro['relaxed']):>10}"
    lines.append(line + "".join(f"{percent(macro['baselines'][name]):>10}" for name in names))
    lines += [number_line(kind, entry) for kind, entry in results["types"].items() if "numbers" in entry]
    return "\n".join(lines)


def number_line(kind: str, entry: dict) -> str:
    """The `number_figures` of a type in a sentence, with a warning where predictions hold no number."""
    parts, left = [], entry["n"] - entry["numbers"]
    for name, words in NUMBER_FIGURES.items():
        value, interval = entry[name], entry[f"{name}_interval"]
        shown = "–" if value is None else f"{value:.4g}"
        parts.append(f"{words} {shown}" + (f" ({interval[0]:.4g} – {interval[1]:.4g})" if interval else ""))
    warning = f"; WARNING: without {left} of {entry['n']} predictions, which hold no such number, or several"
    return f"{kind}: {', '.join(parts)}{warning if left else ''}"


def percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.1%}"


def ends(interval: list[float] | None, sign: str = "") -> str:
    return " – ".join(percent(end, sign) for end in interval) if interval else "one group"

"""The figures of a run: accuracy with its interval, by question type and overall, beside blind baselines."""

from collections import defaultdict

import numpy as np

from report.intervals import clustered_interval
from report.scoring import true_candidate


def summarise(records: list[dict]) -> dict:
    """Accuracy of all records (micro), of each question type, and the types' mean (macro).

    Every record counts, answered or not. A record has question_type, answer, group, correct, relaxed, where the
    answer has other forms also_right, and baselines: whether each of `blind_answers` is right. Each entry has n,
    groups, exact, interval (see `clustered_interval`), relaxed, baselines, and the gain: how far exact is above the
    best of these, with the interval of that difference (of each record, right or not less baseline right or not).
    Which baseline is the best is found on these same records, to the baseline's advantage.

    A type whose questions all have the same `candidates` has label figures, too, see `label_figures`.
    """
    if not records:
        raise ValueError("no examples to summarise")
    kinds = defaultdict(list)
    for record in records:
        kinds[record["question_type"]].append(record)
    types = {kind: {**accuracy(part), **label_figures(part)} for kind, part in sorted(kinds.items())}

    def mean(figure) -> float:
        return sum(figure(entry) for entry in types.values()) / len(types)

    macro = {"exact": mean(lambda entry: entry["exact"]), "relaxed": mean(lambda entry: entry["relaxed"])}
    macro["baselines"] = {name: mean(lambda e, name=name: e["baselines"][name]) for name in records[0]["baselines"]}
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


def label_figures(records: list[dict]) -> dict:
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
    return "\n".join(lines)


def percent(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.1%}"


def ends(interval: list[float] | None, sign: str = "") -> str:
    return " – ".join(percent(end, sign) for end in interval) if interval else "one group"

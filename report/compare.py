"""Runs against each other: paired over the questions that both answer, and over seeds."""

import json
from collections import defaultdict

import numpy as np

from report.figures import clips
from report.intervals import clustered_interval


def compare(a: dict, b: dict) -> dict | None:
    """Run a less run b over the questions that both answered, paired; None where they share none."""
    others = {r["id"]: r for r in b["records"]}
    pairs = [(r, others[r["id"]]) for r in a["records"] if r["id"] in others]
    pairs = [(r, other) for r, other in pairs if (r["question"], r["answer"]) == (other["question"], other["answer"])]
    if not pairs:
        return None
    mine = [record for record, _ in pairs]
    groups = [record["group"] for record in mine]
    groups = clips(mine) if len(set(groups)) == 1 else groups

    def difference(chosen: list[int]) -> dict:
        values = [pairs[i][0]["correct"] - pairs[i][1]["correct"] for i in chosen]
        interval = clustered_interval(values, [groups[i] for i in chosen], lowest=-1.0)
        return {"n": len(values), "difference": float(np.mean(values)), "interval": interval}

    by_type = defaultdict(list)
    for i, record in enumerate(mine):
        by_type[record["question_type"]].append(i)
    types = {kind: difference(chosen) for kind, chosen in sorted(by_type.items())}
    return {"a": a["name"], "b": b["name"], "n": len(pairs), "types": types, "micro": difference(range(len(pairs)))}


def seeds_of(runs: list[dict], found: list[dict]) -> list[dict]:
    """Runs whose settings differ in the seed alone: mean, standard deviation, least and most of exact over them.

    `found` are the figures of the runs, see figures.summarise_run.
    """
    alike = defaultdict(list)
    for run, numbers in zip(runs, found, strict=True):
        settings = {name: value for name, value in (run.get("settings") or {}).items() if name not in ("seed", "out")}
        if settings:
            alike[json.dumps([run["script"], run["split"], settings], sort_keys=True)].append((run, numbers))
    aggregated = []
    for part in alike.values():
        seeds = [run["settings"]["seed"] for run, _ in part]
        if len(set(seeds)) > 1:
            kinds = set.intersection(*({*numbers["types"]} for _, numbers in part))
            types = {kind: spread([numbers["types"][kind]["exact"] for _, numbers in part]) for kind in sorted(kinds)}
            total = spread([numbers["micro"]["exact"] for _, numbers in part])
            names = [run["name"] for run, _ in part]
            aggregated.append({"runs": names, "seeds": seeds, "types": types, "micro": total})
    return aggregated


def spread(values: list[float]) -> dict:
    """mean, sd (of a sample; None of one value), least, most"""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "least": min(values), "most": max(values)}

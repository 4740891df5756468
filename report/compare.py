"""Runs against each other: paired over the questions that both answer, over seeds, and against what they began as."""

import json
from collections import defaultdict

import numpy as np

from report.intervals import clustered_interval
from report.read import ANSWERED, read_or_empty, read_records
from report.summary import resampled, summarise_run

BEFORE = "before training"
# what else a run's questions were answered by: its folder, how to repeat it, what must be as in the run
OTHERS = {mode: (f"blind/{mode}", f"--blind {mode}", ANSWERED) for mode in ("blank", "shuffled")}
OTHERS |= {BEFORE: ("baseline", "--resume none", (*ANSWERED, "model"))}


def compare(a: dict, b: dict) -> dict | None:
    """Run a less run b over the questions that both answered, paired; None where they share none."""
    others = {r["id"]: r for r in b["records"]}
    pairs = [(r, others[r["id"]]) for r in a["records"] if r["id"] in others]
    pairs = [(r, other) for r, other in pairs if (r["question"], r["answer"]) == (other["question"], other["answer"])]
    if not pairs:
        return None
    mine = resampled([record for record, _ in pairs])

    def difference(kind: str | None = None) -> dict:
        chosen = [i for i, record in enumerate(mine) if kind in (None, record["question_type"])]
        values = [pairs[i][0]["correct"] - pairs[i][1]["correct"] for i in chosen]
        interval = clustered_interval(values, [mine[i]["group"] for i in chosen], lowest=-1.0)
        return {"n": len(values), "difference": float(np.mean(values)), "interval": interval}

    types = {kind: difference(kind) for kind in sorted({record["question_type"] for record in mine})}
    return {"a": a["name"], "b": b["name"], "n": len(pairs), "types": types, "micro": difference()}


def seeds_of(found: list[dict]) -> list[dict]:
    """Of runs whose settings differ in the seed alone mean, standard deviation, least and most of exact over them.

    `found` are the figures of all runs, see summary.summarise_run.
    """
    alike = defaultdict(list)
    for run in found:
        settings = {name: value for name, value in run["settings"].items() if name not in ("seed", "out")}
        if settings:
            alike[json.dumps([run["script"], run["split"], settings], sort_keys=True)].append(run)
    aggregated = []
    for part in alike.values():
        seeds = [run["settings"].get("seed") for run in part]
        if len(set(seeds)) > 1:
            kinds = sorted(set.intersection(*(set(run["types"]) for run in part)))
            types = {kind: spread([run["types"][kind]["exact"] for run in part]) for kind in kinds}
            total = spread([run["micro"]["exact"] for run in part])
            aggregated.append({"runs": [run["name"] for run in part], "seeds": seeds, "types": types, "micro": total})
    return aggregated


def spread(values: list[float]) -> dict:
    """mean, sd (of a sample), least, most of two values or more"""
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    return {"mean": mean, "sd": sd, "least": min(values), "most": max(values)}


def add_blind_runs(run: dict, found: dict) -> None:
    """Put into found["blind"] what the same model answered without seeing, and before training; see OTHERS."""
    for mode, (folder, flag, same) in OTHERS.items():
        path = run["folder"] / folder / "predictions.jsonl"
        if not path.is_file():
            continue
        # a comparison with other settings would say nothing of the images, or of the training
        answered, again = read_or_empty(path.with_name("results.json")), f"repeat it with --eval-only {flag}"
        records = {r["id"]: r for r in read_records(path)}
        other = {"name": mode, "records": [records[r["id"]] for r in run["records"] if r["id"] in records]}
        paired = compare(run, other)
        # a run that was answered before they were recorded has no settings of its script
        now, then = ({name: of.get(name) for name in same} | (of.get("own_settings") or {}) for of in (run, answered))
        changed = [name for name in now if name in then and now[name] != then[name]]
        if changed or not paired:
            what = f"with another {changed[0]}" if changed else "other questions"
            found["notes"].append(f"{mode}: was answered {what}; {again}")
            continue
        numbers, difference = summarise_run(other)["micro"], paired["micro"]
        entry = {"n": paired["n"], "exact": numbers["exact"], "interval": numbers["interval"]}
        entry |= {"difference": difference["difference"], "difference_interval": difference["interval"]}
        found["blind"][mode] = entry
        if mode != BEFORE and path.stat().st_mtime < (run["folder"] / "predictions.jsonl").stat().st_mtime:
            found["notes"].append(f"{mode}: answered before the run's last answers; {again}")
        if paired["n"] < found["n"]:
            found["notes"].append(f"{mode}: {paired['n']} of {found['n']} questions could be asked so")

"""What a report consists of, written: report.html, results.json, the figures as SVG and PNG; and printed."""

import traceback
from itertools import combinations
from pathlib import Path

from report import drawing
from report.compare import BEFORE, add_blind_runs, compare, seeds_of
from report.page import entries, page
from report.read import read_run
from report.summary import ends, percent, results_table, summarise_run
from runtime.files import write_json, write_text, writing


def write(runs: list[dict], out: Path) -> dict:
    """report.html, results.json and the figures of one or several runs, into the folder `out`; returns the results.

    `runs` are those of read.read_run or examples.read_predictions; only a run that has a folder has blind runs.
    Ends where `out` cannot be written.
    """
    found = [summarise_run(run) for run in runs]
    for run, numbers in zip(runs, found, strict=True):
        if "folder" in run:
            add_blind_runs(run, numbers)
    audits = [{**run["audit"], "run": run["name"]} for run in runs if run.get("audit")]
    result = {
        "title": ", ".join(run["name"] for run in runs),
        "runs": found,
        "comparisons": [pair for a, b in combinations(runs, 2) if (pair := compare(a, b))],
        "seeds": seeds_of(found),
        "audit": max(audits, key=lambda audit: audit["failed"], default=None),  # that of the worst scorer
        "leakage": next(({**run["leakage"], "run": run["name"]} for run in runs if run.get("leakage")), None),
    }
    records, media, faults = entries(runs)
    examples = [{"run": run["name"], **run["example"]} for run in runs if run.get("example")]
    figures = drawing.draw_figures(result, {run["name"]: run.get("metrics", []) for run in runs})
    with writing(out):
        drawing.write_figures(out, figures)
    write_json(out / "results.json", result)
    write_text(out / "report.html", page(result, records, media, examples, figures, faults))
    return result


def write_report(folder: Path, media: Path) -> None:
    """RUN/report, for a script that has answered. A failure here is printed and fails no run: its results are saved."""
    try:
        write([read_run(folder) | {"media_root": media}], folder / "report")
        print(f"the report is {folder / 'report' / 'report.html'}")
    except (Exception, SystemExit):
        traceback.print_exc()
        print(f"no report was written; python -m report {folder} --media-root {media} tries again")


def print_result(result: dict) -> None:
    """The tables of all runs, and what differs between them."""
    for run in result["runs"]:
        print(f"\n{run['name']}: {run['n']} questions", results_table(run), *run["notes"], sep="\n")
        gain, interval = run["micro"]["gain"], run["micro"]["gain_interval"]
        if interval and interval[0] <= 0:
            print(f"NOT {'significantly ' if gain > 0 else ''}above its best blind baseline")
        for mode, entry in run["blind"].items():
            added = f"{entry['difference']:+.1%} ({ends(entry['difference_interval'], '+')})"
            what, how = (mode, "training") if mode == BEFORE else (f"{mode} media", "seeing")
            print(f"{what}: {entry['exact']:.1%} of {entry['n']} questions; {how} adds {added}")
        if "calibration" in run["micro"]:
            print(f"expected calibration error {run['micro']['calibration']['ece']:.3f}")
    for pair in result["comparisons"]:
        text = f"{pair['micro']['difference']:+.1%} ({ends(pair['micro']['interval'], '+')})"
        print(f"\n{pair['a']} less {pair['b']}, {pair['n']} questions: {text}")
    for part in result["seeds"]:
        mean, sd, least, most = (percent(part["micro"][name]) for name in ("mean", "sd", "least", "most"))
        print(f"\n{len(part['seeds'])} seeds: {mean} ± {sd} (standard deviation), {least} – {most}")

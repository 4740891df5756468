"""Blind runs of a finished run: its script answers again without its images, and the report compares the two."""

import subprocess
import sys
from pathlib import Path

from report.compare import compare
from report.figures import summarise_run
from report.read import ANSWERED, read_or_empty, read_records

MODES = ("blank", "shuffled")  # --blind of the scripts
AGAIN = "repeat it with --blind-runs"


def start_blind_runs(run: dict) -> None:
    """Let the run's own script answer again, with nothing to see and with another group's media."""
    script = Path(__file__).resolve().parents[1] / (run["script"] or "no script")
    if not script.is_file() or run["split"] is None:
        text = f"config.json names {run['script']!r} and results.json the split {run['split']!r}"
        raise SystemExit(f"{run['name']}: {text}; answer again first, with a script beside the folder report/")
    if run["settings"].get("overfit"):
        raise SystemExit(f"{run['name']} was trained with --overfit: there is nothing to compare with")
    for mode in MODES:
        again = ["--eval-only", "--resume", "auto", "--out", run["folder"], "--blind", mode, "--data", run["data"]]
        again += [x for name in ANSWERED[1:] if run[name] for x in (f"--{name.replace('_', '-')}", run[name])]
        command = [sys.executable, script, *run["argv"], *again, "--eval-split", run["split"]]
        command = [str(word) for word in command]
        print(f"--blind {mode}: {' '.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{run['name']}: --blind {mode} did not answer; its own message says why")


def add_blind_runs(run: dict, found: dict) -> None:
    """Put what the same model answered without seeing into found["blind"], where RUN/blind has it."""
    for mode in MODES:
        path = run["folder"] / "blind" / mode / "predictions.jsonl"
        if not path.is_file():
            continue
        answered = read_or_empty(path.with_name("results.json"))
        records = {r["id"]: r for r in read_records(path)}
        other = {"name": mode, "records": [records[r["id"]] for r in run["records"] if r["id"] in records]}
        paired = compare(run, other)
        changed = [name for name in ANSWERED if answered.get(name) != run[name]]
        if changed or not paired:
            what = f"with another {changed[0]}" if changed else "other questions"
            found["notes"].append(f"{mode}: was answered {what}; {AGAIN}")
            continue
        numbers = summarise_run(other)["micro"]
        entry = {"n": paired["n"], "exact": numbers["exact"], "interval": numbers["interval"]}
        entry |= {"difference": paired["micro"]["difference"], "difference_interval": paired["micro"]["interval"]}
        found["blind"][mode] = entry
        if path.stat().st_mtime < (run["folder"] / "predictions.jsonl").stat().st_mtime:
            found["notes"].append(f"{mode}: answered before the run's last answers; {AGAIN}")
        if paired["n"] < found["n"]:
            found["notes"].append(f"{mode}: {paired['n']} of {found['n']} questions could be asked so")

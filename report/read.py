"""A run folder, read back for its report: records, metrics, settings, and what the run's data check has found."""

from pathlib import Path

from inputs.task import Problem
from inputs.texts import read_json, read_jsonl

RECORD = {"id", "group", "media", "question_type", "question", "answer", "prediction", "correct", "relaxed"}
ANSWERED = ("split", "decode", "max_answer_tokens", "limit")  # how a run was answered
OF_WHAT = ("model", "data", "date", "trained", "checkpoint", "step", "steps", "lowest_val_loss", "left_out")
OF_WHAT += ("own_settings", "script", "script_sha256", "git_commit")


def read_run(folder: Path) -> dict:
    """A run folder: its records, metrics, settings, and what it recorded of itself. Ends where nothing is answered."""
    path, metrics = folder / "predictions.jsonl", folder / "metrics.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder}: no predictions.jsonl; answer with the script's --eval-only first")
    config, results, check = (read_or_empty(folder / f"{name}.json") for name in ("config", "results", "check"))
    return {
        "name": str(folder),
        "folder": folder,
        "records": read_records(path),
        "metrics": [line for _, line in read_jsonl(metrics) if isinstance(line, dict)] if metrics.is_file() else [],
        "example": check.get("example"),
        "audit": check.get("scorer"),
        "leakage": check.get("leakage"),
        "own": {name: value for name, value in results.items() if isinstance(value, float)},  # of its script
        **{name: (config | results).get(name) for name in (*ANSWERED, *OF_WHAT, "cut_off")},
        **{name: config.get(name, empty) for name, empty in {"argv": [], "versions": {}, "settings": {}}.items()},
        "git_differs": any(of.get("git_differs") for of in (config, results)),  # while it trained, or answered
    }


def read_or_empty(path: Path) -> dict:
    """A JSON file, {} where there is none. Ends where it is damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: {error}, or write it again with the script's --eval-only") from None


def read_records(path: Path) -> list[dict]:
    """The lines of a predictions.jsonl as a script writes it. Ends with what is wrong where a line is none."""
    lines = list(read_jsonl(path))
    refuse([line for _, line in lines if isinstance(line, Problem)])
    problems = []
    for where, record in lines:
        missing = sorted(RECORD - record.keys()) or [name for name in ("id", "question_type") if record[name] is None]
        if missing:
            text = f"no {', '.join(missing)}; predictions of other programs are read with --predictions and --test"
            problems.append(Problem(where, record.get("id"), text))
    refuse(problems)
    return [{"baselines": {}} | record for _, record in lines]  # some were written before their baselines


def refuse(problems: list[Problem], most: int = 20) -> None:
    """End with the problems, the first `most` of them, where there are any."""
    if problems:
        more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
        raise SystemExit("\n".join([*map(str, problems[:most]), *more]))

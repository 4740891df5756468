"""Honest numbers from runs, and a page to look at; the gate that data pass, and the audit that a scorer passes.

    python report.py RUN [RUN ...]                                     # run folders of one or several scripts
    python report.py RUN --blind-runs                                  # and the same model without seeing anything
    python report.py --predictions FILE --train TRAIN.jsonl --test TEST.jsonl      # anybody's answers
    python report.py --data DIR                                        # the data gate

Written are report.html (one file, no network), results.json, and the figures as SVG and PNG, into --out: of a single
run RUN/report. Every script writes it after answering; gate and audit run before every training, and with --check.

    1  reading       runs, and predictions of others
    2  numbers       per type and overall, beside what can be said blindly; calibration; runs against each other
    3  the audit     a scorer proves that it takes no wrong answer for right
    4  the gate      what training and test share, and what contradicts itself
    5  data folders  read without a model or a script, for the gate and for predictions of others
    6  writing       report.html, results.json, the command line

Imports common.py, runtime.py and report_page.py, which draws; knows no model.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import common
import report_page
import runtime
from runtime import Problem

# ------------------------------------------------------------------------------------------------------------
# 1  Reading
# ------------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict:
    """A run folder: its records, metrics, settings, and what it recorded of itself. Ends where nothing is answered."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        raise SystemExit(f"{folder}: no predictions.jsonl; answer with the script's --eval-only first")
    records = read_records(path)
    config, results, check = (read_json(folder / f"{name}.json") for name in ("config", "results", "check"))
    settings = config.get("settings", {})
    data = results.get("data", settings.get("data"))
    metrics = folder / "metrics.jsonl"
    return {
        "name": str(folder),
        "folder": folder,
        "data": Path(data) if data else None,
        "records": records,
        "metrics": [row for _, row in runtime.read_jsonl(metrics)[0]] if metrics.is_file() else [],
        "mask": check.get("row"),
        "audit": check.get("scorer"),
        "gate": check.get("gate"),
        "own": {name: value for name, value in results.items() if isinstance(value, float)},  # of its script
        **{name: results.get(name) for name in ("split", "decode", "cut_off", "max_answer_tokens", "limit")},
        "script": config.get("script"),
        **{name: config.get(name, empty) for name, empty in {"argv": [], "versions": {}, "git_commit": None}.items()},
        "settings": settings,
    }


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise SystemExit(f"{path}: not JSON ({error}); write it again with the script's --eval-only") from None


RECORD = {"id", "group", "media", "question_type", "question", "answer", "prediction", "correct", "tolerant"}


def read_records(path: Path) -> list[dict]:
    """The lines of a predictions.jsonl as a script writes it."""
    lines, problems = runtime.read_jsonl(path)
    for where, record in lines:
        missing = sorted(RECORD - record.keys()) or [name for name in ("id", "question_type") if record[name] is None]
        if missing:
            text = f"no {', '.join(missing)}; predictions of other programs are read with --predictions and --test"
            problems.append(runtime.Problem(where, record.get("id"), text))
    if problems:
        raise SystemExit("\n".join(map(str, problems[:20])))
    records = [record for _, record in lines]
    if not all("floors" in record for record in records):  # of an older version
        records = [{**record, "floors": {}} for record in records]
    return records


# fields of a predictions file, and the names that they have where --fields names none
PREDICTED = {"id": ("id", "question_id"), "prediction": ("prediction", "predicted_answer", "response")}


def read_rows(path: Path, split: str) -> list:
    """The questions of one file. Ends with what is wrong where lines cannot be read, or their answers say nothing."""
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")
    rows, problems = rows_of(path.parent, ((split, where, entry) for where, entry in entries(path)))
    first = {}
    for row in rows:
        if not isinstance(row.answer, str | int | float) or common.says_nothing(row.answer):
            problems.append(
                Problem(row.where, row.id, f"the answer is empty or no text ({row.answer!r}); mend the row")
            )
        if first.setdefault(row.id, row) is not row and split == "test":
            problems.append(Problem(row.where, row.id, f"duplicate ID, first used at {first[row.id].where}"))
        row.answer = str(row.answer)
    if problems:
        raise SystemExit("\n".join(map(str, problems[:20])))
    return rows


def read_fields(text: str) -> dict[str, str]:
    """{"prediction": "predicted_answer"} of "prediction=predicted_answer,…"."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    wrong = [name for name, _, theirs in pairs if name not in PREDICTED or not theirs]
    if wrong:
        raise SystemExit(f"--fields {text}: {wrong[0]!r} is none of {', '.join(PREDICTED)}, each NAME=THEIRS")
    return {name: theirs for name, _, theirs in pairs}


def read_predictions(path: Path, test: list, train: list, fields: dict[str, str]) -> dict:
    """A predictions file, a line a question, scored against the rows `test`; `train` gives the blind floors.

    A row that the file does not answer counts as wrong. Ends with what is wrong where lines cannot be used.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")
    lines, problems = runtime.read_jsonl(path)
    said = {}
    known = {row.id.rpartition("/")[2]: row.id for row in test}  # "qa_1", too, of "002-004/qa_1"
    known = {short: name for short, name in known.items() if len(known) == len(test)} | {r.id: r.id for r in test}
    for where, line in lines:
        found = {}
        for name, usual in PREDICTED.items():
            theirs = [fields[name]] if name in fields else usual
            found[name] = next((line[key] for key in theirs if key in line), None)
            if not any(key in line for key in theirs):
                text = f"no field {' or '.join(theirs)}; name it with --fields {name}=…"
                problems.append(runtime.Problem(where, None, text))
        name = known.get(str(found["id"]))
        if not isinstance(found["prediction"], str | int | float | None):
            text = f"the prediction must be a text or null: {found['prediction']!r}"
            problems.append(runtime.Problem(where, str(found["id"]), text))
        if name is None:
            problems.append(runtime.Problem(where, str(found["id"]), "no row of --test has this ID"))
        elif name in said:
            problems.append(runtime.Problem(where, str(found["id"]), "answered twice; keep one line"))
        said[name] = None if found["prediction"] is None else str(found["prediction"])
    if problems:
        more = f"\n… and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise SystemExit("\n".join(map(str, problems[:20])) + more)
    training = [(row.question_type, row.question, forms(row)) for row in train]
    blind = common.blind_answers(training, [(row.question_type, row.question) for row in test])
    records = []
    for row, floors in zip(test, blind, strict=True):
        record = {name: getattr(row, name) for name in ("id", "group", "media", "question_type", "question", "answer")}
        prediction = said.get(row.id)
        right = score(prediction, row)
        record |= {"also_right": row.also_right, "prediction": prediction, "correct": right["exact"]}
        record |= {"tolerant": right["tolerant"]}
        records.append({**record, "floors": {name: score(text, row)["exact"] for name, text in floors.items()}})
    unanswered = sum(row.id not in said for row in test)
    note = [f"{unanswered} of {len(test)} rows have no prediction; they count as wrong"] if unanswered else []
    return {"name": str(path), "records": records, "notes": note}


def forms(row) -> list[str]:
    """All right answers of a row."""
    return [row.answer, *getattr(row, "also_right", [])]


def score(prediction: str | None, row) -> dict[str, bool]:
    """{"exact", "tolerant"}: against the answer or another form of it, see common.score_answer."""
    found = [common.score_answer(prediction, form, row.question_type) for form in forms(row)]
    return {name: any(f[name] for f in found) for name in ("exact", "tolerant")}


# ------------------------------------------------------------------------------------------------------------
# 2  Numbers
# ------------------------------------------------------------------------------------------------------------


def summarise_run(run: dict) -> dict:
    """What results.json and the page say of a run: common.summarise, and label figures and calibration beside."""
    records, notes = run["records"], list(run.get("notes", []))
    if len({r["group"] for r in records}) == 1 and len(records) > 1:
        records = [{**r, "group": clip} for r, clip in zip(records, clips(records), strict=True)]
        count = len({r["group"] for r in records})
        of = run["records"][0]["group"]
        notes.append(
            f"all rows are of one group, {of}: intervals are of its {count} parts that share no media, "
            "and say nothing about another group"
            if count > 1
            else f"all rows are of one group, {of}, and share their media: there are no intervals"
        )
    if not records[0]["floors"]:
        notes.append("what can be said blindly is not known: give --train, or answer again with --eval-only")
    if run.get("cut_off"):
        notes.append(f"{run['cut_off']} answers were cut off before they ended: raise --max-answer-tokens")
    found = common.summarise(records)
    by_type = defaultdict(list)
    for record in records:
        by_type[record["question_type"]].append(record)
    for kind, part in by_type.items():
        found["types"][kind] |= label_figures(part) | scored_figures(part)
    found["all"] |= scored_figures(records, overall=True)
    about = {"split": None, "decode": None, "git_commit": None, "script": None}
    about |= {"argv": [], "versions": {}, "settings": {}, "own": {}}
    about = {"name": run["name"]} | {name: run.get(name, unknown) for name, unknown in about.items()}
    return {**about, **found, "n": len(records), "blind": {}, "notes": notes}


def clips(records: list[dict]) -> list[int]:
    """For each record the number of its clip: records that share a file, directly or through others, are of one."""
    number = united([[("record", i), *record.get("media", [])] for i, record in enumerate(records)])
    return [number["record", i] for i in range(len(records))]


def united(sets: list) -> dict:
    """{member: number}: the same for members of one set, and of sets that share members, also through others."""
    parent = {}

    def root(member):
        while parent.setdefault(member, member) != member:
            parent[member] = member = parent[parent[member]]
        return member

    for members in sets:
        for member in members:
            parent[root(member)] = root(members[0])
    numbers = {}
    return {member: numbers.setdefault(root(member), len(numbers)) for member in list(parent)}


MOST_LABELS, MOST_CONFUSED = 200, 12  # listed in results.json; shown as a table of who is taken for whom
OTHER = None  # what is none of the labels: no text, or an answer "other" would be taken for it


def label_figures(records: list[dict]) -> dict:
    """Precision, recall and F1 of each label and their means over the labels (macro), and who is taken for whom.

    Labels are the true answers, each under its shortest form, and where all records allow the same candidates also
    those that never are the answer: such an empty class counts as zero, as does a label that is never predicted. A
    prediction that is no label takes nobody's precision and misses its own label's recall.
    """
    named = {}  # form -> label
    true = []
    for record in records:
        own = [common.answer_label(form) for form in [record["answer"], *record.get("also_right", [])]]
        true.append(min(own, key=len))
        named |= {form: true[-1] for form in own if form not in named}
    candidates = records[0].get("candidates") or []
    if any(record.get("candidates") != records[0].get("candidates") for record in records):
        candidates = []
    for candidate in candidates:
        named.setdefault(common.answer_label(candidate), common.answer_label(candidate))
    labels = sorted({*true, *(named[common.answer_label(candidate)] for candidate in candidates)})
    said = []
    for record, own in zip(records, true, strict=True):
        other = named.get(common.answer_label(record["prediction"]), OTHER)
        said.append(own if record["correct"] else OTHER if other == own else other)
    pairs, n_true, n_said = Counter(zip(true, said, strict=True)), Counter(true), Counter(said)
    by_label = {}
    for name in labels:
        right = pairs[name, name]
        precision, recall = right / max(1, n_said[name]), right / max(1, n_true[name])
        f1 = 2 * right / max(1, n_said[name] + n_true[name])  # 2 P R / (P + R)
        by_label[name] = {"n": n_true[name], "precision": precision, "recall": recall, "f1": f1}
    figures = {c: float(np.mean([entry[c] for entry in by_label.values()])) for c in ("precision", "recall", "f1")}
    figures |= {"labels": labels[:MOST_LABELS], "single_class": len(set(true)) == 1}
    figures |= {"per_label": {name: by_label[name] for name in labels[:MOST_LABELS]}}
    if len(labels) <= MOST_CONFUSED:
        figures["confusion"] = [[pairs[name, other] for other in [*labels, OTHER]] for name in labels]
    return figures


def scored_figures(records: list[dict], overall: bool = False) -> dict:
    """Calibration, and of one type the mean average precision, of the records whose candidates were scored."""
    scored = [r for r in records if r.get("probabilities") and r.get("candidates")]
    if not scored:
        return {}
    likeliest = [max(r["probabilities"], key=r["probabilities"].get) for r in scored]
    true = [common.true_candidate(r) for r in scored]
    sure = [r["probabilities"][said] for r, said in zip(scored, likeliest, strict=True)]
    figures = {"calibration": calibration(sure, [s == t for s, t in zip(likeliest, true, strict=True)])}
    names = list(scored[0]["probabilities"])
    if not overall and all(list(r["probabilities"]) == names for r in scored):
        areas = [average_precision([r["probabilities"][x] for r in scored], [t == x for t in true]) for x in names]
        known = [area for area in areas if area is not None]
        figures["map"] = float(np.mean(known)) if known else None
    return figures


def calibration(confidence: list[float], right: list[bool], bins: int = 10) -> dict:
    """The expected calibration error, and for each of equally wide bins how sure and how often right.

    ece is the mean over the answers of |share that is right - mean probability| in their bin (Guo et al. 2017). A bin
    holds its upper end.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=float)
    edges = np.linspace(0, 1, bins + 1)
    of = np.searchsorted(edges[1:-1], confidence)  # (n,)
    found, ece = [], 0.0
    for i in range(bins):
        inside = of == i
        n = int(inside.sum())
        sure, share = (float(x[inside].mean()) if n else None for x in (confidence, right))
        found.append(
            {"low": float(edges[i]), "high": float(edges[i + 1]), "n": n, "confidence": sure, "accuracy": share}
        )
        ece += n / len(right) * abs(share - sure) if n else 0.0
    return {"ece": ece, "n": len(right), "bins": found}


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


def compare(a: dict, b: dict) -> dict | None:
    """Run a less run b over the questions that both answered, paired; None where they share none."""
    others = {r["id"]: r for r in b["records"]}
    pairs = [(r, others[r["id"]]) for r in a["records"] if r["id"] in others]
    pairs = [(r, other) for r, other in pairs if (r["question"], r["answer"]) == (other["question"], other["answer"])]
    if not pairs:
        return None
    groups = (
        clips([r for r, _ in pairs]) if len({r["group"] for r, _ in pairs}) == 1 else [r["group"] for r, _ in pairs]
    )

    def difference(chosen: list[int]) -> dict:
        values = [pairs[i][0]["correct"] - pairs[i][1]["correct"] for i in chosen]
        interval = common.clustered_interval(values, [groups[i] for i in chosen], lowest=-1.0)
        return {"n": len(values), "difference": float(np.mean(values)), "interval": interval}

    by_type = defaultdict(list)
    for i, (record, _) in enumerate(pairs):
        by_type[record["question_type"]].append(i)
    types = {kind: difference(chosen) for kind, chosen in sorted(by_type.items())}
    return {"a": a["name"], "b": b["name"], "n": len(pairs), "types": types, "all": difference(range(len(pairs)))}


def seeds_of(runs: list[dict], found: list[dict]) -> list[dict]:
    """Runs whose settings differ in the seed alone: mean, standard deviation, least and most of exact over them."""
    alike = defaultdict(list)
    for run, numbers in zip(runs, found, strict=True):
        settings = {name: value for name, value in (run.get("settings") or {}).items() if name not in ("seed", "out")}
        if settings:
            alike[json.dumps([run["script"], run["split"], settings], sort_keys=True)].append((run, numbers))

    def spread(values: list[float]) -> dict:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "sd": sd, "least": min(values), "most": max(values)}

    aggregated = []
    for part in alike.values():
        seeds = [run["settings"]["seed"] for run, _ in part]
        if len(set(seeds)) > 1:
            kinds = set.intersection(*({*numbers["types"]} for _, numbers in part))
            types = {kind: spread([numbers["types"][kind]["exact"] for _, numbers in part]) for kind in sorted(kinds)}
            total = spread([numbers["all"]["exact"] for _, numbers in part])
            aggregated.append({"runs": [run["name"] for run, _ in part], "seeds": seeds, "types": types, "all": total})
    return aggregated


# ------------------------------------------------------------------------------------------------------------
# 3  The audit: a scorer proves that it takes no wrong answer for right
# ------------------------------------------------------------------------------------------------------------

MOST_PAIRS = 200_000
MOST_TOGETHER = 20  # answers said in one


def audit_scorer(right, rows: list, synonyms: list[list[str]] = ()) -> dict:
    """Ask a scorer what must be wrong; `failures` are what it called right.

    right(prediction, row) -> bool; None, which would leave the row out, is a failure, too. A row has id, question,
    answer, question_type, and perhaps also_right. Of each type every two distinct answers are scored against each
    other. Those may be right that are the same after normalising, forms of one row's answer, or of one line of
    `synonyms`: counted as declared. For every row are scored nothing, spaces, "I don't know", the question itself, and
    different answers of its type in one. Of more than MOST_PAIRS pairs a regular part is scored: `pairs` says how many.
    """
    by_type = defaultdict(dict)  # type -> answer -> a row that it is right for
    lines = [[common.answer_label(word) for word in line] for line in synonyms]
    meant = defaultdict(lambda: list(lines))  # type -> what means the same
    for row in rows:
        for form in forms(row):
            by_type[row.question_type].setdefault(form, row)
        meant[row.question_type].append([common.answer_label(form) for form in forms(row)])
    meaning = {kind: united(sets) for kind, sets in meant.items()}
    pairs, same, failures, probes = 0, [], [], Counter()

    def declared(said: str, row) -> bool:
        of = meaning[row.question_type]
        if of.get(common.answer_label(said)) == of[common.answer_label(row.answer)]:
            return True
        option = re.sub(rf"^\s*{common.OPTION_LABEL}\s*", "", str(row.answer))  # "left" is enough for "(a) left"
        return row.question_type == "mcq" and common.answer_label(said) == common.answer_label(option)

    def ask(said: str, row, what: str) -> None:
        verdict = right(said, row)
        if verdict and declared(said, row):
            same.append([said, row.answer])
        elif verdict is None or verdict:
            called = "is left out" if verdict is None else "is called right"
            failures.append(f"{what} {called} where the answer is {row.answer!r}")

    squares = sum(len(vocabulary) ** 2 for vocabulary in by_type.values())
    for kind, vocabulary in by_type.items():
        texts = list(vocabulary)
        step = max(1, -(-squares // MOST_PAIRS))  # of very many answers a regular part
        for i, true in enumerate(texts):
            for said in texts[i % step :: step]:
                if said != true:
                    pairs += 1
                    ask(said, vocabulary[true], f"{kind}: {said!r}")
    # of each meaning one answer
    different = {kind: {meaning[kind][common.answer_label(x)]: x for x in texts} for kind, texts in by_type.items()}
    alike = defaultdict(list)  # rows that a scorer cannot tell apart are tried once, and counted
    for row in rows:
        alike[row.question_type, row.question, *forms(row)].append(row)
    for (kind, *_), part in alike.items():
        row, others = part[0], list(islice(different[kind].values(), MOST_TOGETHER))
        mine = meaning[kind][common.answer_label(row.answer)]
        others = [text for text in others if meaning[kind][common.answer_label(text)] != mine]
        # the right one in the middle: a text may be judged by how it begins, or by its conclusion
        together = [*others, row.answer, *others]
        tried = {"nothing": "", "spaces": " \n\t", "I don't know": "I don't know", "the question": row.question}
        tried |= {"all answers": " ".join(together), "all answers as a set": "; ".join(together)} if others else {}
        for name, said in tried.items():
            if not (common.answer_label(said) and declared(said, row)):  # or the data say that it is the answer
                probes[name] += len(part)
                ask(said, row, f"{row.id}: {name} ({said[:60]!r})")
    result = {"answers": sum(map(len, by_type.values())), "pairs": pairs, "declared": len(same), "same": same[:200]}
    return {**result, "probes": dict(probes), "failures": failures[:200], "failed": len(failures)}


def print_audit(audit: dict) -> None:
    """The audit's figures in a line, its failures in lines of their own."""
    for text in audit["failures"][:10]:
        print(f"scorer: {text}")
    probes = ", ".join(f"{n} x {name}" for name, n in audit["probes"].items())
    text = f"{audit['pairs']} pairs of {audit['answers']} answers, {audit['declared']} of them the same by declaration"
    print(f"scorer: {text}; tried as answers: {probes}; {audit['failed']} wrongly called right")


def read_synonyms(path: Path | None) -> list[list[str]]:
    """A line for each set of answers that mean the same, separated by tabs or |."""
    if path is None:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[word.strip() for word in line.replace("|", "\t").split("\t")] for line in lines if line.strip()]


# ------------------------------------------------------------------------------------------------------------
# 4  The gate: the same pictures, patients or questions in two splits, answers that contradict each other
# ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test")  # a later one may not repeat an earlier one
KINDS = (
    "same file",
    "near duplicate",
    "shared frames",
    "shared group",
    "conflict",
    "same question",
    "empty answer",
)
PICTURES = (".jpg", ".jpeg", ".png")
# Two pictures are one where both hold. Of the demo's frames, which share their background, copies (JPEG down to q30,
# half the size, brighter, mirrored) differ by at most 18 bits and 7 levels; different ones within 24 bits by 21 levels
BITS, OF_BITS = 24, 255
LEVELS = 10  # of 255, on average over a 64th of the picture, once brightness and contrast are the same
FLAT = 4  # levels: a picture whose greys deviate less (black, white) has a hash that is noise
TURNED = {  # how a copy may lie: what is done with its rows and columns
    "": (slice(None), slice(None)),
    "mirrored left to right": (slice(None), slice(None, None, -1)),
    "mirrored top to bottom": (slice(None, None, -1), slice(None)),
    "turned upside down": (slice(None, None, -1), slice(None, None, -1)),
}


def data_gate(folder: Path, rows, digests: dict[str, str] | None = None) -> dict:
    """What makes a test figure worthless, JSON-like: findings, counts of each kind, splits, threshold.

    A row has where, split, id, group (or groups), question, answer, question_type and media, names relative to
    `folder`; shown, also_right, history and turns where it has them. `digests` are sha256 of files that the caller
    has read already. A file that is not there is compared by its name, and counted as "not looked at".

    Only still pictures (JPEG, PNG, also the frames of a clip) are compared by how they look; volumes, recordings and
    animations are by their bytes, and so are pictures without structure: "flat" counts these. A copy that is cropped
    by some per cent, coloured otherwise or grey is not found; frames so blurred that only their dark corners are left
    look alike, and are called so.
    """
    rows = [row for row in rows if not getattr(row, "mirrored", False)]  # copies that training itself adds
    names = list(dict.fromkeys(name for row in rows for name in row.media))
    pictures = {name for row in rows for name in runtime.shown(row) if name.lower().endswith(PICTURES)}
    known = digests or {}

    def look(name: str) -> tuple:
        try:
            digest = known.get(name) or runtime.file_sha256(runtime.inside(folder, name))
            return digest, small_picture(folder, name) if name in pictures else None, True
        except (OSError, ValueError):  # whoever reads it for training says what is wrong with it
            return known.get(name), None, False

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        looked = dict(zip(names, runtime.progress(pool.map(look, names), desc="gate", total=len(names)), strict=True))
    content = {name: digest or name for name, (digest, _, _) in looked.items()}
    small = {content[name]: found for name, (_, found, _) in looked.items() if found is not None}
    structured = {key: found for key, found in small.items() if grey(found).std() >= FLAT}
    findings = [
        *same_files(rows, content),
        *near_duplicates(rows, content, structured),
        *shared_frames(rows, content),
        *shared_groups(rows),
        *repeated_questions(rows, content),
        *({"kind": "empty answer", "where": row.where, "text": f"the answer of {row.id} is {row.answer!r}"}
          for row in rows if common.says_nothing(row.answer)),
    ]  # fmt: skip
    findings.sort(key=lambda finding: KINDS.index(finding["kind"]))
    counts = dict.fromkeys(KINDS, 0) | Counter(finding["kind"] for finding in findings)
    counts |= {"not looked at": sum(not found for _, _, found in looked.values()), "flat": len(small) - len(structured)}
    splits = {split: describe_split([row for row in rows if row.split == split]) for split in SPLITS}
    return {
        "findings": findings,
        "counts": counts,
        "splits": {split: found for split, found in splits.items() if found["questions"]},
        "threshold": {"bits": BITS, "of_bits": OF_BITS, "levels": LEVELS},
    }


def print_gate(result: dict, most: int = 10) -> None:
    """A line a split, a line a finding (of each kind the first ten), and whether there are any."""
    for split, found in result["splits"].items():
        n = found["questions"]
        often = ", ".join(f"{answer!r} {count / n:.0%}" for answer, count in islice(found["answers"].items(), 3))
        text = f"{split}: {n} questions of {len(found['question_types'])} types, {found['files']} files, "
        text += f"{found['distinct_answers']} different answers, most often {often}"
        if found["single_class"]:
            text += f"; always the same answer to {', '.join(found['single_class'])}"
        print(text)
    counts = {kind: result["counts"][kind] for kind in KINDS if result["counts"][kind]}
    for kind, n in counts.items():
        for finding in islice((f for f in result["findings"] if f["kind"] == kind), most):
            print(f"{kind}: {finding['where']}: {finding['text']}")
        if n > most:
            print(f"{kind}: … and {n - most} more")
    if result["counts"]["not looked at"]:
        print(f"{result['counts']['not looked at']} files could not be opened: compared by name or bytes only")
    if result["counts"]["flat"]:
        print(f"{result['counts']['flat']} pictures are black, white or of one shade: compared by bytes only")
    total = sum(counts.values())
    listed = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    print(f"gate: {total} finding{'s' if total > 1 else ''} ({listed})" if total else "gate: no findings")


def describe_split(rows: list) -> dict:
    """How many questions, files, questions of each type, and which answers; single_class: types that have one only."""
    types, answers, by_type = Counter(), Counter(), defaultdict(set)
    for row in rows:
        types[row.question_type] += 1
        answers[shorten(row.answer)] += 1
        by_type[row.question_type].add(common.normalise(row.answer))
    return {
        "questions": len(rows),
        "files": len({name for row in rows for name in row.media}),
        "question_types": dict(sorted(types.items())),
        "answers": dict(answers.most_common(10)),
        "distinct_answers": len(set().union(*by_type.values())),
        "single_class": sorted(kind for kind, found in by_type.items() if len(found) == 1 and types[kind] > 1),
    }


def same_files(rows: list, content: dict[str, str]):
    """The same bytes (of files that are not there the same name) shown in a split and in an earlier one."""

    def files(row):
        return [(name, content[name]) for name in runtime.shown(row)]

    for row, name, key, first in repeated(rows, files):
        other = next(other for other, found in files(first) if found == key)
        text = f"{name} of {row.split} is {'also' if name == other else other} in {first.split} ({first.where})"
        if key == name:
            text += ", by its name; the file is not here"
        yield {"kind": "same file", "where": row.where, "text": text}


def shared_groups(rows: list):
    """A patient, video or procedure of two splits. A group that is just a file's or row's own name is no group."""

    def groups(row):
        named = getattr(row, "groups", None) or [row.group]
        return [(group, group) for group in named if group not in (*row.media, row.id)]

    for row, name, _, first in repeated(rows, groups):
        text = f"group {name} of {row.split} is also in {first.split} ({first.where})"
        yield {"kind": "shared group", "where": row.where, "text": text}


def repeated(rows: list, keys):
    """(row, name, key, first row) of each key of a split that an earlier split has too; keys(row) has (name, key)s."""
    first = {}
    for split in SPLITS:
        found = {}
        for row in (row for row in rows if row.split == split):
            for name, key in keys(row):
                found.setdefault(key, (row, name))
        yield from ((row, name, key, first[key]) for key, (row, name) in found.items() if key in first)
        first = {key: row for key, (row, _) in found.items()} | first


def shared_frames(rows: list, content: dict[str, str]):
    """How many clips of val and test show frames of earlier splits: some, or nothing else."""
    for split, found in runtime.overlaps(rows, content).items():
        clips = [row for row in rows if row.split == split and len(runtime.shown(row)) > 1]
        if clips and found["shared"]:
            text = f"{found['shared']} of {found['shown']} frames of {split} are in earlier splits too, in "
            text += f"{found['questions_touched']} of {found['questions']} questions, "
            text += f"{found['questions_contained']} of which show nothing else"
            yield {"kind": "shared frames", "where": clips[0].where.partition(":")[0], "text": text}


def repeated_questions(rows: list, content: dict[str, str]):
    """The same question asked of the same media after the same turns: a second time, or with another answer.

    Not of a text alone, where a greeting has many right replies; captions (no question) may differ, as descriptions do.
    """
    asked = defaultdict(list)  # what is asked -> [rows that agree], one list for each answer
    for row in rows:
        shown = tuple(content[name] for name in runtime.shown(row))
        if not shown or common.says_nothing(row.answer):
            continue
        before = [getattr(row, "history", None), getattr(row, "turns", None)]
        question = common.normalise(row.question)
        answers = asked[question, shown, json.dumps(before, default=str)]
        same = next((part for part in answers if agree(part[0], row)), None)
        what = f"{shorten(row.question)!r} of {runtime.shown(row)[0]}" + (" …" if len(shown) > 1 else "")
        if same:
            text = f"{what} is asked at {same[0].where}, too, with the same answer {shorten(row.answer)!r}"
            yield {"kind": "same question", "where": row.where, "text": text}
            same.append(row)
            continue
        if answers and question:
            other = answers[0][0]
            text = f"{what} is answered {shorten(row.answer)!r}, but {shorten(other.answer)!r} at {other.where}"
            yield {"kind": "conflict", "where": row.where, "text": text}
        answers.append([row])


def agree(one, other) -> bool:
    """Has the answer of one row a form that is right for the other?"""
    forms = [[row.answer, *getattr(row, "also_right", [])] for row in (one, other)]
    pairs = [(a, b) for a in forms[0] for b in forms[1] if not common.says_nothing(a) and not common.says_nothing(b)]
    # both ways: "(a) red" is answered rightly by "red", but not the other way round
    return any(common.score_answer(*p, one.question_type)["exact"] for a, b in pairs for p in ((a, b), (b, a)))


def shorten(text, longest: int = 80) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


# ------------------------------------------------------------------------------------------------------------
# Near duplicates: a hash of 255 bits finds candidates, two small pictures decide
# ------------------------------------------------------------------------------------------------------------


def small_picture(folder: Path, name: str) -> np.ndarray | None:
    """A JPEG or PNG as (32, 32, 3) bytes; None of an animation, or of more than 8 bits. Raises OSError, ValueError."""
    try:
        with Image.open(runtime.inside(folder, name), formats=["JPEG", "PNG"]) as image:
            if image.width * image.height > 50_000_000:
                raise ValueError("too large to be opened")
            if getattr(image, "n_frames", 1) > 1 or image.mode not in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK"):
                return None
            image.draft("RGB", (128, 128))  # a JPEG is decoded small, 1350 x 1080 in 4 ms instead of 16
            # an antialiasing filter that is symmetric: BOX is not, and a mirrored copy would differ
            picture = ImageOps.exif_transpose(image).convert("RGB").resize((32, 32), Image.Resampling.HAMMING)
            return np.asarray(picture)
    except Exception as error:  # damaged files make a decoder raise anything
        raise ValueError(f"{name}: {error}") from None


def grey(pictures: np.ndarray) -> np.ndarray:
    return pictures @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def perceptual_hash(pictures: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) → (n, 4) uint64: which of the 255 slowest waves of the grey picture are above their median."""
    k, x = np.arange(16)[:, None], np.arange(32)[None]
    waves = np.cos(np.pi * (2 * x + 1) * k / 64).astype(np.float32)  # rows of a cosine transform (16, 32)
    strength = (waves @ grey(pictures) @ waves.T).reshape(len(pictures), 256)
    above = strength > np.median(strength[:, 1:], axis=1, keepdims=True)
    above[:, 0] = False  # the mean says how bright it is, not what is to be seen
    return np.packbits(above, axis=1).view(np.uint64)


def near_duplicates(rows: list, content: dict[str, str], pictures: dict[str, np.ndarray]):
    """Each picture of a split that looks like one of an earlier split, and which; not those with the same bytes."""
    earlier = {}  # content -> (row, name)
    for split in SPLITS:
        later = {}
        for row in (row for row in rows if row.split == split):
            for name in runtime.shown(row):
                if content[name] in pictures and content[name] not in earlier:
                    later.setdefault(content[name], (row, name))
        for key, other, bits, turned in closest(earlier, later, pictures):
            (row, name), (first, first_name) = later[key], earlier[other]
            text = f"{name} of {split} looks like {first_name} of {first.split} ({first.where})"
            text += f", {turned}" * bool(turned) + f": {bits} of {OF_BITS} bits differ"
            yield {"kind": "near duplicate", "where": row.where, "text": text}
        earlier |= later


def closest(earlier: dict, later: dict, pictures: dict[str, np.ndarray]):
    """(later key, earlier key, differing bits, how it is turned) of each later picture that is an earlier one again."""
    if not earlier or not later:
        return
    old, new, ways = list(earlier), list(later), list(TURNED.values())
    old_words = hashes([pictures[key] for key in old]).T.copy()  # (4, old)
    new_words = np.stack([hashes([pictures[key][way] for key in new]) for way in ways], axis=1)  # (new, 4 ways, 4)
    step = max(1, 2**17 // len(old))  # pairs that fit into a processor's cache
    for start in range(0, len(new), step):
        words = new_words[start : start + step]
        # (new, 4 ways, old), a byte each: 255 is the most
        bits = sum(np.bitwise_count(words[:, :, i, None] ^ old_words[i]) for i in range(4))
        near = bits <= BITS
        for j in np.flatnonzero(near.any(axis=(1, 2))):
            turned, found = np.nonzero(near[j])
            order = np.argsort(bits[j, turned, found], kind="stable")[:256]  # of a still video there may be thousands
            for t, i in zip(turned[order], found[order], strict=True):
                if largest_difference(pictures[new[start + j]][ways[t]], pictures[old[i]]) <= LEVELS:
                    yield new[start + j], old[i], int(bits[j, t, i]), list(TURNED)[t]
                    break


def hashes(pictures: list[np.ndarray], step: int = 1000) -> np.ndarray:
    return np.concatenate([perceptual_hash(np.stack(pictures[i : i + step])) for i in range(0, len(pictures), step)])


def largest_difference(one: np.ndarray, other: np.ndarray) -> float:
    """How much the 64ths of two small pictures differ at most, in levels of any colour: a polyp is enough.

    Brightness and contrast are made the same first. The flatter is stretched, and cut at white, as a brighter copy is.
    """
    one, other = sorted((one.astype(np.float32), other.astype(np.float32)), key=np.std)
    inner = (np.minimum(one, other) > 4) & (np.maximum(one, other) < 250)  # what is cut says nothing about contrast
    if inner.sum() > 100:
        gain = np.clip(other[inner].std() / max(one[inner].std(), 1), 0.8, 1.5)
        one = np.clip(gain * (one - one[inner].mean()) + other[inner].mean(), 0, 255)
    return float(np.abs((one - other).reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))).max())


# ------------------------------------------------------------------------------------------------------------
# 5  Data folders, read without a model or a script
# ------------------------------------------------------------------------------------------------------------


@dataclass
class DataRow:
    where: str
    split: str
    id: str
    groups: list[str]
    question: str
    answer: object  # also what is none: the gate finds it
    also_right: list[str]
    question_type: str
    media: list[str]
    shown: list[str]  # without the recording of a question, which may be asked in two splits
    history: list = field(default_factory=list)

    @property
    def group(self) -> str:
        return self.groups[0]


SURGVIVQA = {split: f"{name}_multivideo.jsonl" for split, name in zip(SPLITS, ("train", "eval", "test"), strict=True)}
UMBRELLA = dict(zip(SPLITS, ("train", "validation", "test"), strict=True))


def read_folder(folder: Path) -> tuple[list[DataRow], list[Problem]]:
    """The questions of a data folder, whichever script it is for, and the lines that are none."""
    published = {split: folder / name for split, name in SURGVIVQA.items() if (folder / name).is_file()}
    folders = {split: sorted((folder / name).rglob("*.json")) for split, name in UMBRELLA.items()}
    if not published and not any(folder.glob("train.json*")) and any(folders.values()):
        found = ((s, str(path.relative_to(folder)), read_entry(path)) for s, paths in folders.items() for path in paths)
    else:
        files = published or runtime.data_files(folder)
        found = ((split, where, entry) for split, path in files.items() for where, entry in entries(path))
    return rows_of(folder, found)


def rows_of(folder: Path, found) -> tuple[list[DataRow], list[Problem]]:
    """The rows of (split, where, object or Problem), and what is wrong with the others."""
    rows, problems = [], []
    for split, where, entry in found:
        try:
            if isinstance(entry, Problem):
                problems.append(entry)
            elif "conversations" in entry:
                rows += list(conversation_rows(folder, where, split, entry))  # all or none
            else:
                rows.append(data_row(folder, where, split, entry, media_of(folder, where, entry)))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problems.append(Problem(where, None, f"not as rows are written ({error}); mend it"))
    return rows, problems


def entries(path: Path):
    """("train.jsonl:17", object or Problem) of every line, or listed conversation, of a file."""
    if path.suffix == ".json":
        listed = read_entry(path)
        if isinstance(listed, list):
            yield from ((f"{path.name}[{i}]", entry) for i, entry in enumerate(listed))
        else:
            wrong = Problem(path.name, None, "not a list of conversations; mend the file")
            yield path.name, listed if isinstance(listed, Problem) else wrong
        return
    lines, problems = runtime.read_jsonl(path)
    yield from ((problem.where, problem) for problem in problems)
    yield from lines


def read_entry(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Problem(path.name, None, f"not JSON ({error}); mend the file")


def data_row(folder: Path, where: str, split: str | None, entry: dict, media: list[str], history=()) -> DataRow:
    name = str(where if entry.get("id") in (None, "") else entry["id"])
    shown = [file for file in media if file != entry.get("audio")] or media
    named = [entry[key] for key in ("group", "video_id", "video") if entry.get(key) not in (None, "")]
    groups = [str(group) for group in entry.get("subject_ids") or named[:1]] or [shown[0] if shown else name]
    forms = [entry[key] for key in ("short_answer", "answer") if not common.says_nothing(entry.get(key))]
    question = without_marks(entry.get("question"))
    kind = entry.get("question_type") or (
        common.question_type(question) if question else "caption" if shown else "text"
    )
    return DataRow(
        where=where,
        split=split or runtime.split_of(groups[0]),
        id=f"{entry['video_id']}/{name}" if "_multivideo.jsonl:" in where and entry.get("video_id") else name,
        groups=groups,
        question=question,
        answer=forms[0] if forms else entry.get("answer"),
        also_right=[str(form) for form in forms[1:]],
        question_type=str(kind),
        media=media,
        shown=shown,
        history=list(history),
    )


def conversation_rows(folder: Path, where: str, split: str | None, entry: dict):
    """A row for each answer: LLaVA's turns (from, value) show all at first, UMBRELLA's (role, content) one by one."""
    pictures = entry.get("images") or []
    media = [] if pictures else media_of(folder, where, entry)
    turns = entry["conversations"]
    name = where.removesuffix(".json") if entry.get("id") in (None, "") else entry["id"]
    question, history, number = "", [], 0
    for i, turn in enumerate(turns):
        role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        text = without_marks(" ".join(str(part.get("text") or "") for part in parts if part.get("type") == "text"))
        for picture in islice(pictures, number, number + sum(part.get("type") == "image" for part in parts)):
            media = [*media, *media_of(folder, where, {"images": [picture]})]
            number += 1
        if role in ("gpt", "assistant"):
            task = entry.get("task_type") or entry.get("question_type")
            if task and i < len(turns) - 1:  # an acknowledgement, say: not what the task asks
                task = f"{task} turn {i}"
            turn = f" turn {i}" if i < len(turns) - 1 else ""
            row = {**entry, "id": f"{name}{turn}", "question": question, "answer": text}
            row |= {"question_type": task, "short_answer": None}
            yield data_row(folder, f"{where}{turn}", split, row, media, history)
        elif role in ("human", "user"):
            question = text
        history = [*history, (role, text)]


def without_marks(text) -> str:
    """A question without the marks of what is shown, which may stand before it or after."""
    return re.sub(r"<(?:image|video)>", " ", str(text or "")).strip()


def media_of(folder: Path, where: str, entry: dict) -> list[str]:
    """The files that a row names, in the order in which they are shown; a folder stands for the files in it."""
    found = []
    image = next((str(entry[f]) for f in ("image", "image_filename", "image_id", "img_id") if entry.get(f)), None)
    if image:
        found.append(runtime.find_image(folder, image))
    frames = entry.get("frames") or []
    for frame in frames if isinstance(frames, list) else [frames]:
        places = [f"frames/{entry.get('video_id')}/{frame}{ending}" for ending in ("", *PICTURES)]
        published = "_multivideo.jsonl:" in where
        found.append(next((place for place in places if published and (folder / place).is_file()), str(frame)))
    listed = entry.get("images") or []
    for one in [*(listed if isinstance(listed, list) else [listed]), entry.get("volume"), entry.get("video")]:
        path = one.get("path", one.get("volume")) if isinstance(one, dict) else one
        if path:
            found += files_in(folder, str(path))
    return found + ([str(entry["audio"])] if entry.get("audio") else [])


def files_in(folder: Path, name: str) -> list[str]:
    """The name itself, or the files of the folder that it is: frame_2 before frame_10."""
    with suppress(OSError):  # a name too long for any file
        if (folder / name).is_dir():
            files = [path.name for path in (folder / name).iterdir() if not path.name.startswith(".")]
            numbered = [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", file)] for file in files]
            return [f"{name}/{file}" for _, file in sorted(zip(numbered, files, strict=True))]
    return [name]


# ------------------------------------------------------------------------------------------------------------
# 6  Writing
# ------------------------------------------------------------------------------------------------------------

MOST_SHOWN = 20_000  # answers in the gallery
MEDIA_BYTES = 8_000_000  # of thumbnails and sounds in a page


def add_blind_runs(run: dict, found: dict) -> None:
    """Put what the same model answered without seeing into found["blind"], where RUN/blind has it."""
    for mode in ("blank", "shuffled"):
        folder = run["folder"] / "blind" / mode
        if (folder / "predictions.jsonl").is_file():
            answered = read_json(folder / "results.json")
            records = {r["id"]: r for r in read_records(folder / "predictions.jsonl")}
            other = {"name": mode, "records": [records[r["id"]] for r in run["records"] if r["id"] in records]}
            paired = compare(run, other)
            changed = [name for name in ANSWERED if answered.get(name) != run[name]]
            if changed or not paired:
                what = f"with another {changed[0]}" if changed else "other questions"
                found["notes"].append(f"{mode}: was answered {what}; repeat it with --blind-runs")
                continue
            numbers = summarise_run(other)["all"]
            entry = {"n": paired["n"], "exact": numbers["exact"], "interval": numbers["interval"]}
            entry |= {"difference": paired["all"]["difference"], "difference_interval": paired["all"]["interval"]}
            found["blind"][mode] = entry
            if (folder / "predictions.jsonl").stat().st_mtime < (run["folder"] / "predictions.jsonl").stat().st_mtime:
                found["notes"].append(f"{mode}: answered before the run's last answers; repeat it with --blind-runs")
            if paired["n"] < found["n"]:
                found["notes"].append(f"{mode}: {paired['n']} of {found['n']} questions could be asked so")


ANSWERED = ("split", "decode", "max_answer_tokens", "limit")  # the same for a run and for its blind runs


def start_blind_runs(run: dict) -> None:
    """Let the run's own script answer again, with nothing to see and with another group's media."""
    script = Path(__file__).with_name(run["script"] or "no script")
    if not script.is_file() or run["split"] is None:
        text = f"config.json names {run['script']!r} and results.json the split {run['split']!r}"
        raise SystemExit(f"{run['name']}: {text}; answer again first, with a script beside report.py")
    if run["settings"].get("overfit"):
        raise SystemExit(f"{run['name']} learned rows by heart: there is nothing to compare with")
    for mode in ("blank", "shuffled"):
        again = ["--eval-only", "--resume", "auto", "--out", run["folder"], "--blind", mode, "--data", run["data"]]
        again += [x for name in ANSWERED[1:] if run[name] for x in (f"--{name.replace('_', '-')}", run[name])]
        command = [sys.executable, script, *run["argv"], *again, "--eval-split", run["split"]]
        command = [str(word) for word in command]
        print(f"--blind {mode}: {' '.join(command)}", flush=True)
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{run['name']}: --blind {mode} did not answer; its own message says why")


def write(runs: list[dict], out: Path, audit: dict | None = None) -> dict:
    """report.html, results.json and the figures of one or several runs, into the folder `out`."""
    found = [summarise_run(run) for run in runs]
    for run, numbers in zip(runs, found, strict=True):
        if "folder" in run:
            add_blind_runs(run, numbers)
    compared = [compare(a, b) for a, b in combinations(runs, 2)]
    result = {
        "title": ", ".join(run["name"] for run in runs),
        "runs": found,
        "comparisons": [pair for pair in compared if pair],
        "seeds": seeds_of(runs, found),
        "audit": audit or worst(runs),
        "gate": next(({**run["gate"], "run": run["name"]} for run in runs if run.get("gate")), None),
    }
    gallery, media, faults = [], [], []
    for number, run in enumerate(runs):
        records = run["records"][: MOST_SHOWN // len(runs)]
        left = len(run["records"]) - len(records)
        faults += [f"{left:,} answers of {run['name']}: the page would be too large"] if left else []
        thumbs, shown, missing = report_page.thumbnails(run.get("data"), records, MEDIA_BYTES // len(runs))
        for record, indices in zip(records, shown, strict=True):
            kept = ("id", "question", "answer", "also_right", "prediction", "correct", "tolerant")
            entry = {name: record[name] for name in kept if name in record}
            entry |= {"run": number, "type": record["question_type"], "media": [len(media) + i for i in indices]}
            gallery.append(entry | {"p": probability(record)})
        media += thumbs
        faults += missing
    masks = [{"run": run["name"], **run["mask"]} for run in runs if run.get("mask")]
    figures = report_page.draw_figures(result, {run["name"]: run.get("metrics", []) for run in runs})
    with runtime.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        report_page.write_figures(out, figures)
    runtime.write_json(out / "results.json", result)
    runtime.write_text(out / "report.html", report_page.page(result, gallery, media, masks, figures, faults))
    return result


def probability(record: dict) -> float | None:
    """Of what is said, where it is a candidate in its own words, or the right one in others."""
    chances, said = record.get("probabilities") or {}, record["prediction"]
    if said not in chances and record["correct"] and record.get("candidates"):
        said = common.true_candidate(record)
    return chances.get(said)


def worst(runs: list[dict]) -> dict | None:
    """Of the audits that scripts made of their own scorers the one with most failures."""
    audits = [{**run["audit"], "run": run["name"]} for run in runs if run.get("audit")]
    return max(audits, key=lambda audit: audit["failed"], default=None)


def write_report(folder: Path) -> None:
    """RUN/report, for a script that has answered. What fails here is said, but fails no run: its results are saved."""
    try:
        write([read_run(folder)], folder / "report")
        print(f"the report is {folder / 'report' / 'report.html'}")
    except (Exception, SystemExit):
        traceback.print_exc()
        print(f"no report was written; python report.py {folder} tries again")


def print_result(result: dict) -> None:
    """The tables of all runs, and what differs between them."""
    for run in result["runs"]:
        print(f"\n{run['name']}: {run['n']} questions")
        print(common.results_table(run))
        for note in run["notes"]:
            print(note)
        best = run["all"]["above_floor_interval"]
        if best and best[0] <= 0:
            print("NOT above its best blind floor: the interval of the difference is not above zero")
        for mode, entry in run["blind"].items():
            seen = f"seeing adds {difference_text(entry, 'difference_')}"
            print(f"{mode} media: {entry['exact']:.1%} of {entry['n']} questions; {seen}")
        if "calibration" in run["all"]:
            print(f"expected calibration error {run['all']['calibration']['ece']:.3f}")
    for pair in result["comparisons"]:
        print(f"\n{pair['a']} less {pair['b']}, {pair['n']} questions: {difference_text(pair['all'])}")
    for part in result["seeds"]:
        entry = part["all"]
        text = (
            f"{entry['mean']:.1%} ± {entry['sd']:.1%} (standard deviation), {entry['least']:.1%} – {entry['most']:.1%}"
        )
        print(f"\n{len(part['seeds'])} seeds: {text}")


def difference_text(entry: dict, prefix: str = "") -> str:
    low_high = entry[f"{prefix}interval"]
    return f"{entry['difference']:+.1%}" + (" ({:+.1%} – {:+.1%})".format(*low_high) if low_high else " (one group)")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN/report; of several runs required)")
    parser.add_argument("--blind-runs", action="store_true", help="let each run's script answer without seeing, too")
    parser.add_argument("--predictions", type=Path, help="predictions of another program, JSON lines")
    parser.add_argument("--test", type=Path, help="the rows they answer, in any layout that the scripts read")
    parser.add_argument("--train", type=Path, help="the rows of training: without them there are no blind floors")
    parser.add_argument("--fields", default="", metavar="NAME=THEIRS,…", help="fields of --predictions: id, prediction")
    parser.add_argument(
        "--synonyms", type=Path, help="answers that the audit may find right for each other, a line each"
    )
    parser.add_argument("--data", type=Path, help="data folder: the gate alone")
    args = parser.parse_args(argv)
    if (args.data is not None) + bool(args.runs) + (args.predictions is not None) != 1:
        parser.error("give run folders, or --predictions, or --data")
    if args.predictions and not args.test:
        parser.error("--predictions needs --test, the rows that they answer")
    if args.blind_runs and not args.runs:
        parser.error("--blind-runs needs run folders, whose models are at hand")
    if not args.data and not args.out:
        if len(args.runs) != 1:
            parser.error("--out required")
        args.out = args.runs[0] / "report"
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.data:
        rows, problems = read_folder(args.data)
        for problem in problems:
            print(f"fault: {problem}")
        found = data_gate(args.data, rows)
        print_gate(found)
        if args.out:
            runtime.write_json(args.out / "results.json", {"gate": found, "faults": list(map(str, problems))})
        raise SystemExit(1 if found["findings"] or problems else 0)
    if args.predictions:
        test, train = read_rows(args.test, "test"), read_rows(args.train, "train") if args.train else []
        run = read_predictions(args.predictions, test, train, read_fields(args.fields))
        audit = audit_scorer(lambda said, row: score(said, row)["exact"], test + train, read_synonyms(args.synonyms))
        runs = [{**run, "data": args.test.parent, "split": "test", "gate": data_gate(args.test.parent, train + test)}]
        print_gate(runs[0]["gate"])
    else:
        runs = [read_run(folder) for folder in dict.fromkeys(args.runs)]
        for run in runs if args.blind_runs else []:
            start_blind_runs(run)
        audit = worst(runs)
    result = write(runs, args.out, audit)
    print_result(result)
    if audit is None:
        print("scorer: not audited by this run's script; its --check does that")
    else:
        print_audit(audit)
    print(f"wrote {args.out / 'report.html'}")
    if audit and audit["failed"]:
        raise SystemExit("the scorer calls wrong answers right: mend it, or declare what means the same in --synonyms")


if __name__ == "__main__":
    main()

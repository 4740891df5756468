"""The data check before every run: each file is opened, each example built and decoded again, all faults are listed.

It stands above the rooms: it asks the task (inputs/task.py), common.build_trees, which checks every example's tokens,
the leakage check and the scorer's audit of report/, and writes check.json. No weights are read before it has passed.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
from inputs import show
from inputs.files import SPLITS, file_sha256
from inputs.task import Example, Problem, Task
from report import audit, leakage, scoring
from runtime import ranks
from runtime.files import progress, write_json
from runtime.show import coloured


def check(examples: list[Example], problems: list[Problem], task: Task, run) -> tuple[dict, dict]:
    """({split: examples}, {split: prompt trees}) of what can be used; ends with all faults at once, unless --skip-bad.

    Afterwards task.measured holds what the task counts tokens from.
    """
    args, data = run.args, Path(run.args.data)
    found, task.measured, digests = check_media(data, examples, task.measure)
    scorer = ranks.on_first_rank(lambda: audit.audit_scorer(lambda s, e: task.score(s, e)["exact"], examples))
    leaks = ranks.on_first_rank(lambda: leakage.check(data, examples, digests))
    shared = leakage.overlaps(examples, digests)
    splits, trees, wrong = build(examples, problems + found, task)
    counts = {split: count(splits[split], trees[split]) for split in SPLITS}
    result = {"splits": counts, "shared_with_earlier_splits": shared, **task.report}
    result |= first_example(splits, trees, task) | {"scorer": scorer, "leakage": leaks}
    for split, numbers in counts.items():
        shown = [f"{n:,} {name.replace('_', ' ')}" for name, n in numbers.items() if name != "question_types"]
        print(f"{split}: {', '.join(shown)}")
    for tree in (trees["train"] or trees[args.eval_split])[:2]:
        show.print_supervised(task.tokenizer, tree)
    audit.print_audit(scorer)
    leakage.print_result(leaks)
    fatal = task.faults + [Problem("scorer", None, f"{text}; correct Task.score") for text in scorer["failures"]]
    folder = Path(args.out, "blind", args.blind) if args.blind else Path(args.out)
    settle(folder / "check.json", result, fatal, problems + found + wrong, args.skip_bad)
    refuse_empty({item.split for item in (*examples, *problems)}, splits, args)
    if args.overfit:
        splits = dict.fromkeys(splits, splits["train"][: args.overfit])
        trees = {split: common.build_trees(part, task)[0] for split, part in splits.items()}
    if args.check:
        show.print_tokens(**result["example"], paint=coloured)
        print("check passed")
    return splits, trees


def check_media(data: Path, examples: list[Example], measure) -> tuple[list[Problem], dict, dict]:
    """Open every file once; the same bytes or group in two splits is a fault too.

    measure(data, name) is Task.measure. Returned are the faults, {name: what it measured}, and {name: sha256} of what
    could be read.
    """
    names = list(dict.fromkeys(name for example in examples for name in example.media))

    def look(name: str) -> tuple:
        try:
            return None, measure(data, name), file_sha256(data, name)
        except ValueError as error:
            return str(error), None, None

    mine = names[ranks.rank() :: ranks.ranks()]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoding runs outside Python's lock
        looked = progress(pool.map(look, mine), desc="media", total=len(mine), unit="file")
        seen = {k: v for part in ranks.gather(dict(zip(mine, looked, strict=True))) for k, v in part.items()}
    problems, first = [], {}
    for example in examples:
        broken = [seen[name][0] for name in example.media if seen[name][0]]
        shared = [("group", group, group) for group in example.groups]
        shared += [("file", name, seen[name][2]) for name in example.shown]
        for what, name, key in shared if not broken else []:
            other = first.setdefault((what, key), example)
            if other.split != example.split:
                text = f"{what} {name} of {example.split} is also in {other.split} ({other.where})"
                broken.append(f"{text}; keep it in one split")
        if broken:
            problems.append(Problem(example.where, example.id, "; ".join(broken)))
    digests = {name: found[2] for name, found in seen.items() if not found[0]}
    return problems, {name: found[1] for name, found in seen.items()}, digests


def build(examples: list[Example], faults: list[Problem], task: Task) -> tuple[dict, dict, list[Problem]]:
    """{split: examples} and {split: trees} of the examples without faults, and the faults of those that have some."""
    bad = {problem.where for problem in faults}
    splits, trees, wrong = {}, {}, []
    for split in SPLITS:
        part = [example for example in examples if example.split == split and example.where not in bad]
        trees[split], texts = common.build_trees(part, task)
        wrong += [Problem(e.where, e.id, texts[e.where]) for e in part if e.where in texts]
        splits[split] = [example for example in part if example.where not in texts]
    return splits, trees, wrong


def count(examples: list[Example], trees: list[common.Prompt]) -> dict:
    return {
        "questions": len(examples),
        "files": len({name for example in examples for name in example.media}),
        "tokens": sum(map(len, trees)),
        "supervised_tokens": sum(tree.supervised() for tree in trees),
        "question_types": dict(Counter(example.question_type for example in examples)),
        "not_among_candidates": sum(not scoring.answerable(example) for example in examples),
    }


def first_example(splits: dict, trees: dict, task: Task) -> dict:
    """{"example": …}: the first one as the model sees it, token by token, for check.json and the report's page."""
    for split in SPLITS:
        if trees[split]:
            tree = trees[split][0]
            example = next(example for example in splits[split] if example.id == tree.ids[0])
            tokens = show.tokens(task.tokenizer, tree.prefix, *tree.branches[0], list(task.placeholders(example)))
            return {"example": {"id": example.id, "tokens": tokens}}
    return {}


def settle(path: Path, result: dict, fatal: list[Problem], faults: list[Problem], skip_bad: bool) -> None:
    """Write check.json and print the faults; ends the program unless there are none or --skip-bad leaves them out.

    `fatal` are the checkpoint's and the scorer's faults, which no example can be left out for.
    """
    show.print_faults([*fatal, *faults])
    left_out = faults if skip_bad and not fatal else []
    failures, skipped = [] if left_out else [*fatal, *faults], sorted({problem.where for problem in left_out})
    outcome = {"failures": list(map(str, failures)), "skipped": skipped, "skipped_because": list(map(str, left_out))}
    write_json(path, {"passed": not failures, **result, **outcome})
    if failures:  # on every rank; the first prints them
        text = f"{len(failures)} faults, listed in {path}"
        text += "; --skip-bad leaves examples with faults out, by name" if faults and not fatal else ""
        raise SystemExit(text if ranks.rank() == 0 else 1)
    if skipped:
        used = sum(numbers["questions"] for numbers in result["splits"].values())
        print(f"--skip-bad leaves out {len(skipped)} of {used + len(skipped)} examples, listed in {path}")


def refuse_empty(known: set, splits: dict, args) -> None:
    """Ends where nothing is left to train on or to answer, or of a split that the data has (`known`)."""
    if not any(splits.values()) or not (splits["train"] or args.eval_only or args.check):
        raise SystemExit(
            f"--data {args.data}: no {'' if args.eval_only or args.check else 'training '}examples are left"
        )
    for split in known - {None}:
        if not splits[split]:
            raise SystemExit(f"--skip-bad would leave out all of {split}; fix its examples")
    if args.eval_only and not splits[args.eval_split]:
        raise SystemExit(f"--eval-split {args.eval_split}: the data has no such examples")
    if not (args.check or splits[args.eval_split]):
        print(f"--eval-split {args.eval_split}: no examples, so nothing will be answered")


def overfit(loss: float, figures: dict) -> None:
    """The verdict of --overfit: exit code 1 unless every answer that was trained on is right."""
    wrong = round((1 - figures["micro"]["exact"]) * figures["micro"]["n"])
    print(f"overfit: loss {loss:.4f}, {wrong} answers wrong (must be none)")
    if wrong:
        raise SystemExit(1)

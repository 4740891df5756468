"""The proof that stands before every run: each file opened, each row built and decoded again, faults listed at once."""
from collections import Counter
from pathlib import Path

import common
from _old import common as _common
from _old import report as _report
from _old import runtime as _old

from .task import Problem


def check(rows, problems, task, run):
    args, data = run.args, Path(run.args.data)
    found, task.measured, digests = _old.check_media(data, rows, task.measure)
    faults = problems + found
    shared = _old.overlaps(rows, digests)
    _old.print_overlaps(shared)
    scorer = _old.on_first_rank(lambda: _report.audit_scorer(lambda said, row: task.score(said, row)["exact"], rows))
    _report.print_audit(scorer)
    fatal = task.faults + [Problem("scorer", None, f"{failure}; mend `score`") for failure in scorer["failures"]]
    splits, trees, counts = {}, {}, {}
    for split in ("train", "val", "test"):
        bad = {p.where for p in faults}
        part = [row for row in rows if row.split == split and row.where not in bad]
        trees[split], wrong = common.build_trees(part, task)
        faults += [Problem(row.where, row.id, wrong[row.where]) for row in part if row.where in wrong]
        splits[split] = [row for row in part if row.where not in wrong]
        counts[split] = {
            "questions": len(splits[split]),
            "files": len({name for row in splits[split] for name in row.media}),
            "tokens": sum(len(tree) for tree in trees[split]),
            "learned_tokens": sum(tree.supervised() for tree in trees[split]),
            "question_types": dict(Counter(row.question_type for row in splits[split])),
            "not_among_candidates": sum(not _common.answerable(vars(row)) for row in splits[split]),
        }
        print(f"{split}: " + ", ".join(f"{n} {name}" for name, n in counts[split].items() if isinstance(n, int)))
    for tree in (trees["train"] or trees[args.eval_split])[:5]:
        _old.print_learned(task.tokenizer, tree.ids[0], tree.prefix, *tree.branches[0])
    proof = {"splits": counts, "shared_with_earlier_splits": shared, **task.report}
    first = next((tree for part in trees.values() for tree in part), None)
    if first:
        row = next(row for part in splits.values() for row in part if row.id == first.ids[0])
        tokens = _old.row_tokens(task.tokenizer, first.prefix, *first.branches[0], list(task.placeholders(row)))
        proof |= {"row": {"id": first.ids[0], "tokens": tokens}}
    proof |= {"scorer": scorer, "gate": _old.on_first_rank(lambda: _report.data_gate(data, rows, digests))}
    _report.print_gate(proof["gate"])
    place = Path(args.out, "blind", args.blind) if args.blind else Path(args.out)
    _old.report_check(place / "check.json", proof, fatal, faults, args.skip_bad)
    if not (splits["train"] or args.eval_only or args.check):
        raise SystemExit(f"--data {data}: no training rows")
    if args.eval_only and not splits[args.eval_split]:
        raise SystemExit(f"--eval-split {args.eval_split}: the data has no such rows")
    if args.overfit:
        splits = dict.fromkeys(splits, splits["train"][: args.overfit])
        trees = {s: common.build_trees(part, task)[0] for s, part in splits.items()}
    if args.check:
        _old.print_row(**proof["row"])
        print("check passed")
    return splits, trees


def overfit(loss, results):
    wrong = round((1 - results["micro"]["exact"]) * results["micro"]["n"])
    print(f"overfit: loss {loss:.4f}, {wrong} answers wrong (must be none)")
    if wrong:
        raise SystemExit(1)

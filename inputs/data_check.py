"""The data check before every run: each example is built and decoded again, each file opened, all faults are listed.

It stands above the rooms: it asks the task (inputs/task.py), building.build_trees, which checks every example's tokens,
the leakage check and the scorer's audit of report/, and writes check.json; what it found of files that have not changed
is kept (check_cache.py). No weights are read before it has passed.
"""

import json
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import common
from inputs import check_cache, images, prompts, show, sound, videos
from inputs.building import build_trees
from inputs.files import SPLITS, file_sha256
from inputs.task import Example, Problem, Task
from report import audit, leakage, scoring
from runtime import ranks
from runtime.files import fingerprint, in_threads, write_json


def check(examples: list[Example], problems: list[Problem], task: Task, run) -> tuple[dict, dict]:
    """({split: examples}, {split: prompt trees}) of what can be used; ends with all faults at once, unless --skip-bad.

    Afterwards task.measured holds what the task counts tokens from, and run.same["media"] is a digest of all files that
    are trained on: of their bytes, because a mirrored scan is the same content.
    """
    args, data = run.args, Path(run.args.media_root)
    settings = {name: getattr(args, name) for name in ("model", *run.own)}
    of = ranks.on_first_rank(lambda: check_cache.key(data, examples, settings))
    kept = None if args.check else check_cache.read(Path(args.out), of)
    kept = None if ranks.any_rank(kept is None) else kept
    seen = kept["seen"] if kept else open_media(data, examples, task.measure)
    found, task.measured, contents, digests = check_media(examples, seen)
    task.report |= images.summary(task.measured, task.processor)
    task.report |= sound.list_quiet(task.measured)
    if kept:
        scorer, leaks = kept["scorer"], kept["leakage"]
        print(f"files, leakage and scorer: as checked before, nothing has changed since ({check_cache.NAME})")
    else:
        scorer = ranks.on_first_rank(lambda: audit.audit_scorer(lambda s, e: task.score(s, e)["exact"], examples))
        leaks = ranks.on_first_rank(lambda: leakage.check(data, examples, contents))
    shared = leakage.overlaps(examples, contents)
    splits, trees, wrong = build(examples, problems + found, task)
    counts = {split: count(splits[split], trees[split]) for split in SPLITS}
    result = {"splits": counts, "shared_with_earlier_splits": shared, **task.report}
    result |= first_example(splits, trees, task) | {"scorer": scorer, "leakage": leaks} | fields(examples)
    for split, numbers in counts.items():
        shown = [f"{n:,} {name.replace('_', ' ')}" for name, n in numbers.items() if name != "question_types"]
        print(f"{split}: {', '.join(shown)}")
    show.print_unanswerable([example for part in splits.values() for example in part])
    for tree in (trees["train"] or trees[args.eval_split])[:2]:
        show.print_supervised(task.tokenizer, tree)
    print(f"prompt: {result.get('prompt', 'none')}")
    audit.print_audit(scorer)
    leakage.print_result(leaks)
    notices = [Problem(example.where, example.id, example.notice) for example in examples if example.notice]
    show.print_faults(notices, "notice")
    result["notices"] = list(map(str, notices))
    fatal = task.faults + [Problem("scorer", None, f"{text}; correct Task.score") for text in scorer["failures"]]
    folder = Path(args.out, "blind", args.blind) if args.blind else Path(args.out)
    gone = left_out(examples, problems + found + wrong, splits)
    task.report["left_out"] = {split: gone[split][0] for split in SPLITS if split in gone}
    settle(folder / "check.json", result, fatal, problems + found + wrong, gone, args.skip_bad)
    unread = leaks["counts"]["not looked at"] or any(fault for fault, *_ in seen.values())
    if not kept and not unread:  # it may be read the next time, by another machine
        check_cache.write(Path(args.out), of, seen=seen, scorer=scorer, leakage=leaks)
    refuse_empty({item.split for item in (*examples, *problems)}, splits, args)
    if args.overfit:
        splits = dict.fromkeys(splits, splits["train"][: args.overfit])
        trees = {split: build_trees(part, task)[0] for split, part in splits.items()}
    trained = sorted({name for example in splits["train"] for name in example.media})
    run.same["media"] = fingerprint((name, digests[name]) for name in trained)
    if args.check:
        show.print_tokens(**result["example"])
        print("check passed")
    return splits, trees


def open_media(data: Path, examples: list[Example], measure) -> dict[str, list]:
    """{file name: (its fault or None, what `measure` (Task.measure) found, its content, its SHA-256)} of every file."""
    names = list(dict.fromkeys(name for example in examples for name in example.media))

    def look(name: str) -> tuple:
        try:
            found = measure(data, name)
            digest = file_sha256(data, name)  # it is in memory now
        except ValueError as error:
            return str(error), None, None, None
        with suppress(TypeError):
            if isinstance(found, tuple) and [type(part) for part in found[1:]] == [str]:
                return None, *json.loads(json.dumps(found)), digest  # as a restart reads it
        raise SystemExit("Task.measure must return, JSON-like, what tokens are counted from and a content; see Task")

    mine = in_threads(look, names[ranks.rank() :: ranks.ranks()], desc="media", unit="file")
    return {name: found for part in ranks.gather(mine) for name, found in part.items()}


def check_media(examples: list[Example], seen: dict) -> tuple[list[Problem], dict, dict, dict]:
    """The faults that open_media has `seen`; the same content or group in two splits, a recording of two questions.

    Returns them and, by file name, what Task.measure found; for readable files, content and SHA-256.
    """
    problems, first = [], {}
    for example in examples:
        broken = [seen[name][0] for name in example.media if seen[name][0]]
        shared = [("video file" if videos.in_file(group) else "group", group, group) for group in example.groups]
        shared += [("file", name, seen[name][2]) for name in example.shown]
        for what, name, key in shared if not broken else []:
            other, same = first.setdefault((what, key), (example, name))
            if other.split != example.split:
                field = (what == "group" and example.grouped) or what  # patient_id
                text = f"{field} {name} of {example.split} "
                text += f"is also in {other.split}" if name == same else f"shows the same as {same} of {other.split}"
                remedy = "keep it in one split" + ("" if field == what else ", or name the patient as group")
                broken.append(f"{text} ({other.where}); {remedy}")
        if broken:
            problems.append(Problem(example.where, example.id, "; ".join(broken)))
    contents = {name: found[2] for name, found in seen.items() if not found[0]}
    problems += two_questions(examples, contents)
    digests = {name: found[3] for name, found in seen.items()}
    return problems, {name: found[1] for name, found in seen.items()}, contents, digests


def two_questions(examples: list[Example], contents: dict[str, str]) -> list[Problem]:
    """Faults of the examples whose recording is also that of another question, under any name: it speaks only one."""
    heard = [(e, name) for e in examples for name in e.media if name not in e.shown]
    spoken, problems = defaultdict(dict), []  # content -> question -> (the first example that asks it, its recording)
    for example, name in heard:
        spoken[contents.get(name, name)].setdefault(scoring.normalise(example.question), (example, name))
    for example, name in heard:
        questions, asked = spoken[contents.get(name, name)], scoring.normalise(example.question)
        for other, same in [found for question, found in questions.items() if question != asked][:1]:
            text = f"{name} is {'also' if name == same else 'the same as ' + same + ','} the recording of another"
            text += f" question, {other.question!r} ({other.where}); record each, and name it in the example's audio"
            problems.append(Problem(example.where, example.id, text))
    return problems


def build(examples: list[Example], faults: list[Problem], task: Task) -> tuple[dict, dict, list[Problem]]:
    """{split: examples} and {split: trees} of the examples without faults, and the faults of those that have some."""
    bad = {problem.where for problem in faults}
    splits, trees, wrong = {}, {}, []
    for split in SPLITS:
        part = [example for example in examples if example.split == split and example.where not in bad]
        trees[split], texts = build_trees(part, task)
        wrong += [Problem(e.where, e.id, texts[e.where]) for e in part if e.where in texts]
        splits[split] = [example for example in part if example.where not in texts]
    return splits, trees, wrong


def count(examples: list[Example], trees: list[common.Prompt]) -> dict:
    return {
        "questions": len(examples),
        "showing_nothing": sum(not example.media for example in examples),
        "files": len({name for example in examples for name in example.media}),
        "tokens": sum(len(common.join_turns(tree)) for tree in trees),
        "supervised_tokens": sum(tree.supervised() for tree in trees),
        "question_types": dict(Counter(example.question_type for example in examples)),
        "not_among_candidates": sum(not scoring.answerable(example) for example in examples),
    }


def first_example(splits: dict, trees: dict, task: Task) -> dict:
    """{"example", "prompt"}: the first one as the model sees it, token by token, and as it is asked elsewhere."""
    for split in SPLITS:
        if trees[split]:
            tree = trees[split][0]
            example = next(example for example in splits[split] if example.id == tree.ids[0])
            tokens = show.tokens(task.tokenizer, tree.prefix, *tree.branches[0], list(task.placeholders(example)))
            return {"example": {"id": example.id, "tokens": tokens}, "prompt": prompts.prove(task, example, tree)}
    return {}


def fields(examples: list[Example]) -> dict:
    """{"unread": {field: in how many examples}, "grouped": {field, or "": …}}, printed where there is something to say.

    Where no example names a group, each medium is taken as independent: intervals and splits know of no patient.
    """
    unread = Counter(name for example in examples for name in example.unread)
    grouped, media = Counter(example.grouped or "" for example in examples), "the medium itself"
    if unread:
        print(f"fields not read: {', '.join(f'{name} ({n:,} examples)' for name, n in unread.most_common())}")
    if set(grouped) == {""}:
        print("no example names a group (such as patient_id): each medium is taken as independent, and a patient may")
        print("stand in two splits")
    elif set(grouped) - {"group", ""}:
        print(f"groups: {', '.join(f'{name or media} ({n:,} examples)' for name, n in grouped.items())}")
    return {"unread": dict(unread), "grouped": dict(grouped)}


def left_out(examples: list[Example], faults: list[Problem], splits: dict) -> dict[str, tuple[int, int]]:
    """{split or question type: (how many examples --skip-bad leaves out, of how many)}, the largest share first."""
    known = {example.where: (example.split, example.question_type) for example in examples}
    gone = {problem.where: known.get(problem.where, (problem.split, problem.kind)) for problem in faults}
    used = Counter(name for part in splits.values() for example in part for name in known[example.where])
    lost = Counter(name for names in gone.values() for name in names if name)
    found = {name: (n, n + used[name]) for name, n in lost.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0] / item[1][1]))


def settle(path: Path, result: dict, fatal: list, faults: list, gone: dict, skip_bad: float | None) -> None:
    """Write check.json and print the faults; ends the program unless there are none or --skip-bad leaves them out.

    `fatal` are the checkpoint's and the scorer's faults, which no example can be left out for; nor can one for a file
    that cannot be read. `skip_bad` is the largest share of a split or a question type that may go (see left_out).
    """
    show.print_faults([*fatal, *faults])
    fatal = [*fatal, *(problem for problem in faults if problem.fatal)]
    shares = [f"{n} of {total} {name} ({n / total:.1%})" for name, (n, total) in gone.items()]
    lost, total = next(iter(gone.values()), (0, 1))
    much = skip_bad is not None and lost / total > skip_bad
    skipped = faults if skip_bad is not None and not (fatal or much) else []
    failures = [] if skipped else [*fatal, *(problem for problem in faults if not problem.fatal)]
    outcome = {"failures": list(map(str, failures)), "skipped_because": list(map(str, skipped))}
    outcome |= {"skipped": sorted({problem.where for problem in skipped}), "left_out": gone}
    write_json(path, {"passed": not failures, **result, **outcome})
    if skipped:
        print(f"--skip-bad leaves out {', '.join(shares)}, listed in {path}")
    if failures:  # on every rank; the first prints them
        text = f"{len(failures)} faults, listed in {path}"
        if much and not fatal:
            text += f"; --skip-bad would leave out {shares[0]}, more than {skip_bad:.0%}, and what is left may be a "
            text += f"selection: fix them, or allow it with --skip-bad {-(-100 * lost // total)}%"
        elif faults and not fatal:
            text += "; --skip-bad leaves examples with faults out, by name"
        raise SystemExit(text if ranks.rank() == 0 else 1)


def refuse_empty(known: set, splits: dict, args) -> None:
    """Ends where nothing is left to train on or to answer, or of a split that the data has (`known`)."""
    kind = "" if args.eval_only or args.check else "training "
    if not any(splits.values()) or (kind and not splits["train"]):
        raise SystemExit(f"--data {args.data}: no {kind}examples are left")
    for split in known - {None}:
        if not splits[split]:
            raise SystemExit(f"--skip-bad would leave out all of {split}; fix its examples")
    if not args.eval_only and args.patience and not splits["val"]:
        raise SystemExit("--patience counts validations, but there are no examples of val; leave it out, or add some")
    if not splits[args.eval_split]:
        others = " and ".join(split for split in SPLITS if splits[split])
        text = f"--eval-split {args.eval_split}: the data has no such examples, only of {others}"
        if args.eval_only:
            raise SystemExit(text)
        print(f"{text}: nothing will be answered")
    elif not args.overfit and args.eval_split != "test":
        why = "each look at it while settings are chosen wears it out"
        print(f"{args.eval_split} will be answered; test only with --eval-split test: {why}")


def overfit(loss: float, figures: dict) -> None:
    """The verdict of --overfit: exit code 1 unless every answer that was trained on is right."""
    wrong = round((1 - figures["micro"]["exact"]) * figures["micro"]["n"])
    taken, learned = f"{figures['step']} of {figures['steps']} steps", figures["step"] < figures["steps"]
    print(f"overfit: {figures['micro']['n']} examples, {taken}, loss {loss:.4f}, {wrong} answers wrong (must be none)")
    if wrong:
        remedy = "all was learned, so look at how it is answered (--max-answer-tokens, --decode)"
        remedy = remedy if learned else "where nothing else is wrong, give more --max-steps or a higher --lr"
        print(f"see predictions.jsonl of that run; {remedy}")
        raise SystemExit(1)

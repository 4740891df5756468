"""Honest numbers from runs, and a page to look at; the leakage check of a data folder; the audit of a scorer.

    python -m report RUN [RUN ...] --media-root DIR                    # run folders of one or several scripts
    python -m report --predictions FILE --train TRAIN.jsonl --test TEST.jsonl      # anybody's answers
    python -m report --data DIR                                        # the leakage check

Written are report.html (one file, no network), results.json, and the figures as SVG and PNG, into --out: of a single
run RUN/report. Every script writes it after answering; leakage check and audit run before every training. What a
script has answered with --eval-only --blind blank and --blind shuffled stands beside.
"""

import argparse
from pathlib import Path

from inputs import layouts
from report import examples, leakage, scoring, write
from report.audit import audit_scorer, print_audit
from report.read import read_run
from runtime.files import write_json


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m report", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, help="folder to write to (default: RUN/report; of several runs required)")
    parser.add_argument("--predictions", type=Path, help="another program's JSON lines, each with id and prediction")
    parser.add_argument("--test", type=Path, help="the examples they answer, in any layout that the scripts read")
    parser.add_argument("--train", type=Path, help="the training examples: without them there are no blind baselines")
    parser.add_argument("--data", type=Path, help="data folder: the leakage check alone")
    text = "where media are (default: beside the examples; of a run, none is opened)"
    parser.add_argument("--media-root", type=Path, metavar="DIR", help=text)
    parser.add_argument("--endovis", choices=layouts.ENDOVIS, help="the published split of --data's EndoVis-18-VQA")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.runs, args.predictions, args.data))) != 1:
        parser.error("give run folders, or --predictions, or --data")
    if args.predictions and not args.test:
        parser.error("--predictions needs --test, the examples that they answer")
    for path in filter(None, (args.predictions, args.test, args.train)):
        if not path.is_file():
            parser.error(f"{path}: no such file")
    if not args.data and not args.out:
        if len(args.runs) != 1:
            parser.error("--out required")
        args.out = args.runs[0] / "report"
        if any(path.is_symlink() for path in (args.out, *args.out.glob("*"))):  # laid there by whoever made the folder
            parser.error(f"{args.out} is or holds a link, and what it leads to would be overwritten; give --out")
    return args


def check_data(args: argparse.Namespace) -> None:
    """The leakage check of a data folder; exits with 1 where there are findings or faults."""
    found, problems = examples.read(args.data, endovis=args.endovis, media=args.media_root)
    for problem in problems:
        print(f"fault: {problem}")
    result = leakage.check(args.media_root or args.data, found)
    leakage.print_result(result)
    if args.out:
        write_json(args.out / "results.json", {"leakage": result, "faults": list(map(str, problems))})
    raise SystemExit(1 if result["findings"] or problems else 0)


def read_answers(args: argparse.Namespace) -> dict:
    """--predictions as a run, with the audit of the project's scorer on these examples and their leakage check."""
    test = examples.read_examples(args.test, "test", args.media_root)
    train = examples.read_examples(args.train, "train", args.media_root) if args.train else []
    run = examples.read_predictions(args.predictions, test, train)
    audit = audit_scorer(lambda text, example: scoring.score(text, example)["exact"], test + train)
    found = leakage.check(args.media_root or args.test.parent, train + test)
    leakage.print_result(found)
    of = {"data": str(args.test), "split": "test", "media_root": args.test.parent}
    return {**run, **of, "audit": audit, "leakage": found}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.data:
        check_data(args)
    runs = [read_answers(args)] if args.predictions else [read_run(folder) for folder in dict.fromkeys(args.runs)]
    runs = [run | ({"media_root": args.media_root} if args.media_root else {}) for run in runs]
    result = write.write(runs, args.out)
    write.print_result(result)
    if audit := result["audit"]:
        print_audit(audit)
    else:
        print("scorer: not audited by this run's script; its --check does that")
    print(f"wrote {args.out / 'report.html'}")
    if audit and audit["failed"]:
        raise SystemExit("the scorer calls wrong answers right: fix report/scoring.py, or the script's Task.score")


if __name__ == "__main__":
    main()

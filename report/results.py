"""Figures of records."""

from _old import common as _common
from _old import report as _report
from _old import runtime as _old


def finish(records, asked, train_rows, task, run, own=None):
    """Floors beside every record, the table, predictions.jsonl, results.json, the page."""
    training = [(row.question_type, row.question, [*row.also_right, row.answer]) for row in train_rows]
    blind = _common.blind_answers(training, [(r["question_type"], r["question"]) for r in records])
    rows = {row.id: row for row in asked}
    for record, said in zip(records, blind, strict=True):
        record["floors"] = {name: task.score(text, rows[record["id"]])["exact"] for name, text in said.items()}
    results = _common.summarise(records)
    cut = sum(not record.get("ended", True) for record in records)
    args = run.args
    results |= {"split": args.eval_split, "decode": args.decode, "cut_off": cut, **task.report}
    results |= {"data": str(args.data), "max_answer_tokens": args.max_answer_tokens, "limit": args.limit, **(own or {})}
    _old.write_jsonl(run.folder / "predictions.jsonl", records)
    print(_common.results_table(results))
    _old.write_json(run.folder / "results.json", results)
    if args.report and not args.blind:
        _old.on_first_rank(lambda: _report.write_report(run.folder))
    return results



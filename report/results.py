"""From records to results: baselines beside every record, the table, predictions.jsonl, results.json and the page."""

from pathlib import Path

from report.baselines import blind_answers
from report.summary import results_table, summarise
from report.write import write_report
from runtime.files import write_json, write_jsonl
from runtime.lock import refuse_lost
from runtime.ranks import on_first_rank


def finish(records: list[dict], asked: list, train_examples: list, task, run, own=None) -> dict:
    """Write and print what `records` hold, a record for each example of `asked`, in this order; returns results.json.

    `train_examples` are what the baselines know, `own()` gives further figures of one script (of captions, say).
    """
    add_baselines(records, asked, train_examples, task.score)
    args, results = run.args, summarise(records)
    results |= {"split": args.eval_split, "decode": args.decode, "model": args.model}
    results |= {"checkpoint": str(run.checkpoint) if run.checkpoint else None}
    results |= {"cut_off": sum(not record.get("ended", True) for record in records), **task.report}
    results |= {"data": str(args.data), "media_root": args.media_root}
    results |= {"max_answer_tokens": args.max_answer_tokens, "limit": args.limit}
    predictions = run.folder / "predictions.jsonl"
    on_first_rank(lambda: refuse_lost(run.folder))
    write_jsonl(predictions, records)
    print(results_table(results))
    results |= own() if own else {}  # only now: what fails there costs no answers
    write_json(run.folder / "results.json", results)
    print(f"{len(records)} questions answered, {results['cut_off']} cut off before EOS, listed in {predictions}")
    if args.report and not args.blind:
        on_first_rank(lambda: write_report(run.folder, Path(args.media_root)))
    return results


def add_baselines(records: list[dict], asked: list, train_examples: list, score) -> None:
    """Put into each record's `baselines` whether each baseline's answer is an exact match."""
    for record, example, guesses in zip(records, asked, blind_answers(train_examples, asked), strict=True):
        record["baselines"] = {name: score(text, example)["exact"] for name, text in guesses.items()}

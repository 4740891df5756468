"""From records to results: baselines beside every record, the table, predictions.jsonl, results.json and the page."""

import math
from datetime import datetime
from pathlib import Path

from report.baselines import blind_answers, number_medians
from report.summary import results_table, summarise
from report.write import write_report
from runtime import card
from runtime.files import write_json, write_jsonl
from runtime.folders import header, read_json
from runtime.lock import refuse_lost
from runtime.ranks import on_first_rank
from runtime.record import code


def finish(records: list[dict], asked: list, train_examples: list, task, run, own=None) -> dict:
    """Write and print what `records` hold, a record for each example of `asked`, in this order; returns results.json.

    `train_examples` are what the baselines know, `own()` gives further figures of one script (of captions, say).
    """
    add_baselines(records, asked, train_examples, task.score)
    args, results = run.args, summarise(records)
    given = ("model", "data", "media_root", "decode", "max_answer_tokens", "limit")
    results |= {"split": args.eval_split, **{name: getattr(args, name) for name in given}, **code()}
    results |= {"own_settings": {name: getattr(args, name) for name in run.own}}
    results |= {"date": datetime.now().isoformat(" ", "minutes")}
    results |= {"cut_off": sum(not record.get("ended", True) for record in records), **task.report}
    predictions = run.folder / "predictions.jsonl"
    on_first_rank(lambda: refuse_lost(run.folder))
    write_jsonl(predictions, records)
    print(results_table(results))
    results |= {"checkpoint": None, "step": 0, "steps": None}  # of the model as it is
    if run.checkpoint:  # only now: what fails costs no answers
        state = on_first_rank(lambda: read_json(run.checkpoint / "state.json"))
        held = on_first_rank(lambda: [header(path) for path in run.checkpoint.glob("*model.safetensors")])
        results |= {"trained": sum(math.prod(shape) for tensors in held for _, shape in tensors.values())}
        results |= {"checkpoint": str(run.checkpoint), "step": state["step"], "steps": state["same"].get("steps")}
        results |= {"lowest_val_loss": run.best == state["step"]} if run.best else {}  # where it is known
    results |= own() if own else {}
    write_json(run.folder / "results.json", results)
    if run.checkpoint and not args.blind:
        on_first_rank(lambda: card.update(task, run))
    print(f"{len(records)} questions answered, {results['cut_off']} cut off before EOS, listed in {predictions}")
    if args.report and not args.blind:
        on_first_rank(lambda: write_report(run.folder, Path(args.media_root)))
    return results


def add_baselines(records: list[dict], asked: list, train_examples: list, score) -> None:
    """Put into each record's `baselines` whether each baseline's answer is exact; of a number also the `median`."""
    medians = number_medians(train_examples)
    for record, example, guesses in zip(records, asked, blind_answers(train_examples, asked), strict=True):
        record["baselines"] = {name: score(text, example)["exact"] for name, text in guesses.items()}
        if example.question_type in medians and not example.candidates:
            record["median"] = medians[example.question_type]

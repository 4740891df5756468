"""--predict FILE: answers to questions whose answers nobody knows, a JSON line each, in the order of the file's lines.

It stands above the rooms, as the data check does: a line becomes an example through the script's own read_examples.
For that it gets an answer, which is never asked, scored or shown; what the line itself says of one is dropped.
"""

import json
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import common
from inputs import data_check, fields
from inputs.texts import loads, tidy
from runtime import checkpoints, folders, models, ranks, shards
from runtime.files import write_jsonl, writing

STAND_IN = "1"  # an answer that a question of any type may have
DROPPED = {"answer", "short_answer", "metadata", *fields.SPLITS}  # what may say an answer, or a split
SHOWN = ("id", "error", "media", "prediction", "ended", "probabilities")


def answer(read_examples, load_model, folder: Path, task, run) -> None:
    """Answer --predict with run.checkpoint, or with the model as it is; to standard output, or into RUN/answers.jsonl.

    Ends where lines have faults, all of them printed; with --skip-bad each of these gets its faults for an answer.
    """
    args = run.args
    models.refuse_faults(task)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "stdin" if args.predict == "-" else Path(args.predict).name)
        ids = write_examples(path, args)
        args.limit = None  # it has chosen the lines already; of a conversation each answer would count
        examples, problems = read_examples(path, args)
    for item in (*examples, *problems):
        item.where = re.sub(r" turn \d+$", "", item.where)  # the line; of a conversation the last answer is asked
    asked = list({example.where: example for example in examples}.values())
    data_check.fields(asked)  # prints which are not read
    seen = data_check.open_media(Path(args.media_root), asked, task.measure)
    found, task.measured, _, _ = data_check.check_media(asked, seen)
    splits, trees, wrong = data_check.build(asked, problems + found, task)
    faults = {}
    for fault in problems + found + wrong:
        faults.setdefault(fault.where, {})[fault.text] = None  # each once: turns repeat what is wrong before them
    faults = {where: "; ".join(texts) for where, texts in faults.items()}
    if faults and (args.skip_bad is None or not faults.keys() <= ids.keys()):  # also a fault of the complete file
        print("\n".join(f"{where}: {text}" for where, text in faults.items()))
        text = f"--predict {args.predict}: {len(faults)} lines with faults; fix them, or answer the others: --skip-bad"
        raise SystemExit(text if ranks.rank() == 0 else 1)
    answers = {where: {"error": text} for where, text in faults.items()}
    if left := splits["test"]:  # of a file that names none
        model = load_model(folder, task, run.dtype)
        checkpoints.load_weights(run, folder, model.vlm)  # refused if they were trained on another model
        shards.place(model, run)
        records = common.evaluate(model, trees["test"], left, task, run)
        answers |= {example.where: record for example, record in zip(left, records, strict=True)}
    lines = [answers[where] | {"id": name} for where, name in ids.items()]
    write([{field: line[field] for field in SHOWN if field in line} for line in lines], args)


def write_examples(path: Path, args) -> dict:
    """Write the lines of --predict as examples, each where it stands in FILE; returns {its place: its ID}."""
    if path.suffix in (".json", ".csv"):
        raise SystemExit(f"--predict {args.predict}: JSON lines are read; write them into a file that ends in .jsonl")
    ids, lines = {}, ranks.on_first_rank(lambda: read(args.predict)).split("\n")
    for i, line in enumerate(lines):
        where, lines[i] = f"{path.name}:{i + 1}", ""
        if line.strip() and len(ids) < (args.limit or len(lines)):
            ids[where], lines[i] = where, line
            with suppress(ValueError, TypeError, LookupError, AttributeError):  # its reader says what is wrong with it
                entry = loads(line.lstrip("\ufeff"))
                lines[i] = json.dumps(with_answer(where, entry, args))
                name = tidy(path, entry.get("id"))
                ids[where] = where if name in (None, "") else name
    path.write_text("\n".join(lines), encoding="utf-8")
    return ids


def read(name: str) -> str:
    """The text of --predict. Ends where it cannot be read."""
    with folders.readable(f"--predict {name} cannot be read; name a file of UTF-8 text"):
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode()


def with_answer(where: str, entry: dict, args) -> dict:
    """The entry with an answer that a script takes, behind its conversation where it has one; and with a group."""
    found = {"group": where} | {name: value for name, value in entry.items() if name not in DROPPED}
    task = str(entry.get("task_type") or entry.get("question_type"))
    allowed = entry.get("answer_candidates") or vars(args).get("task_labels", {}).get(task)
    text = allowed[0] if isinstance(allowed, list) else STAND_IN  # where these are labels it must name one
    for field in ("conversations", "messages"):
        if turns := found.get(field):
            role, said, name = ("role", "content", "assistant") if "role" in turns[-1] else ("from", "value", "gpt")
            asked = turns[:-1] if turns[-1].get(role) == name else turns
            return found | {field: [*asked, {role: name, said: text}]}
    return found | {vars(args).get("target", "answer"): text}


def write(lines: list[dict], args) -> None:
    """The answers, into RUN/answers.jsonl or to standard output."""
    if args.out and args.predict != "-":
        write_jsonl(Path(args.out, "answers.jsonl"), lines)
        print(f"{len(lines)} lines answered, in {args.out}/answers.jsonl")
    elif ranks.rank() == 0:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with writing(Path("standard output")):  # its reader may have gone, or its disk be full
            sys.__stdout__.buffer.write(text.encode("utf-8", "backslashreplace"))
            sys.__stdout__.flush()

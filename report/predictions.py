"""Answers of any program, scored as a run's are: a predictions file against the examples that it answers."""

from pathlib import Path

from inputs.files import read_jsonl
from inputs.task import Example, Problem
from report import examples, scoring
from report.baselines import blind_answers
from report.read import refuse

# fields of a predictions file, and the names that they have where --fields names none
PREDICTED = {"id": ("id", "question_id"), "prediction": ("prediction", "predicted_answer", "response")}


def read_examples(path: Path, split: str) -> list[Example]:
    """The examples of one file, all of `split`. Ends with what is wrong where one cannot be read, or has no answer."""
    refuse_missing(path)
    found, problems = examples.read(path, split)
    first = {}
    for example in found:
        if not isinstance(example.answer, str | int | float) or scoring.says_nothing(example.answer):
            text = f"the answer is empty or no text ({example.answer!r}); fix the example"
            problems.append(Problem(example.where, example.id, text))
        if first.setdefault(example.id, example) is not example and split == "test":
            text = f"duplicate ID, first used at {first[example.id].where}"
            problems.append(Problem(example.where, example.id, text))
        example.answer = str(example.answer)
    refuse(problems)
    return found


def refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")


def read_fields(text: str) -> dict[str, str]:
    """{"prediction": "predicted_answer"} of "prediction=predicted_answer,…"."""
    pairs = [pair.partition("=") for pair in text.split(",")] if text else []
    for name, _, theirs in pairs:
        if name not in PREDICTED or not theirs:
            raise SystemExit(f"--fields {text}: {name!r} is none of {', '.join(PREDICTED)}, each NAME=THEIRS")
    return {name: theirs for name, _, theirs in pairs}


def read_predictions(path: Path, test: list[Example], train: list[Example], fields: dict[str, str]) -> dict:
    """A predictions file, a line a question, scored against the examples `test`; `train` gives the blind baselines.

    An example that the file does not answer counts as wrong. Ends with what is wrong where lines cannot be used.
    """
    answered = read_lines(path, known_ids(test), fields)
    training = [(example.question_type, example.question, scoring.forms(example)) for example in train]
    blind = blind_answers(training, [(example.question_type, example.question) for example in test])
    names = ("id", "group", "media", "question_type", "question", "answer", "also_right")
    records = []
    for example, said in zip(test, blind, strict=True):
        record = {name: getattr(example, name) for name in names} | {"prediction": answered.get(example.id)}
        right = scoring.score(record["prediction"], example)
        baselines = {name: scoring.score(text, example)["exact"] for name, text in said.items()}
        records.append(record | {"correct": right["exact"], "relaxed": right["relaxed"], "baselines": baselines})
    unanswered = sum(example.id not in answered for example in test)
    text = f"{unanswered} of {len(test)} examples have no prediction; they count as wrong"
    return {"name": str(path), "records": records, "notes": [text] if unanswered else []}


def known_ids(test: list[Example]) -> dict[str, str]:
    """{what a line may call it: the example's ID}: "qa_1", too, of "002-004/qa_1", where no two would be the same."""
    known = {example.id.rpartition("/")[2]: example.id for example in test}
    return (known if len(known) == len(test) else {}) | {example.id: example.id for example in test}


def read_lines(path: Path, known: dict[str, str], fields: dict[str, str]) -> dict[str, str | None]:
    """{example's ID: what is answered} of a predictions file. Ends with what is wrong where there is something."""
    refuse_missing(path)
    lines, problems = read_jsonl(path)
    answered = {}
    for where, line in lines:
        found = {}
        for name, usual in PREDICTED.items():
            theirs = [fields[name]] if name in fields else usual
            present = [line[key] for key in theirs if key in line]
            if not present:
                problems.append(Problem(where, None, f"no field {' or '.join(theirs)}; name it with --fields {name}=…"))
            found[name] = present[0] if present else None
        given, said = str(found["id"]), found["prediction"]
        name = known.get(given)
        if not isinstance(said, str | int | float | None):
            problems.append(Problem(where, given, f"the prediction must be a text or null: {said!r}"))
        if name is None:
            problems.append(Problem(where, given, "no example of --test has this ID"))
        elif name in answered:
            problems.append(Problem(where, given, "answered twice; keep one line"))
        answered[name] = None if said is None else str(said)
    refuse(problems)
    return answered

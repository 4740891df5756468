"""Answers of any program, scored as a run's are: a predictions file against the examples that it answers."""

from pathlib import Path

from inputs.task import Example, Problem
from inputs.texts import read_jsonl
from report import examples, scoring
from report.read import refuse
from report.results import add_baselines

FIELDS = [("id", "question_id"), ("prediction", "predicted_answer", "response")]  # of a predictions file: usual names


def read_examples(path: Path, split: str, media: Path | None = None) -> list[Example]:
    """The examples of one file, all of `split`. Ends with what is wrong where one cannot be read, or has no answer."""
    found, problems = examples.read(path, split, media=media)
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


def read_predictions(path: Path, test: list[Example], train: list[Example]) -> dict:
    """A predictions file, a line a question, scored against the examples `test`; `train` gives the blind baselines.

    An example that the file does not answer counts as wrong. Ends with what is wrong where lines cannot be used.
    """
    # "qa_1" is enough for "002-004/qa_1", where no two would be the same
    short = {example.id.rpartition("/")[2]: example.id for example in test}
    known = (short if len(short) == len(test) else {}) | {example.id: example.id for example in test}
    answered = read_lines(path, known)
    names = ("id", "group", "media", "question_type", "question", "answer", "also_right")
    records = []
    for example in test:
        record = {name: getattr(example, name) for name in names} | {"prediction": answered.get(example.id)}
        right = scoring.score(record["prediction"], example)
        records.append(record | {"correct": right["exact"], "relaxed": right["relaxed"]})
    add_baselines(records, test, train, scoring.score)
    unanswered = sum(example.id not in answered for example in test)
    text = f"{unanswered} of {len(test)} examples have no prediction; they count as wrong"
    return {"name": str(path), "records": records, "notes": [text] if unanswered else []}


def read_lines(path: Path, known: dict[str, str]) -> dict[str, str | None]:
    """{example's ID: what is answered} of a predictions file; `known` are {what a line may call it: its ID}.

    Ends with what is wrong where there is something.
    """
    lines, problems = read_jsonl(path)
    answered = {}
    for where, line in lines:
        missing = [names for names in FIELDS if not line.keys() & set(names)]
        if missing:
            problems.append(Problem(where, None, f"no field {' or '.join(missing[0])}; rename the one that is meant"))
            continue
        given, prediction = (next(line[name] for name in names if name in line) for names in FIELDS)
        name, given = known.get(str(given)), str(given)
        if not isinstance(prediction, str | int | float | None):
            problems.append(Problem(where, given, f"the prediction must be a text or null: {prediction!r}"))
        if name is None:
            problems.append(Problem(where, given, "no example of --test has this ID"))
        elif name in answered:
            problems.append(Problem(where, given, "answered twice; keep one line"))
        answered[name] = None if prediction is None else str(prediction)
    refuse(problems)
    return answered

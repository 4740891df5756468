"""Examples of any data folder or file, without a script: for the leakage check, and to score what others answered."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inputs import files, images, layouts, videos
from inputs.questions import question_type
from inputs.task import Example, Problem, collect, named, split_of
from inputs.texts import read_jsonl
from report import scoring
from report.read import refuse
from report.results import add_baselines

FIELDS = [("id", "question_id"), ("prediction", "predicted_answer", "response")]  # of a predictions file: usual names


@dataclass(kw_only=True)
class AnyExample(Example):
    """An example of whatever layout. Its `answer` is as it was read, also where that is no text or says nothing."""

    heard: str | None = None  # the recording of a question, which may be asked in two splits

    @property
    def shown(self) -> list[str]:
        return [name for name in self.media if name != self.heard] or self.media


def read(path: Path, split=None, endovis=None, media: Path | None = None) -> tuple[list[AnyExample], list[Problem]]:
    """The examples of a data folder, whichever script it is for, or of one file; and what is no example.

    `split` is a file's, `endovis` one of layouts.ENDOVIS for that data set, `media` where media lie, if not beside it.
    """
    media = media or (path if path.is_dir() else path.parent)
    found = layouts.entries(path, media, endovis)
    return collect(((w, s or split, e) for w, s, e in found), partial(make_example, media))


def make_example(data: Path, where: str, split: str | None, entry: dict) -> AnyExample:
    try:
        of_images = "of_conversation" in entry or entry.get("images") is not None
        entry = images.placed(data, entry) if of_images else entry
        media, name, heard = media_of(data, entry), named(entry, "id", where), named(entry, "audio", None)
        shown = [file for file in media if file != heard] or media
        alone = [entry[key] for key in ("group", "video_id", "video") if entry.get(key) not in (None, "")]
        groups = [str(group) for group in entry.get("groups") or [*alone, *shown, where][:1]]
        answers = [entry[key] for key in ("short_answer", "answer") if not scoring.says_nothing(entry.get(key))]
        # without the marks of what is shown, which may stand before it or after
        question = re.sub(r"<(?:image|video)>", " ", str(entry.get("question") or "")).strip()
        kind = question_type(question) if question else "caption" if shown else "text"
        return AnyExample(
            where=where,
            split=split or split_of(groups[0]),
            id=name,
            group=groups[0],
            groups=videos.groups(entry, *groups),
            media=media,
            heard=heard,
            question=question,
            answer=answers[0] if answers else entry.get("answer"),
            also_right=[str(form) for form in answers[1:]],
            question_type=named(entry, "question_type", kind),
            candidates=None,
            history=entry.get("history") or (entry.get("turns") or ())[:-1],
        )
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not as examples are written ({error}); fix it") from None


def media_of(data: Path, entry: dict) -> list[str]:
    """The files that an entry names, in the order in which they are shown; a folder stands for the files in it."""
    one = [images.find(data, str(entry[field])) for field in images.FIELDS if entry.get(field)][:1]
    found = list(entry["images"] if entry.get("images") is not None else one)
    frames = entry.get("frames") or []
    found += map(str, frames if isinstance(frames, list) else [frames])
    found += [name for volume in entry.get("volumes") or [] for name in volume.files]
    if entry.get("video"):
        video = str(entry["video"])
        in_file = videos.in_file(video) and not (data / video).is_dir()
        found += videos.clip(data, entry, 8)[0] if in_file else files.listed(data, video) or [video]
    return found + ([str(entry["audio"])] if entry.get("audio") else [])


# ---- answers of any program, scored as a run's are ----


def read_examples(path: Path, split: str, media: Path | None = None) -> list[Example]:
    """The examples of one file, all of `split`. Ends with what is wrong where one cannot be read, or has no answer."""
    found, problems = read(path, split, media=media)
    first = {}
    for example in found:
        answer, kind, faults = example.answer, example.question_type, []
        if not isinstance(answer, str | int | float) or scoring.says_nothing(answer):
            faults += [f"the answer is empty or no text ({answer!r}); fix the example"]
        elif scoring.is_number(kind) and scoring.number_said(answer) is None:
            faults += [f"the answer {answer!r} of the type {kind!r} {scoring.ONE_NUMBER}; fix it"]
        if first.setdefault(example.id, example) is not example and split == "test":
            faults += [f"duplicate ID, first used at {first[example.id].where}"]
        problems += [Problem(example.where, example.id, text) for text in faults]
        example.answer = str(answer)
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
    """{example's ID: its answer} of a file, or its end; `known` are {what a line may call an example: its ID}."""
    answered, problems = {}, []
    for where, line in read_jsonl(path):
        if isinstance(line, Problem):
            problems.append(line)
            continue
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

"""The layouts in which data sets are published, read as they are: (where, split, entry) for each question.

An entry is a dict with question, answer and media, whatever its files look like; a Problem stands in its place where
it cannot be read. `where` is what faults are named by, "train.jsonl:17". Scripts read the layouts that they know;
`entries` reads any of them, for whoever looks at a data folder without a script.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from inputs import sound, turns, videos
from inputs.files import SPLITS, data_files, first_existing, read_json, read_jsonl
from inputs.task import Problem
from inputs.turns import refuse_misspelt

# ---- JSON lines, JSON lists, LLaVA's conversations ----


def files(data: Path):
    """The entries of {train,val,test}.jsonl or .json, or of a single such file, whose split is None."""
    for split, path in data_files(data).items():
        yield from file_entries(path, split)


def file_entries(path: Path, split: str | None = None):
    """The entries of one file: JSON lines, or a JSON list."""
    if path.suffix != ".json":
        entries, problems = read_jsonl(path)
        yield from ((problem.where, split, problem) for problem in problems)
        yield from ((where, split, entry) for where, entry in entries)
        return
    try:
        entries = read_json(path)
        if not isinstance(entries, list) or not entries:
            raise ValueError("not a JSON list of examples; fix the file")
    except ValueError as error:
        yield path.name, split, Problem(path.name, None, str(error))
        return
    for i, entry in enumerate(entries):
        where = f"{path.name}[{i}]"
        fault = Problem(where, None, f"not a JSON object: {entry!r}; fix the file")
        yield where, split, entry if isinstance(entry, dict) else fault


def each(entries, take_apart: Callable):
    """What take_apart(where, split, entry) makes of every entry, all of it or, where it raises an error, a Problem."""
    for where, split, entry in entries:
        if isinstance(entry, Problem):
            yield where, split, entry
            continue
        try:
            yield from list(take_apart(where, split, entry))
        except ValueError as error:
            yield where, split, Problem(where, entry.get("id"), str(error))
        except (TypeError, AttributeError) as error:  # a number for a list, a list for a text, …
            yield where, split, Problem(where, None, f"not as conversations are written ({error}); fix the file")


def refuse_beside(data: Path, layout: str) -> None:
    """Ends where files of the plain layout lie beside those of another, of which one would not be read."""
    lines = [f"{split}.jsonl" for split in SPLITS if (data / f"{split}.jsonl").is_file()]
    if lines:
        raise SystemExit(f"--data {data}: {', '.join(lines)} beside {layout}; keep one of the two")


def conversations(entries, mark: str, field: str | None = None):
    """LLaVA's conversations as an entry for each answer, with its history; anything else as it is (see turns.llava)."""
    return each(entries, partial(turns.llava, mark=mark, field=field))


def refuse_kinds(entry: dict, **kinds) -> None:
    """Raise ValueError where a field that is there is not of its kind: field=str, or several kinds."""
    for name, kind in kinds.items():
        if entry.get(name) is not None and not isinstance(entry[name], kind):
            raise ValueError(f"{name} must be a text: {entry[name]!r}")


# ---- EndoVis-18-VQA: seq_N/vqa/{Classification,Sentence}/FRAME_QA.txt ("question|answer"), seq_N/left_fr/FRAME.png

PAPER = {"train": [2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15], "test": [1, 5, 16]}
SEQUENCE = {"train": [5, 6, 7, 10, 11, 12, 14, 15, 16], "val": [9, 13], "test": [1, 2, 3, 4]}
# of --endovis: which sequences are in which split, and the folder of the answers
ENDOVIS = {"paper": (PAPER, "Classification"), "paper:Sentence": (PAPER, "Sentence")}
ENDOVIS |= {"sequence": (SEQUENCE, "Classification"), "sequence:Sentence": (SEQUENCE, "Sentence")}


def is_endovis(data: Path) -> bool:
    return any(data.glob("seq_*/vqa"))


def endovis(data: Path, choice: str | None):
    """The questions of a published split (a key of ENDOVIS), a sequence of frames being a group."""
    if choice is None:
        text = "EndoVis-18-VQA has two published splits that contradict each other"
        raise SystemExit(f"--data {data}: {text}: give --endovis {' or '.join(ENDOVIS)}")
    splits, answers = ENDOVIS[choice]
    for split, number in ((split, number) for split, numbers in splits.items() for number in numbers):
        paths = sorted((data / f"seq_{number}" / "vqa" / answers).glob("*.txt"))
        if not paths:
            where = f"seq_{number}/vqa/{answers}"
            yield where, split, Problem(where, None, "no annotation files; complete the data set")
        for path in paths:
            frame = path.stem.removesuffix("_QA")
            # the left camera's frames; right_fr and labels hold files of the same name
            near = [f"seq_{number}/{camera}{frame}" for camera in ("left_fr/", "", "vqa/")]
            image = first_existing(data, [f"{place}.{ending}" for place in near for ending in ("png", "jpg")])
            for line, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
                where, (question, bar, answer) = f"{path.relative_to(data)}:{line}", text.partition("|")
                entry = {"image": image, "question": question, "answer": answer, "group": f"seq_{number}"}
                yield where, split, entry if bar else Problem(where, None, 'no "question|answer"; fix the line')


# ---- SurgViVQA: {train,eval,test}_multivideo.jsonl, frames/VIDEO/NAME.jpg, audio/SPLIT/ID.wav ----

SURGVIVQA = {"train": "train_multivideo.jsonl", "val": "eval_multivideo.jsonl", "test": "test_multivideo.jsonl"}
SURGVIVQA_FIELDS = {"id", "frames", "audio", "question", "answer", "short_answer", "question_type", "video_id"}
SURGVIVQA_FIELDS |= {"answer_candidates", "group", "frame_numbers", "total_frames"}


def is_surgvivqa(data: Path) -> bool:
    """Has the folder SurgViVQA's own files? Ends where there are others beside them."""
    found = any((data / name).is_file() for name in SURGVIVQA.values())
    if found:
        refuse_beside(data, "SurgViVQA's own files")
    return found


def surgvivqa(data: Path):
    """Entries with IDs that are unique, frames as files, and the recording that belongs to each question."""
    for split, name in SURGVIVQA.items():
        if (data / name).is_file():
            yield from surgvivqa_file(data / name, split)


def surgvivqa_file(path: Path, split: str | None = None):
    """The entries of one of SurgViVQA's files; frames and recordings stand beside it."""
    return each(file_entries(path, split), partial(surgvivqa_entry, path))


def surgvivqa_entry(file: Path, where: str, split: str | None, entry: dict):
    """SurgViVQA counts IDs from one in each of its videos, and names recordings by them alone."""
    refuse_misspelt(entry, SURGVIVQA_FIELDS)
    if any(entry.get(key) in (None, "") for key in ("id", "video_id")):
        raise ValueError("no id or no video_id, by which SurgViVQA's files name recordings and frames")
    data, name, video, frames = file.parent, entry["id"], entry["video_id"], entry.get("frames")
    found = {**entry, "id": f"{video}/{name}"}
    if isinstance(frames, list) and all(isinstance(frame, str) and frame for frame in frames):  # else refused later
        found["frames"] = [with_suffix(data, f"frames/{video}/{frame}", videos.FRAMES) for frame in frames]
    if entry.get("audio") in (None, ""):
        folders = [f"audio/{file.stem.partition('_')[0]}", f"audio/{file.stem}"]
        folder = next((folder for folder in folders if (data / folder).is_dir()), folders[0])
        found["audio"] = with_suffix(data, f"{folder}/{name}", sound.FILES)
    yield where, split, found


def with_suffix(data: Path, name: str, suffixes: tuple[str, ...]) -> str:
    """The name with whichever of the suffixes the file has, if any; with the first where there is no such file."""
    places = [*(name + suffix for suffix in (*suffixes, *map(str.upper, suffixes))), name]
    return first_existing(data, places)


# ---- UMBRELLA: {train,validation,test}/**/*.json, a conversation a file; or its conversations as JSON lines ----

UMBRELLA = {"train": "train", "val": "validation", "test": "test"}  # split -> its folder


def is_umbrella(data: Path) -> bool:
    """Has the folder UMBRELLA's own folders of conversations? Ends where other files lie beside them."""
    found = any(conversations_in(data / name) for name in UMBRELLA.values())
    if found:
        refuse_beside(data, "UMBRELLA's folders")
    if found and (data / "val").is_dir():
        raise SystemExit(f"--data {data}: val/ would not be read; UMBRELLA calls it validation, rename it")
    return found


def conversations_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".json")


def umbrella(data: Path, supervise: str):
    """An entry for each supervised answer of UMBRELLA's conversations, or of plain questions (see turns.umbrella)."""
    found = umbrella_files(data) if is_umbrella(data) else files(data)
    return each(found, partial(turns.umbrella, data, supervise=supervise))


def umbrella_files(data: Path):
    """UMBRELLA's own folders: a conversation a file, whose ID is its path."""
    for split, name in UMBRELLA.items():
        paths = conversations_in(data / name)
        if (data / name).is_dir() and not paths:
            yield name, split, Problem(name, None, "the folder holds no .json files")
        for path in paths:
            where = str(path.relative_to(data))
            try:
                entry = read_json(path)
                if not isinstance(entry, dict):
                    raise ValueError("not a JSON object but a list or a value; fix the file")
                yield where, split, {"id": where[: -len(".json")], **entry}
            except ValueError as error:
                yield where, split, Problem(where, None, str(error))


# ---- Any of them ----


def entries(path: Path, endovis_choice: str | None = None):
    """The entries of a data folder in whichever layout it has, or of one .jsonl or .json file, whose split is None."""
    if not path.is_dir():
        found = surgvivqa_file(path) if path.name in SURGVIVQA.values() else file_entries(path)
        return each(found, partial(any_kind, path.parent))
    if is_endovis(path):
        return endovis(path, endovis_choice)
    if is_surgvivqa(path):
        return surgvivqa(path)
    lines = any(path.glob("train.json*"))  # then folders of .json files are something else
    return each(umbrella_files(path) if not lines and is_umbrella(path) else files(path), partial(any_kind, path))


def any_kind(data: Path, where: str, split: str | None, entry: dict):
    """The entries that UMBRELLA's or LLaVA's conversation is, whichever it is."""
    if entry.keys() & {"volume", "images"}:
        return turns.umbrella(data, where, split, entry, "all")
    return turns.llava(where, split, entry, *(("<image>", None) if "image" in entry else ("<video>", "video")))

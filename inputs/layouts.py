"""The layouts in which data sets are published, read as they are: (where, split, entry) for each question.

An entry is a dict with question, answer and media, whatever its files look like; a Problem stands in its place where
it cannot be read. `where` is what faults are named by, "train.jsonl:17". Scripts read the layouts that they know;
`entries` reads any of them, for whoever looks at a data folder without a script.
"""

from pathlib import Path

from inputs import turns
from inputs.files import SPLITS, data_files, first_existing, read_json, read_jsonl
from inputs.task import Problem
from inputs.turns import refuse_misspelt

# ------------------------------------------------------------------------------------------------------------
# JSON lines, JSON lists, LLaVA's conversations
# ------------------------------------------------------------------------------------------------------------


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


def conversations(entries, mark: str, field: str | None = None):
    """LLaVA's conversations as an entry for each answer, with its history; anything else as it is (see turns.llava)."""
    for where, split, entry in entries:
        if isinstance(entry, Problem):
            yield where, split, entry
            continue
        try:
            if "conversations" not in entry:
                turns.refuse_history(entry)
                yield where, split, entry
                continue
            yield from ((place, split, found) for place, found in turns.llava(where, entry, mark, field))
        except ValueError as error:
            yield where, split, Problem(where, entry.get("id"), str(error))


def refuse_kinds(entry: dict, **kinds) -> None:
    """Raise ValueError where a field that is there is not of its kind: field=str, or several kinds."""
    for name, kind in kinds.items():
        if entry.get(name) is not None and not isinstance(entry[name], kind):
            raise ValueError(f"{name} must be a text: {entry[name]!r}")


# ------------------------------------------------------------------------------------------------------------
# EndoVis-18-VQA: seq_N/vqa/{Classification,Sentence}/FRAME_QA.txt, a line "question|answer", seq_N/left_fr/FRAME.png
# ------------------------------------------------------------------------------------------------------------

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


# ------------------------------------------------------------------------------------------------------------
# SurgViVQA: {train,eval,test}_multivideo.jsonl, frames/VIDEO/NAME.jpg, audio/SPLIT/ID.wav
# ------------------------------------------------------------------------------------------------------------

SURGVIVQA = {"train": "train_multivideo.jsonl", "val": "eval_multivideo.jsonl", "test": "test_multivideo.jsonl"}
FRAMES, RECORDINGS = (".jpg", ".jpeg", ".png"), (".wav", ".flac", ".mp3")
SURGVIVQA_FIELDS = {"id", "frames", "audio", "question", "answer", "short_answer", "question_type", "video_id"}
SURGVIVQA_FIELDS |= {"answer_candidates", "group", "frame_numbers", "total_frames"}


def is_surgvivqa(data: Path) -> bool:
    """Has the folder SurgViVQA's own files? Ends where there are others beside them."""
    found = any((data / name).is_file() for name in SURGVIVQA.values())
    other = [f"{split}.jsonl" for split in SPLITS if (data / f"{split}.jsonl").is_file()]
    if found and other:
        raise SystemExit(f"--data {data}: {', '.join(other)} beside SurgViVQA's own files; keep one of the two")
    return found


def surgvivqa(data: Path):
    """Entries with IDs that are unique, frames as files, and the recording that belongs to each question."""
    for split, name in SURGVIVQA.items():
        if (data / name).is_file():
            yield from surgvivqa_file(data / name, split)


def surgvivqa_file(path: Path, split: str | None = None):
    """The entries of one of SurgViVQA's files; frames and recordings stand beside it."""
    for where, _, entry in file_entries(path):
        try:
            found = entry if isinstance(entry, Problem) else surgvivqa_entry(path.parent, path.name, entry)
        except ValueError as error:
            found = Problem(where, entry.get("id"), str(error))
        yield where, split, found


def surgvivqa_entry(data: Path, file: str, entry: dict) -> dict:
    """SurgViVQA counts IDs from one in each of its videos, and names recordings by them alone."""
    refuse_misspelt(entry, SURGVIVQA_FIELDS)
    if any(entry.get(key) in (None, "") for key in ("id", "video_id")):
        raise ValueError("no id or no video_id, by which SurgViVQA's files name recordings and frames")
    name, video, frames = entry["id"], entry["video_id"], entry.get("frames")
    found = {**entry, "id": f"{video}/{name}"}
    if isinstance(frames, list) and all(isinstance(frame, str) and frame for frame in frames):  # else refused later
        found["frames"] = [with_suffix(data, f"frames/{video}/{frame}", FRAMES) for frame in frames]
    if entry.get("audio") in (None, ""):
        stem = file.removesuffix(".jsonl")
        folders = [f"audio/{stem.partition('_')[0]}", f"audio/{stem}"]
        folder = next((folder for folder in folders if (data / folder).is_dir()), folders[0])
        found["audio"] = with_suffix(data, f"{folder}/{name}", RECORDINGS)
    return found


def with_suffix(data: Path, name: str, suffixes: tuple[str, ...]) -> str:
    """The name with whichever of the suffixes the file has, if any; with the first where there is no such file."""
    places = [*(name + suffix for suffix in (*suffixes, *map(str.upper, suffixes))), name]
    return first_existing(data, places)


# ------------------------------------------------------------------------------------------------------------
# UMBRELLA: {train,validation,test}/**/*.json, a conversation a file; or its conversations as JSON lines
# ------------------------------------------------------------------------------------------------------------

UMBRELLA = {"train": "train", "val": "validation", "test": "test"}  # split -> its folder


def is_umbrella(data: Path) -> bool:
    """Has the folder UMBRELLA's own folders of conversations? Ends where other files lie beside them."""
    found = any(conversations_in(data / name) for name in UMBRELLA.values())
    lines = [f"{split}.jsonl" for split in UMBRELLA if (data / f"{split}.jsonl").is_file()]
    if found and lines:
        raise SystemExit(f"--data {data}: {', '.join(lines)} beside UMBRELLA's folders; keep one of the two")
    if found and (data / "val").is_dir():
        raise SystemExit(f"--data {data}: val/ would not be read; UMBRELLA calls it validation, rename it")
    return found


def conversations_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".json")


def umbrella(data: Path, supervise: str):
    """An entry for each supervised answer of UMBRELLA's conversations, or of plain questions (see turns.umbrella)."""
    for where, split, entry in umbrella_files(data) if is_umbrella(data) else files(data):
        yield from umbrella_entries(data, where, split, entry, supervise)


def umbrella_entries(data: Path, where: str, split: str | None, entry, supervise: str) -> list[tuple]:
    """All entries of a conversation, or the Problem that it has."""
    if isinstance(entry, Problem):
        return [(where, split, entry)]
    try:
        return list(turns.umbrella(data, where, entry, split, supervise))
    except (TypeError, AttributeError) as error:  # a number for a list, a list for a text, …
        return [(where, split, Problem(where, None, f"not as conversations are written ({error}); fix the file"))]
    except ValueError as error:
        return [(where, split, Problem(where, entry.get("id"), str(error)))]


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
                fault = None if isinstance(entry, dict) else "not a JSON object but a list or a value; fix the file"
            except ValueError as error:
                fault = str(error)
            yield where, split, Problem(where, None, fault) if fault else {"id": where[: -len(".json")], **entry}


# ------------------------------------------------------------------------------------------------------------
# Any of them
# ------------------------------------------------------------------------------------------------------------


def entries(path: Path, endovis_choice: str | None = None):
    """The entries of a data folder in whichever layout it has, or of one .jsonl or .json file, whose split is None."""
    if path.is_dir() and is_endovis(path):
        yield from endovis(path, endovis_choice)
    elif path.is_dir() and is_surgvivqa(path):
        yield from surgvivqa(path)
    elif path.name in SURGVIVQA.values():
        yield from surgvivqa_file(path)
    else:
        data = path if path.is_dir() else path.parent
        for where, split, entry in folder_entries(path) if path.is_dir() else file_entries(path):
            fields = entry.keys() if isinstance(entry, dict) else set()
            if fields & {"volume", "images"}:
                yield from umbrella_entries(data, where, split, entry, "all")
            else:
                mark, field = ("<image>", None) if "image" in fields else ("<video>", "video")
                yield from conversations([(where, split, entry)], mark, field)


def folder_entries(data: Path):
    """What a folder's files hold, conversations as they are."""
    lines = any(data.glob("train.json*"))  # then folders of .json files are something else
    return umbrella_files(data) if not lines and is_umbrella(data) else files(data)

"""The layouts in which data sets are published, read as they are: (where, split, entry) for each question.

An entry is a dict with question, answer and media, whatever its files look like; a Problem stands in its place where
it cannot be read. `where` is what faults are named by, "train.jsonl:17". Scripts read the layouts that they know;
`entries` reads any of them, for whoever looks at a data folder without a script.
"""

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from inputs import fields, sound, turns, videos
from inputs.files import SPLIT_NAMES, SPLITS, data_files, first_existing
from inputs.task import Problem
from inputs.texts import read_csv, read_json, read_jsonl, read_list, read_text, tidy

# ---- JSON lines, JSON lists, CSV, LLaVA's conversations ----

# beside what is shown
FIELDS = {"id", "question", "answer", "question_type", "answer_candidates", "group", "history", "conversations"}


def files(data: Path, media: Path, known: set[str] | None):
    """The entries of {train,val,test}.jsonl, .json or .csv, or of a single such file, whose own split counts, if any.

    Names of media start from `media`. Of fields that are not `known` see fields.read.
    """
    for split, path in data_files(data).items():
        found = (iter if split else list)(file_entries(path, split, media, known))
        some = not split and any(named for _, named, _ in found)
        for where, split, entry in found:
            fault = some and split is None and not isinstance(entry, Problem)
            text = "no split, though others of the file name theirs; name it in each, or in none"
            yield where, split, Problem(where, entry.get("id"), text) if fault else entry


def file_entries(path: Path, split: str | None, media: Path, known: set[str] | None):
    """The entries of one file: JSON lines, a JSON list, or CSV with a header, each as read_entry makes it."""
    found = {".json": read_list, ".csv": read_csv}.get(path.suffix, read_jsonl)(path)
    return each(((where, split, entry) for where, entry in found), partial(read_entry, media, known))


def read_entry(media: Path, known: set[str] | None, where: str, split: str | None, entry: dict):
    """The entry with its group, its split, and all its fields under the names by which they are read."""
    for name in ("conversations", "messages"):
        if not isinstance(entry.get(name), list | None):
            raise ValueError(f"{name} must be a list of turns: {entry[name]!r}")
    yield where, *fields.read(media, split, turns.messages(tidy(media, entry)), known)


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
        except (TypeError, AttributeError, LookupError, RecursionError) as error:  # a number for a list, say
            yield where, split, Problem(where, None, f"not as conversations are written ({error}); fix the file")


def refuse_beside(data: Path, layout: str) -> None:
    """Ends where files of the plain layout lie beside those of another, of which one would not be read."""
    lines = [f"{split}.jsonl" for split in SPLITS if (data / f"{split}.jsonl").is_file()]
    if lines:
        raise SystemExit(f"--data {data}: {', '.join(lines)} beside {layout}; keep one of the two")


def conversations(entries, mark: str, field: str | None = None):
    """LLaVA's conversations as an entry for each answer, with its history; anything else as it is (see turns.llava)."""
    return each(entries, partial(turns.llava, mark=mark, field=field))


# ---- EndoVis-18-VQA: seq_N/vqa/{Classification,Sentence}/FRAME_QA.txt ("question|answer"), seq_N/left_fr/FRAME.png

PAPER = {"train": [2, 3, 4, 6, 7, 9, 10, 11, 12, 14, 15], "test": [1, 5, 16]}
SEQUENCE = {"train": [5, 6, 7, 10, 11, 12, 14, 15, 16], "val": [9, 13], "test": [1, 2, 3, 4]}
# of --endovis: which sequences are in which split, and the folder of the answers
ENDOVIS = {"paper": (PAPER, "Classification"), "paper:Sentence": (PAPER, "Sentence")}
ENDOVIS |= {"sequence": (SEQUENCE, "Classification"), "sequence:Sentence": (SEQUENCE, "Sentence")}


def is_endovis(data: Path) -> bool:
    return any(data.glob("seq_*/vqa"))


def endovis(data: Path, media: Path, choice: str | None):
    """The questions of a published split (a key of ENDOVIS), a sequence of frames being a group."""
    if choice is None:
        text = "EndoVis-18-VQA has two published splits that contradict each other"
        raise SystemExit(f"--data {data}: {text}: give --endovis {' or '.join(ENDOVIS)}")
    splits, answers = ENDOVIS[choice]
    for split, number in ((split, number) for split, numbers in splits.items() for number in numbers):
        paths = sorted((data / f"seq_{number}" / "vqa" / answers).glob("*.txt"))
        if not paths:
            where = f"seq_{number}/vqa/{answers}"
            yield where, split, Problem(where, None, "no annotation files; complete the data set", fatal=True)
        for path in paths:
            frame = path.stem.removesuffix("_QA")
            # the left camera's frames; right_fr and labels hold files of the same name
            near = [f"seq_{number}/{camera}{frame}" for camera in ("left_fr/", "", "vqa/")]
            image = with_suffix(media, near, (".png", ".jpg"))
            try:
                lines = read_text(path).splitlines()
                if not lines:
                    raise ValueError("the file holds no questions; copy it again")
            except ValueError as error:
                where = str(path.relative_to(data))
                yield where, split, Problem(where, None, str(error), fatal=True)
                continue
            for line, text in enumerate(lines, start=1):
                where, (question, bar, answer) = f"{path.relative_to(data)}:{line}", text.partition("|")
                entry = {"image": image, "question": question, "answer": answer, "group": f"seq_{number}"}
                fault = not bar or "|" in answer
                yield where, split, Problem(where, None, 'not "question|answer"; fix the line') if fault else entry


# ---- SurgViVQA: frames/VIDEO/NAME.jpg or NUMBER.jpg, audio/out_VIDEO/ID.mp3 (of in_*.jsonl audio/in_VIDEO), and ----

# which of them a folder is read by: the first kind that it has; the last two ask all questions, in either wording
SURGVIVQA = [rf"({'|'.join(SPLIT_NAMES)})_(\w+_)?{kind}\.jsonl" for kind in ("multivideo", "stratified")]
SURGVIVQA += [rf"{wording}_(template|\d+-\d+)\.jsonl" for wording in ("out", "in")]


def is_surgvivqa(data: Path) -> bool:
    """Has the folder SurgViVQA's own files, or is it one? Ends where there are others beside them."""
    paths = [data] if data.is_file() else data.glob("*.jsonl")
    found = any(re.fullmatch("|".join(SURGVIVQA), path.name) for path in paths)
    if found:
        refuse_beside(data, "SurgViVQA's own files")
    return found


def surgvivqa(data: Path, media: Path, known: set[str] | None):
    """Entries with IDs that are unique, frames as files, and the recording that belongs to each question."""
    if data.is_file():
        yield from surgvivqa_file(data, "test", media, known)
        return
    names = sorted(path.name for path in data.glob("*.jsonl"))
    kinds = [[name for name in names if re.fullmatch(kind, name)] for kind in SURGVIVQA]
    read, *others = filter(None, kinds)
    if others:
        print(f"not read, beside {', '.join(read)}: {', '.join(name for kind in others for name in kind)}")
    for split in (*SPLITS, None):
        for name in read:
            if SPLIT_NAMES.get(name.partition("_")[0]) == split:
                yield from surgvivqa_file(data / name, split, media, known)


def surgvivqa_file(path: Path, split: str | None, media: Path, known: set[str] | None):
    """The entries of one of SurgViVQA's files."""
    return each(file_entries(path, split, media, known), partial(surgvivqa_entry, path.stem, media))


def surgvivqa_entry(file: str, media: Path, where: str, split: str | None, entry: dict):
    """SurgViVQA counts IDs from one in each of its videos, and asks each question in two wordings, in_ and out_."""
    if any(entry.get(key) in (None, "") for key in ("id", "video_id")):
        raise ValueError("no id or no video_id, by which SurgViVQA's files name recordings and frames")
    name, video, frames = entry["id"], entry["video_id"], entry.get("frames")
    found = {**entry, "id": f"{video}/{name}"}
    if isinstance(frames, list) and all(isinstance(frame, str) and frame for frame in frames):  # else refused later
        named = [(f"frames/{video}/{frame}", f"frames/{video}/{frame.rpartition('_')[2]}") for frame in frames]
        found["frames"] = [with_suffix(media, names, videos.FRAMES) for names in named]
    if entry.get("audio") in (None, ""):
        wording = "in" if file.startswith("in_") else "out"
        folders = [f"audio/{folder}" for folder in (f"{wording}_{video}", video, file.partition("_")[0], file)]
        folder = next((folder for folder in folders if os.path.isdir(media / folder)), folders[0])
        found["audio"] = with_suffix(media, [f"{folder}/{name}", f"audio/{name}"], sound.FILES)
    yield where, split, found


def with_suffix(media: Path, names: Iterable[str], suffixes: tuple[str, ...]) -> str:
    """The first of these names that is a file with one of the suffixes; where none is, the first, with the first."""
    endings = (*suffixes, *map(str.upper, suffixes), "")
    return first_existing(media, [name + ending for name in names for ending in endings])


# ---- UMBRELLA: {train,validation,test}/**/*.json, a conversation a file; or {train,…}_conversations.jsonl ----


def umbrella_folders(data: Path) -> dict[str, str]:
    """{split: its folder of conversations}, none where there are no such. Ends where other files lie beside them."""
    named = [(split, name) for split in SPLITS for name in SPLIT_NAMES if SPLIT_NAMES[name] == split]
    named = [(split, name) for split, name in named if (data / name).is_dir()]
    if not any(conversations_in(data / name) for _, name in named):
        return {}
    refuse_beside(data, "UMBRELLA's folders")
    if len(dict(named)) < len(named):
        raise SystemExit(f"--data {data}: one folder a split, not {', '.join(name for _, name in named)}")
    return dict(named)


def conversations_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".json")


def umbrella(data: Path, media: Path, supervise: str):
    """An entry for each supervised answer of UMBRELLA's conversations, or of plain questions (see turns.umbrella)."""
    return each(umbrella_entries(data, media, turns.FIELDS), partial(turns.umbrella, media, supervise=supervise))


def umbrella_entries(data: Path, media: Path, known: set[str] | None):
    """The entries of UMBRELLA's own folders; where there are none, of files."""
    folders = umbrella_folders(data)
    found = each(umbrella_files(data, folders), partial(read_entry, media, known))
    return found if folders else files(data, media, known)


def umbrella_files(data: Path, folders: dict[str, str]):
    """UMBRELLA's own folders: a conversation a file, whose ID is its path."""
    for split, name in folders.items():
        paths = conversations_in(data / name)
        if not paths:
            text = "the folder holds no .json files; complete it, or remove it"
            yield name, split, Problem(name, None, text, fatal=True)
        for path in paths:
            where = str(path.relative_to(data)).encode("utf-8", "backslashreplace").decode()
            try:
                entry = read_json(path)
                if not isinstance(entry, dict):
                    raise ValueError("not a JSON object but a list or a value; fix the file")
                yield where, split, {"id": where[: -len(".json")], **entry}
            except ValueError as error:
                yield where, split, Problem(where, None, str(error))


# ---- Any of them ----


def entries(path: Path, media: Path, endovis_choice: str | None = None):
    """The entries of a data folder in whichever layout it has, or of one file, whose split is None if it names none."""
    if not path.is_dir():
        own = any(re.fullmatch(kind, path.name) for kind in SURGVIVQA)
        found = surgvivqa_file(path, None, media, None) if own else file_entries(path, None, media, None)
    elif is_endovis(path):
        return endovis(path, media, endovis_choice)
    elif is_surgvivqa(path):
        return surgvivqa(path, media, None)
    else:
        lines = any(path.glob("train.json*"))  # then folders of .json files are something else
        found = (files if lines else umbrella_entries)(path, media, None)
    return each(found, partial(any_kind, media))


def any_kind(media: Path, where: str, split: str | None, entry: dict):
    """The entries that UMBRELLA's or LLaVA's conversation is, whichever it is."""
    volumes = [image for image in entry.get("images") or [] if isinstance(image, dict) and "modality" in image]
    if volumes or "volume" in entry:
        return turns.umbrella(media, where, split, entry, "all")
    shows_images = entry.keys() & {"image", "images"}
    return turns.llava(where, split, entry, *(("<image>", None) if shows_images else ("<video>", "video")))

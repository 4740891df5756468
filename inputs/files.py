"""Files of a data folder: their lines, their splits, and paths that may not leave the folder."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path

from inputs.task import Problem

SPLITS = ("train", "val", "test")


def data_files(data: Path) -> dict[str | None, Path]:
    """{split: its file} of a data folder, or {None: its only file}, to be divided by split_of. Ends where neither."""
    if not data.is_dir():
        raise SystemExit(f"--data {data}: no such folder")
    found = [path for split in SPLITS for path in sorted(data.glob(f"{split}.json*"))]
    files = {path.stem: path for path in found if path.suffix in (".json", ".jsonl")}
    if len(files) < len(found):
        raise SystemExit(f"--data {data}: one file a split, not {', '.join(path.name for path in found)}")
    single = [] if files else sorted([*data.glob("*.jsonl"), *data.glob("*.json")])
    if len(single) != 1 and not files:
        raise SystemExit(f"--data {data}: neither train/val/test.jsonl nor a single .jsonl or .json file")
    return files or {None: single[0]}


def read_json(path: Path):
    """What a JSON file holds. Raises ValueError where it is none, or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"not JSON ({error}); fix the file") from None


def read_jsonl(path: Path) -> tuple[list[tuple[str, dict]], list[Problem]]:
    """The objects of a JSON-lines file, each with its "file:line", and the lines that are none."""
    try:
        # with a byte order mark or without; splitlines would also cut at U+2028 inside a text
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        return [], [Problem(path.name, None, f"not UTF-8 ({error}); convert the file")]
    entries, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                entry = json.loads(line)
                if not isinstance(entry, dict):
                    raise ValueError("not an object")
                entries.append((f"{path.name}:{number}", entry))
            except ValueError as error:
                problems.append(Problem(f"{path.name}:{number}", None, f"not a JSON object ({error}); fix the line"))
    if not entries and not problems:
        problems.append(Problem(path.name, None, "the file holds no examples"))
    return entries, problems


def inside(folder: Path, name: str) -> Path:
    """folder/name, or ValueError where it does not exist or leaves the folder (.., absolute path, symbolic link)."""
    try:
        path = (folder / name).resolve()
        found = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a link to itself
        raise ValueError(f"{name} cannot be opened: {error}") from None
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads outside the data folder; copy the file into it")
    if not found:
        raise ValueError(f"{name} is missing; restore the file or leave the example out (--skip-bad)")
    return path


def first_existing(data: Path, places: list[str]) -> str:
    """The first of these names that is a file of the folder; where none is, the first, to be reported as missing."""
    with suppress(OSError):  # a name too long for any file
        return next((place for place in places if (data / place).is_file()), places[0])
    return places[0]


def listed(data: Path, name: str) -> list[str] | None:
    """The files of the folder `name` by number, frame_2 before frame_10; None where it is no folder."""
    with suppress(OSError):  # a name too long for any file
        if (data / name).is_dir():
            names = [path.name for path in (data / name).iterdir() if not path.name.startswith(".")]
            return [f"{name}/{file}" for file in sorted(names, key=by_number)]
    return None


def by_number(name: str) -> tuple[list, str]:
    """What names are sorted by: the numbers in them as numbers, then the name itself."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def file_sha256(data: Path, name: str) -> str:
    """The SHA-256 of a file of the data folder. Raises ValueError where it cannot be read."""
    try:
        with inside(data, name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None

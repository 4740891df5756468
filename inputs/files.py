"""Files of a data folder: their splits, and the names of what they show."""

import hashlib
import math
import os
import re
import stat
import unicodedata
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np

from inputs.numbered import in_order
from inputs.task import SPLITS

# what publishers call a split, in file names and in fields -> what it is called here
SPLIT_NAMES = {"train": "train", "val": "val", "test": "test", "training": "train", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "dev", "eval"), "val")
READ = (".jsonl", ".json", ".csv")
# a frame of a video file, by its time in seconds
FRAME = re.compile(r"(.+\.(?:mp4|mov|avi|webm|mkv))#t=(\d+\.\d{3})", re.IGNORECASE | re.DOTALL)
HASHING = Lock()


def data_files(data: Path) -> dict[str | None, Path]:
    """{split: its file} of a data folder, or {None: its only file}, to be divided by split_of. Ends where neither.

    Of a file instead of a folder all is to be answered: {"test": data}.
    """
    if data.is_file():
        return {"test": data}
    if not data.is_dir():
        raise SystemExit(f"--data {data}: no such folder")
    kinds = r"[^.].*\.(jsonl?|csv|tsv|parquet|arrow|ya?ml)(\.gz|\.zip|\.zst|\.xz)?"  # whether read or not
    try:
        found, files = [path for path in sorted(data.iterdir()) if re.fullmatch(kinds, path.name.lower())], {}
    except OSError as error:
        raise SystemExit(f"--data {data} cannot be read ({error.strerror}); make it readable") from None
    for path in found:
        split = SPLIT_NAMES.get(path.name.partition(".")[0].lower().removesuffix("_conversations"))  # UMBRELLA's
        if split and (path.suffix not in READ or split in files):
            other = files[split].name if split in files else "what is read"
            raise SystemExit(f"--data {data}: one file a split, {' or '.join(READ)}, not {path.name} beside {other}")
        files |= {split: path} if split else {}
    if not files and len(found) == 1 and found[0].suffix in READ:
        return {None: found[0]}
    if not files:
        others = f"; write {found[0].name} as JSON lines" if found and found[0].suffix not in READ else ""
        raise SystemExit(f"--data {data}: neither train/val/test.jsonl nor a single {' or '.join(READ)} file{others}")
    others = [path.name for path in found if path not in files.values()]
    if others:
        print(f"not read, beside {', '.join(path.name for path in files.values())}: {', '.join(others)}")
    return {split: files[split] for split in SPLITS if split in files}


def inside(media: Path, name: str) -> Path:
    """media/name, for a frame its video file; links may lead out. Raises ValueError where it is no file or outside."""
    name = FRAME.fullmatch(name)[1] if FRAME.fullmatch(name) else name
    if os.path.isabs(name) or ".." in Path(name).parts:
        text = "leads outside the data folder; link the file into it, or name its folder with --media-root"
        raise ValueError(f"{name} {text}")
    try:
        name.encode()
        mode = (media / name).stat().st_mode
    except UnicodeEncodeError:
        raise ValueError(f"{name} cannot be opened: its name is not UTF-8; rename the file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{name} is missing; {remedy(media, name)}") from None
    except (OSError, ValueError) as error:  # a name too long or with a NUL, a link to itself
        text = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} cannot be opened: {text}; correct the name") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name} cannot be opened: it is a folder or a device; name a file")
    return media / name


def remedy(media: Path, name: str) -> str:
    """What to do about a missing file: mostly it is there under a name that is spelt a little otherwise."""
    found, how = Path(), "names are case-sensitive"
    for part in name.replace("\\", "/").split("/"):
        called = spelt(media / found).get(alike(part))
        if called is None:
            return "restore the file or leave the example out (--skip-bad)"
        found /= called
    if str(found) == name:
        return "it is a link that leads nowhere, so restore what it leads to"
    if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", str(found)):
        how = "its accents are encoded otherwise (NFC, NFD)"
    return f"there is {found} ({'folders end with /' if chr(92) in name else how}); correct the name"


@lru_cache(3)  # hints alone need it, and a folder may hold a million files
def spelt(folder: Path) -> dict[str, str]:
    """{what is alike: a name} of all that lies in a folder."""
    with suppress(OSError):
        return {alike(name): name for name in os.listdir(folder)}
    return {}


def alike(name: str) -> str:
    """The same for names that differ in case, or in whether é is one character or two."""
    return unicodedata.normalize("NFC", name).casefold()


def first_existing(data: Path, places: list[str]) -> str:
    """The first of these names that is a file of the folder; where none is, the first, to be reported as missing."""
    return next((place for place in places if os.path.isfile(os.path.join(data, place))), places[0])


def listed(data: Path, name: str) -> list[str] | None:
    """The files of the folder `name` by number, frame_2 before frame_10; None where it is no folder."""
    with suppress(OSError):  # a name too long for any file
        if (data / name).is_dir():
            names = in_order(tuple(file for file in os.listdir(data / name) if not file.startswith(".")))
            return [f"{name}/{file}" for file in names]
    return None


def array_header(file, length: int) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, type) of a .npy file, from its header. Raises ValueError where the file has another length."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    if kind.hasobject:
        raise ValueError("it holds pickled objects; save numbers alone")
    due = file.tell() + math.prod(shape) * kind.itemsize
    if due != length:
        raise ValueError(f"its header says {due:,} bytes, and there are {length:,}; copy it again, or write it anew")
    return shape, kind


def file_sha256(data: Path, name: str) -> str:
    """The SHA-256 of a data file; for a frame that of its video, with the time. Raises ValueError if unreadable."""
    path, frame = inside(data, name), FRAME.fullmatch(name)
    try:
        if not frame:
            return sha256_of(path)
        state = path.stat()
        with HASHING:  # the threads of its other frames wait
            return f"{of_video(path, state.st_size, state.st_mtime_ns)}#t={frame[2]}"
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from None


def sha256_of(path: Path, *state) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


of_video = lru_cache(10_000)(sha256_of)  # once, and not for each of its frames, while its state is the same

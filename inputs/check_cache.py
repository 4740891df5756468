"""What the data check found, kept in RUN/check_cache.json: with the same data a restart checks no file again.

It is written where all could be read, and used, but for --check, where all examples, the state of every file, the
script's own settings, the code and the installed packages are as they were. A file's state is its size, its times and
its inode: reading it would take as long as the check. Deleting check_cache.json is always safe.
"""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import distributions
from operator import attrgetter
from pathlib import Path

from inputs.files import inside
from inputs.task import Example
from runtime.files import in_threads, sha256, write_text

NAME = "check_cache.json"


def key(data: Path, examples: list[Example], settings: dict) -> str:
    """A digest of all that the findings depend on: examples, the state of their media in data/, settings, and code."""
    folders = {Path(__file__).resolve().parent.parent, Path(sys.argv[0]).resolve().parent}
    code = {path for folder in folders for form in ("*.py", "*/*.py") for path in folder.glob(form)}
    code = [path for path in sorted(code) if path.is_file() and os.access(path, os.R_OK)]  # there may be others' files
    packages = sorted(f"{package.name} {package.version}" for package in distributions())
    found = hashlib.sha256(repr([settings, packages, *map(sha256, code)]).encode())
    values = lru_cache(lambda kind: attrgetter(*(field.name for field in fields(kind))))  # of an example, by its class
    states = in_threads(lambda name: state(data, name), list({name: 0 for e in examples for name in e.media}))
    found.update(repr(states).encode("utf-8", "backslashreplace"))
    for example in examples:
        found.update(repr(values(type(example))(example)).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def state(data: Path, name: str) -> list[tuple]:
    """All that changes when a file, or the header of an .img, is written or replaced; [] where there is none."""
    found = []
    with suppress(ValueError, OSError):
        path = inside(data, name)
        for each in [path, path.with_suffix(".hdr")] if path.suffix.lower() == ".img" else [path]:
            now = each.stat()
            found.append((now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino))
    return found


def read(folder: Path, of: str) -> dict | None:
    """What was kept under the key `of`, or None."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads((folder / NAME).read_bytes())
        return kept if kept["of"] == of else None
    return None


def write(folder: Path, of: str, **found) -> None:
    """Keep JSON-like findings under the key `of`, if there is room: all goes on without."""
    try:
        write_text(folder / NAME, json.dumps({"of": of, **found}))
    except SystemExit as error:
        print(f"warning: {error}, or leave it so: a restart then opens all files again")
        (folder / f"{NAME}.writing").unlink(missing_ok=True)

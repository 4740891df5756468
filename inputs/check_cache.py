"""What the data check found, kept in RUN/check_cache.json: a restart with the same data opens none of its files.

It is written where every file could be read, and used where all examples, the state of every file and the code that
checks are as they were. A file's state is its size, its times and its inode: reading it would take as long as the
check. Deleting check_cache.json is always safe.
"""

import hashlib
import json
import sys
from contextlib import suppress
from dataclasses import fields
from operator import attrgetter
from pathlib import Path

from inputs.files import inside
from inputs.task import Example
from runtime.files import in_threads, sha256, write_text

NAME = "check_cache.json"
CODE = Path(__file__).resolve().parent.parent


def key(data: Path, examples: list[Example]) -> str:
    """A digest of all that the check's findings depend on: examples, the state of their media in data/, and code."""
    code = [*CODE.glob("*.py"), *CODE.glob("*/*.py"), Path(sys.argv[0])]
    found = hashlib.sha256(repr([sha256(path) for path in sorted(code) if path.is_file()]).encode())
    states = in_threads(lambda name: state(data, name), list({name: 0 for e in examples for name in e.media}))
    found.update(repr(states).encode())
    values = attrgetter(*(field.name for field in fields(examples[0]))) if examples else None
    for example in examples:
        found.update(repr(values(example)).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


def state(data: Path, name: str) -> tuple | None:
    """Of a file all that changes when it is written or replaced; None where there is none."""
    with suppress(ValueError, OSError):
        found = inside(data, name).stat()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return None


def read(folder: Path, of: str) -> dict | None:
    """What was kept under the key `of`, or None."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads((folder / NAME).read_bytes())
        return kept if kept["of"] == of else None
    return None


def write(folder: Path, of: str, **found) -> None:
    """Keep JSON-like findings under the key `of`."""
    write_text(folder / NAME, json.dumps({"of": of, **found}))

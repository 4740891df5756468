"""Writing files so that a kill or a full disk harms nothing that was saved before."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import safetensors
from tqdm import tqdm

from runtime.ranks import rank


@contextmanager
def writing(path: Path):
    """Turn a write that fails into an error that says what was full, or not ours to write."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        folder = next(p for p in path.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free
        raise SystemExit(
            f"{path} cannot be written: {error} ({free / 2**20:,.0f} MB free in {folder}). What was saved before is "
            "complete: fix the cause and start the same command again"
        ) from None


@contextmanager
def replacing(folder: Path):
    """A folder to write into, which takes the place of `folder` once it is complete, and is removed if it never is."""
    temporary = folder.with_name(folder.name + ".writing")
    try:
        with writing(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            settle(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except (Exception, SystemExit):
        shutil.rmtree(temporary, ignore_errors=True)  # the room is needed
        raise


def write_json(path: Path, value) -> None:
    """Replace a JSON file completely, never in place; on the first rank only."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, lines: Iterable[dict]) -> None:
    """The same for a file of JSON lines, one at a time."""
    write_text(path, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """The same for any text, or its pieces."""
    if rank() == 0:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(path.name + ".writing")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines([text] if isinstance(text, str) else text)
            sync(temporary)
            temporary.replace(path)


def settle(folder: Path) -> None:
    """All files of a folder on the disk, with the permissions of new files: safetensors are written for one user."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            with suppress(OSError):  # there are file systems without permissions
                path.chmod(0o666 & ~mask)
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(values) -> str:
    """A digest of JSON-like values: whether the data of two runs are the same."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def progress(iterable=None, shown: bool = True, **settings) -> tqdm:
    """A progress bar where there is a terminal, on the first rank."""
    return tqdm(iterable, dynamic_ncols=True, disable=not (shown and sys.stderr.isatty() and rank() == 0), **settings)


def in_threads(function: Callable, items: list, **settings) -> dict:
    """{item: function(item)}, by several threads: decoding runs outside Python's lock. `settings` are the bar's."""
    n = max(1, min(64, len(items) // 4096))  # a task for each of a million files would take a gigabyte
    parts = [items[i : i + n] for i in range(0, len(items), n)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = chain.from_iterable(pool.map(lambda part: [function(item) for item in part], parts))
        return dict(zip(items, progress(found, total=len(items), **settings), strict=True))

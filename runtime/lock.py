"""One owner of a run folder: RUN/lock names its host and process."""

import json
import os
import socket
import stat
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from runtime.files import writing
from runtime.ranks import on_first_rank

TOUCH, PATIENCE = 10.0, 120.0  # seconds


@contextmanager
def locked(folder: Path):
    """A run's own while it writes its folder; a second run is refused, a dead one's lock taken.

    Whether a process of this host and container lives is asked of the kernel. Of another nothing can be asked: there
    the owner touches the file every ten seconds, and a lock that nobody touches for two minutes is a dead run's (one
    minute is how long a network file system may show an old time).
    """
    path, text, done = folder / "lock", json.dumps(process(os.getpid())), threading.Event()
    on_first_rank(lambda: take(path, text, done))
    try:
        yield
    finally:
        done.set()
        if text_of(path) == text:
            path.unlink(missing_ok=True)


def take(path: Path, text: str, done: threading.Event) -> None:
    """Write the lock, and touch it until `done`; SystemExit where another run lives."""

    def keep() -> None:
        while not done.wait(TOUCH):
            with suppress(OSError):  # tried again; if it is gone for good, the next checkpoint says so
                os.utime(path)

    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError), path.open("x") as file:
                file.write(text)
                break
            remove_dead(path)
    threading.Thread(target=keep, daemon=True).start()


def remove_dead(path: Path) -> None:
    """Remove the lock of a dead run; SystemExit where its run lives."""
    text = text_of(path)
    if text is None:
        return
    touched = path.stat().st_mtime_ns
    try:
        owner = json.loads(text)
        where = f"process {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        owner, where = {}, "an unknown process"
    living = f"{path.parent} is in use by {where}: stop it first, or use another --out"
    if owner.items() >= place().items():
        if owner == process(owner["pid"]):
            raise SystemExit(living)
    else:
        print(f"{path} is of {where}: waiting {PATIENCE:.0f} s for a sign of life", flush=True)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(TOUCH / 10)
            if text_of(path) != text:  # given back, or taken over by somebody else
                return
            if path.stat().st_mtime_ns != touched:
                raise SystemExit(living)
    mine = path.with_name(f"lock.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):  # of several that wait, one can rename it
        path.rename(mine)
        if text_of(mine) == text:
            print(f"{path} was left by {where}, which has ended: taken over")
            mine.unlink()
        else:  # another was quicker, and this is its lock
            mine.rename(path)


def text_of(path: Path) -> str | None:
    """What a lock says, None where there is none. SystemExit where it is no file of text."""
    with suppress(UnicodeDecodeError):
        try:
            if stat.S_ISREG(path.lstat().st_mode):
                return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
    raise SystemExit(f"{path} is a folder, a link or no text, and no run's: remove it, or use another --out")


def place() -> dict:
    """Where a process number means something: containers with the same host name count their processes alone."""
    with suppress(OSError):  # other systems than Linux have no /proc
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return {"host": socket.gethostname(), "processes": f"{kernel} {os.readlink('/proc/self/ns/pid')}"}
    return {"host": socket.gethostname()}


def process(pid: int) -> dict | None:
    """A living process of this host, known by its number and by when it began; None where it is dead."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text() if sys.platform == "linux" else os.kill(pid, 0)
    except (ProcessLookupError, FileNotFoundError):
        return None
    fields = found.rpartition(")")[2].split() if found else [""] * 20
    return None if fields[0] == "Z" else {**place(), "pid": pid, "began": fields[19]}


def refuse_lost(run: Path, file=None) -> None:
    """SystemExit where the run folder is another run's now, or gone; `file` is its metrics.jsonl, open."""
    path = run if file is None else run / "metrics.jsonl"
    if not path.exists() or (file is not None and not os.path.samefile(path, file.fileno())):
        text = "was renamed or removed while this run wrote it, and nothing more is written"
        raise SystemExit(f"{path} {text}: give it its name back and start the same command again")
    if text_of(run / "lock") not in (None, json.dumps(process(os.getpid()))):
        raise SystemExit(f"another run has taken {run} over (see {run / 'lock'}): nothing more is written")

"""Checkpoint folders: written beside their name and renamed, checked by manifest (sha256), never pickled.

RUN/checkpoints/step-00000200 holds adapter or model.safetensors, optimizer.safetensors, state.json and manifest.json.
"""

import shutil
from pathlib import Path

from runtime.files import replacing, sha256, sync, write_json, writing
from runtime.folders import read_json
from runtime.lock import refuse_lost
from runtime.ranks import on_first_rank

KEPT = 2  # the newest checkpoints of a run, besides the best


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(run: Path, step: int, write, state: dict, best: int = 0) -> None:
    """Write checkpoints/step-N: beside its final name, synced, then renamed: a kill leaves the old ones complete.

    write(folder) puts the tensors there; state is saved as state.json. Of older ones that of step `best` is kept. The
    first rank writes, the others wait. SystemExit where it fails: what was saved before is complete.
    """
    folder = folder_of(run, step)

    def write_all() -> None:
        refuse_lost(run)
        with replacing(folder) as temporary:
            write(temporary)
            write_json(temporary / "state.json", state)
            digests = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / "manifest.json", digests)  # last: it vouches for the others
        with writing(folder):
            for path in filter(Path.exists, (folder.parent, run, run / "metrics.jsonl")):
                sync(path)
        for old in set(sorted(folder.parent.glob("step-????????"))[:-KEPT]) - {folder_of(run, best)}:
            old.rename(old.with_suffix(".removing"))  # half removed it must not look like a checkpoint
        for left in [*folder.parent.glob("step-????????.removing"), *folder.parent.glob("step-????????.writing")]:
            shutil.rmtree(left, ignore_errors=True)  # a file that is read elsewhere stays on NFS: next time

    on_first_rank(write_all)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = read_json(folder / "manifest.json")
    except (OSError, ValueError) as error:
        return f"no readable manifest ({error})"
    if not isinstance(manifest, dict) or not {"state.json", "optimizer.safetensors"} <= manifest.keys():
        return "its manifest.json does not name state.json and optimizer.safetensors"
    try:
        for name, digest in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if sha256(folder / name) != digest:
                return f"{name} does not match its sha256"
    except OSError as error:
        return f"it cannot be read ({error})"
    return None


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint of --resume: a folder, "auto" (the newest whose manifest holds), "none" (it may hold none)."""
    found = on_first_rank(lambda: choose(run, resume))
    return Path(found) if found else None


def choose(run: Path, resume: str) -> str | None:
    if resume not in ("auto", "none"):
        if wrong := fault(Path(resume)):
            raise SystemExit(f"--resume {resume}: {wrong}")
        return resume
    folders = sorted((run / "checkpoints").glob("step-????????"), reverse=True)
    if resume == "none" and folders:
        raise SystemExit(f"{run} holds checkpoints of an earlier run: use another --out, or --resume auto to resume it")
    for folder in folders:
        wrong = fault(folder)
        if not wrong:
            print(f"resuming from {folder}")
            return str(folder)
        print(f"passing over {folder}: {wrong}")
    if folders:  # starting over without a word would lose the run
        raise SystemExit(f"no checkpoint of {run} is complete; restore one, or start again with another --out")
    return None


def roll_back(run: Path, step: int) -> None:
    """Move checkpoints after `step` to RUN/abandoned: broken ones, and those that --resume FOLDER went back from."""

    def move() -> None:
        for folder in sorted((run / "checkpoints").glob("step-????????")):
            if folder > folder_of(run, step):
                with writing(run / "abandoned"):
                    (run / "abandoned").mkdir(exist_ok=True)
                    shutil.rmtree(run / "abandoned" / folder.name, ignore_errors=True)
                    folder.rename(run / "abandoned" / folder.name)

    on_first_rank(move)
